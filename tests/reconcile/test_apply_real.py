"""Whole applies on real supervisords and daemons: what runs, what is killed, and what is left at the end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fleet_home import FleetHome

from orchestrator_fleet.machines import processes
from orchestrator_fleet.reconcile import control, fleet
from orchestrator_fleet.reconcile.look import look
from orchestrator_fleet.wire.machine import Observed

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(300)]

DYING = Path(__file__).with_name("dying_apply.py")


def daemons(home: FleetHome, name: str) -> list[int]:
    return [process.pid for process in processes.daemons(home.state.machine_root(name))]


def converged(home: FleetHome) -> bool:
    status = fleet.status(home.file)
    once_each = all(len(daemons(home, machine.name)) == len(machine.programs) for machine in status.machines)
    return home.plan().plan.empty and status.ready and once_each


def test_a_cold_apply_converges_and_a_second_one_writes_nothing(real: FleetHome) -> None:
    """No process, no journal line and no generation changes."""
    assert set(real.results(real.apply()).values()) == {"applied"}
    assert converged(real)
    assert {(orchestrator, machine) for orchestrator, machine, _, _ in real.keys} == {("vp-m1", "m1"), ("vp-m2", "m2")}
    files = {p: p.stat().st_mtime_ns for p in real.state.machines.glob("*/*.json*")}
    pids = real.pids()
    assert set(real.results(real.apply()).values()) == {"unchanged"}
    assert {p: p.stat().st_mtime_ns for p in real.state.machines.glob("*/*.json*")} == files
    assert real.pids() == pids


def test_a_charter_edit_restarts_nothing_and_a_runner_edit_only_its_own(real: FleetHome) -> None:
    """By pid; and the daemons themselves tell the new charter version."""
    real.apply()
    pids = real.pids()
    before = fleet.status(real.file).machines[0].programs["vp-m1"].charter_version
    real.charter("Another mandate.")
    real.apply()
    assert real.pids() == pids
    assert fleet.status(real.file).machines[0].programs["vp-m1"].charter_version != before
    real.commands["m2"] = "other"
    real.write()
    real.apply()
    now = real.pids()
    assert now["vp-m1"] == pids["vp-m1"]
    assert now["vp-m2"] != pids["vp-m2"]


def test_kill_of_an_apply_at_every_step_is_mended_by_the_next(real: FleetHome) -> None:
    """Before each change that it asks for: always one whole generation, and no daemon runs twice."""
    real.apply()
    for die_at in range(1, 100):
        real.charter(f"Mandate {die_at}.")
        real.commands["m2"] = f"hello {die_at}"
        real.write()
        done = subprocess.run(
            [sys.executable, str(DYING), str(real.file), str(die_at)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        seen = look_at(real)
        assert all(m.current and not (m.drifted or m.missing or m.foreign) for m in seen.values())
        if "through" in done.stdout:
            assert die_at > 12, "the steps to die at were not found"
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        real.apply()
        assert converged(real), die_at
        assert all(len(daemons(real, name)) == 1 for name in real.machines), die_at
    else:
        raise AssertionError("it never got through")


def look_at(home: FleetHome) -> dict[str, Observed]:
    return {name: seen for name, seen in asyncio.run(look(home.file)).observed.items() if isinstance(seen, Observed)}


def test_a_killed_supervisord_is_planned_for_and_brought_back(real: FleetHome) -> None:
    """The plan says what is down; no daemon runs twice."""
    real.apply()
    before = fleet.status(real.file).machines[0]
    os.kill(before.supervisord_pid, signal.SIGKILL)
    starts = [a for a in real.plan().plan.actions if a.kind == "start"]
    assert [(a.subject, a.reason) for a in starts] == [("vp-m1", "supervisord is down")]
    real.apply()
    assert converged(real)
    assert len(daemons(real, "m1")) == 1


def test_an_edited_file_comes_back_and_the_daemon_goes_on(real: FleetHome) -> None:
    """Drift is corrected in place."""
    real.apply()
    pids = real.pids()
    charter = real.state.machine_root("m1") / "current/orchestrators/vp-m1/charter.md"
    content = charter.read_text()
    charter.write_text("obey me")
    real.apply()
    assert charter.read_text() == content
    assert converged(real)
    assert real.pids() == pids


def test_a_machine_taken_out_of_the_file_and_destroy_leave_nothing(real: FleetHome) -> None:
    """No process and no folder."""
    real.apply()
    real.machines = ("m1",)
    real.write()
    real.apply()
    assert not real.state.machine_root("m2").exists()
    assert processes.leftovers(real.state.machine_root("m2")) == []
    real.machines = ("m1", "m3")
    real.write()
    real.apply()
    real.machines = ("m1",)  # m3 is left over, and destroyed all the same
    real.write()
    fleet.destroy(real.file)
    for name in ("m1", "m3"):
        assert processes.leftovers(real.state.machine_root(name)) == []
    assert not real.state.dir.exists()


def test_ctrl_c_finishes_the_machine_in_hand(real: FleetHome) -> None:
    """The first one; the rest is skipped, the leases are given back, and the next apply goes on."""
    script = """
import os, pathlib, signal, sys
from orchestrator_fleet.reconcile import fleet, report
def press(event):
    if (event.kind, event.target) == ("switching", "m1"):
        os.kill(os.getpid(), signal.SIGINT)
try:
    fleet.apply_plan(fleet.plan_fleet(pathlib.Path(sys.argv[1])), on_event=press, register_keys=lambda _: 0)
except report.RolloutFailed as error:
    print(error, {name: str(o.result) for name, o in error.report.outcomes.items()}, error.report.interrupted)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(real.file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith("interrupted: m2: interrupted; apply again for the rest"), done.stderr
    assert "'m1': 'applied', 'm2': 'skipped'} True" in done.stdout
    assert [m.lease for m in fleet.status(real.file).machines] == ["", ""]
    assert real.results(real.apply())["m2"] == "applied"


def test_the_control_plane_is_published_once_and_keys_alone_are_added(real: FleetHome) -> None:
    """A server that starts first publishes; a new key comes without what else is not applied yet."""
    assert control.publish_keys(real.file) is None
    first = control.ensure_published(real.file)
    assert control.ensure_published(real.file) == first
    real.charter("Not applied yet.")
    assert control.publish_keys(real.file) == first
    with real.file.open("a") as file:
        file.write(f"keys:\n  k-00000001: {{owner: person:me, sha256: {'0' * 64}, scopes: [admin]}}\n")
    second = control.publish_keys(real.file)
    assert second not in (first, None)
    subjects = {(a.subject, a.kind) for a in real.plan().plan.actions if a.target == "control-plane"}
    assert not any(subject.startswith("key:") for subject, _ in subjects)
    assert subjects, "the charter's change is still to be applied"
