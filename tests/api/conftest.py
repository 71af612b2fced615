"""A running control plane for whoever needs one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ControlPlane


@pytest.fixture
def control_plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane of one's own, not started yet."""
    plane = ControlPlane(tmp_path / "home")
    yield plane
    plane.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running control plane for tests that change nothing of it but tasks."""
    plane = ControlPlane(tmp_path_factory.mktemp("shared") / "home").start()
    yield plane
    plane.close()
