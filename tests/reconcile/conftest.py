"""Fleet folders as fixtures; whatever runs at the end is ended by pid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet_home import FleetHome, MemoryMachines, in_memory

from orchestrator_fleet.machines import processes, supervisord
from orchestrator_fleet.machines.layout import Layout


@pytest.fixture
def real(tmp_path: Path) -> Iterator[FleetHome]:
    """A fleet on two machines of this host; nothing applied yet."""
    home = FleetHome(tmp_path / "home")
    yield home
    for name in home.state.local_roots():
        root = home.state.machine_root(name)
        supervisord.end(Layout(root))
        processes.end(processes.leftovers(root), term_s=0)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryMachines:
    """Machines in memory."""
    return in_memory(monkeypatch)


@pytest.fixture
def home(tmp_path: Path, memory: MemoryMachines) -> FleetHome:
    """A fleet of six machines in memory; nothing applied yet."""
    assert memory.machines == {}
    return FleetHome(tmp_path / "home", machines=tuple(f"m{n}" for n in range(1, 7)))
