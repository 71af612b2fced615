"""A story in a live store, and the history beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from story import Story

from orchestrator_fleet.history.ingest import Ingester


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    told = Story(tmp_path / "store.sqlite")
    yield told
    told.close()


@pytest.fixture
def history(story: Story, tmp_path: Path) -> Iterator[Ingester]:
    ingester = Ingester(story.url, tmp_path / "history.duckdb")
    yield ingester
    ingester.close()
