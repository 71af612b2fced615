"""The living fleet as a fixture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from living_fleet import LivingFleet, living


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LivingFleet]:
    """Two machines of two orchestrators each; nothing applied yet."""
    yield from living(tmp_path / "home")


@pytest.fixture
def running(fleet: LivingFleet) -> LivingFleet:
    """The same, applied, served and connected."""
    fleet.make_key()
    fleet.fleet("apply", "--yes")
    fleet.serve()
    fleet.wait_online()
    return fleet
