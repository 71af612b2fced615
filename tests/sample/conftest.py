"""The sample repository, and an agent's run on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sample_repository
from sample_repository import Ran


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return sample_repository.make(tmp_path / "repository")


@pytest.fixture
def work(repository: Path, tmp_path: Path) -> Callable[..., Ran]:
    """`work("lint", scope="app")`: run it; it must exit 0 and leave a result that reads like its output."""

    def ran(agent: str, *, repository: Path = repository, **metadata: Any) -> Ran:
        done = sample_repository.run(agent, sample_repository.task(repository, **metadata), folder=tmp_path)
        assert done.code == 0, done.err
        assert done.out.splitlines()[0] == done.result["headline"]
        assert done.result["findings_total"] >= len(done.result["findings"])
        return done

    return ran
