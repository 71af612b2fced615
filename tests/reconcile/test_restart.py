"""Restarting one daemon under its machine's lease, without another generation."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fleet_home import FleetHome, MemoryMachines

from orchestrator_fleet.errors import LeaseHeld, MachineError, Unreachable
from orchestrator_fleet.machines.connect import transport_to
from orchestrator_fleet.machines.fake import Faults
from orchestrator_fleet.machines.local import LocalTransport
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.reconcile import restart as restarting
from orchestrator_fleet.reconcile.restart import NotRunning, Restarted, restart
from orchestrator_fleet.wire.machine import Acquire, Leased, Observe, Observed


def go(transport: Transport, program: str) -> Restarted:
    return asyncio.run(restart(transport, program, holder="a test"))


def look(transport: Transport) -> Observed:
    seen = asyncio.run(transport.call(Observe(), timeout_s=10))
    assert isinstance(seen, Observed)
    return seen


def test_the_daemon_is_another_process_and_the_lease_is_free_again(home: FleetHome, memory: MemoryMachines) -> None:
    """Nothing else moved: the next plan is empty."""
    home.apply()
    machine = memory.machines["m1"]
    before = look(machine)
    done = go(machine, "vp-m1")
    after = look(machine)
    assert done == Restarted(
        before=before.programs["vp-m1"].pid, pid=after.programs["vp-m1"].pid, problem="", connected=True
    )
    assert done.pid != done.before
    assert after.lease is None
    assert home.plan().plan.empty


def test_while_an_apply_holds_the_machine_nothing_is_restarted(home: FleetHome, memory: MemoryMachines) -> None:
    """It is told who is at it."""
    home.apply()
    machine = memory.machines["m1"]
    assert isinstance(asyncio.run(machine.call(Acquire(holder="ada's apply", ttl_s=60), timeout_s=5)), Leased)
    pid = look(machine).programs["vp-m1"].pid
    with pytest.raises(LeaseHeld, match="ada's apply"):
        go(machine, "vp-m1")
    assert look(machine).programs["vp-m1"].pid == pid


def test_what_does_not_run_there_is_not_restarted(home: FleetHome, memory: MemoryMachines) -> None:
    """Another's program, a machine without supervisord, and one that never was: which stays as it is."""
    home.apply()
    machine = memory.machines["m1"]
    with pytest.raises(NotRunning, match="supervisord has no vp-m2"):
        go(machine, "vp-m2")
    machine.stop_supervisord()
    with pytest.raises(NotRunning, match="no supervisord runs there"):
        go(machine, "vp-m1")
    root = home.state.machine_root("m9")
    with pytest.raises(NotRunning):
        go(LocalTransport("m9", root, home.home), "vp-m1")
    assert not root.exists()


def test_a_machine_out_of_reach_is_told_as_such(home: FleetHome, memory: MemoryMachines) -> None:
    """Also one at an address that this version has no way to."""
    home.apply()
    machine = memory.machines["m1"]
    machine.faults = Faults(unreachable=True)
    with pytest.raises(Unreachable, match="no route"):
        go(machine, "vp-m1")
    machine.faults = Faults(refuse={"restart": "supervisord refused signalProcess"})
    with pytest.raises(MachineError, match="signalProcess"):
        go(machine, "vp-m1")
    assert look(machine).lease is None
    far = transport_to("m7", address="ssh://m7", root=Path("/nowhere"), home=home.home)
    with pytest.raises(Unreachable, match="only `address: local`"):
        go(far, "vp-m1")


def test_a_daemon_that_does_not_come_up_is_a_problem_that_says_so(home: FleetHome, memory: MemoryMachines) -> None:
    """FATAL is not waited for."""
    home.apply()
    machine = memory.machines["m1"]
    machine.faults = Faults(never_run=frozenset({"vp-m1"}))
    done = go(machine, "vp-m1")
    assert (done.pid, "vp-m1: FATAL: Exited too quickly" in done.problem) == (0, True)


@pytest.mark.supervisord
@pytest.mark.timeout(300)
def test_a_real_daemon_is_restarted_and_its_neighbour_machine_is_not(
    real: FleetHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens for it here, so its link is not there after the moment that is waited for it."""
    monkeypatch.setattr(restarting, "LINK_S", 0.2)
    real.apply()
    pids = real.pids()
    done = go(LocalTransport("m1", real.state.machine_root("m1"), real.home), "vp-m1")
    now = real.pids()
    assert (done.before, done.pid, done.problem, done.connected) == (pids["vp-m1"], now["vp-m1"], "", False)
    assert (now["vp-m1"] != pids["vp-m1"], now["vp-m2"]) == (True, pids["vp-m2"])
    assert real.plan().plan.empty
