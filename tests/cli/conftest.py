"""The command line and a small fleet for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import FLEET_YAML, Run, run_in


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run fleet in the test's folder; see `run_in`."""
    return run_in(tmp_path)


@pytest.fixture
def fleet_home(tmp_path: Path) -> Path:
    """A folder with the smallest fleet that routes: two orchestrators of two disciplines on one machine."""
    (tmp_path / "charters").mkdir()
    (tmp_path / "charters/vp.md").write_text("---\nrole: VP\n---\nYou do what the task says.\n")
    (tmp_path / "fleet.yaml").write_text(FLEET_YAML)
    return tmp_path
