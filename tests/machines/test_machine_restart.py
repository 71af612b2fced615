"""Restarting programs without another generation: on the machine in memory and on real supervisords."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_fleet import Machine, control_only, is_alive, is_up, tiny_bundle, until

from orchestrator_fleet.machines import processes, supervisord
from orchestrator_fleet.wire.machine import Acquire, Release, Restart

# Another process that asks for a restart, and is killed while it waits for the old process to end.
DYING = """
import sys
from pathlib import Path
from orchestrator_fleet.clock import SystemClock
from orchestrator_fleet.machines.hands import Hands
from orchestrator_fleet.wire.machine import Restart
root = Path(sys.argv[1])
hands = Hands(root, fleet_home=root.parent, python=sys.executable, clock=SystemClock())
hands.call(Restart(token=int(sys.argv[2]), programs=("vp-a",)))
"""


def test_a_restarted_program_has_another_process_and_nothing_else_changes(either: Machine) -> None:
    """Its neighbours, the generation and the journal are as before."""
    what = tiny_bundle({"vp-a": "", "vp-b": ""})
    either.bring(what)
    before, pids = either.look(), either.pids()
    done = either.done(Restart(token=either.token, programs=("vp-a",)))
    after = either.until_up(what)
    now = either.pids()
    assert (now["vp-b"], now["vp-a"] != pids["vp-a"]) == (pids["vp-b"], True)
    assert done.notes == (f"vp-a restarted, pid {now['vp-a']}",)
    assert (after.generations, after.journal, after.last_good) == (before.generations, before.journal, what.digest)
    assert after.supervisord_pid == before.supervisord_pid


def test_several_are_restarted_at_once(either: Machine) -> None:
    """One request, each with another process."""
    what = tiny_bundle({"vp-a": "", "vp-b": "", "vp-c": ""})
    either.bring(what)
    pids = either.pids()
    either.done(Restart(token=either.token, programs=("vp-c", "vp-a")))
    either.until_up(what)
    now = either.pids()
    assert {name for name in now if now[name] != pids[name]} == {"vp-a", "vp-c"}


def test_a_restart_without_its_program_is_refused_before_anything_is_done(either: Machine) -> None:
    """A name that supervisord lacks, and a machine without one."""
    either.bring(control_only())
    refused = either.refused(Restart(token=either.token, programs=("vp-a",)))
    assert (refused.code, "no supervisord runs here" in refused.problem) == ("not_running", True)
    either.bring(tiny_bundle({"vp-a": ""}))
    pids = either.pids()
    refused = either.refused(Restart(token=either.token, programs=("vp-a", "vp-z")))
    assert (refused.code, "vp-z" in refused.problem) == ("not_running", True)
    assert either.pids() == pids


def test_only_who_holds_the_lease_restarts(either: Machine) -> None:
    """Given back, its token is good for nothing."""
    either.bring(tiny_bundle({"vp-a": ""}))
    pids = either.pids()
    either.done(Release(token=either.token))
    assert either.refused(Restart(token=either.token, programs=("vp-a",))).code == "fenced"
    either.ask(Acquire(holder="another", ttl_s=60))
    assert either.refused(Restart(token=either.token, programs=("vp-a",))).code == "fenced"
    assert either.pids() == pids


@pytest.mark.supervisord
def test_a_process_that_ignores_being_told_is_killed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time that a program has to end."""
    monkeypatch.setattr(supervisord, "TERM_S", 0.3)
    what = tiny_bundle({"vp-a": "stubborn"})
    pid = machine.bring(what).programs["vp-a"].pid
    machine.done(Restart(token=machine.token, programs=("vp-a",)))
    assert not is_alive(pid)
    assert machine.until_up(what).programs["vp-a"].pid != pid


@pytest.mark.supervisord
def test_a_stopped_program_is_started(machine: Machine) -> None:
    """Whoever stopped it."""
    what = tiny_bundle({"vp-a": ""})
    pid = machine.bring(what).programs["vp-a"].pid
    client = supervisord.connect(machine.layout)
    assert client is not None
    client._call("stopProcess", "vp-a")
    client.close()
    assert machine.look().programs["vp-a"].state == "STOPPED"
    machine.done(Restart(token=machine.token, programs=("vp-a",)))
    assert machine.until_up(what).programs["vp-a"].pid != pid


@pytest.mark.supervisord
def test_one_that_asks_and_is_killed_leaves_no_program_down(machine: Machine) -> None:
    """Supervisord itself starts what ended."""
    what = tiny_bundle({"vp-a": ""})
    pid = machine.bring(what).programs["vp-a"].pid
    os.kill(pid, signal.SIGSTOP)  # it ends when it goes on
    asker = subprocess.Popen([sys.executable, "-c", DYING, str(machine.layout.root), str(machine.token)])
    until(lambda: _is_told_to_end(pid), "the process is told to end")
    asker.kill()
    asker.wait(10)
    os.kill(pid, signal.SIGCONT)
    until(lambda: not is_alive(pid) and is_up(machine.look(), what), "another runs")
    assert len(processes.daemons(machine.layout.root)) == 1


def _is_told_to_end(pid: int) -> bool:
    """Whether a SIGTERM waits for it."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
