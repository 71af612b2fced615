"""A scripted control plane and a machine to live on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from living_daemon import LivingMachine
from scripted_plane import ScriptedPlane


@pytest.fixture
def plane() -> Iterator[ScriptedPlane]:
    scripted = ScriptedPlane()
    scripted.start()
    yield scripted
    scripted.stop()


@pytest.fixture
def machine(tmp_path: Path, plane: ScriptedPlane) -> Iterator[LivingMachine]:
    living = LivingMachine(tmp_path / "m01", plane.url)
    yield living
    living.close()
