"""Leases: decided by values, and held on a real disk by processes that die."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from tiny_fleet import Machine, control_only, staging

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.machines import lease, processes
from orchestrator_fleet.machines.declined import Declined
from orchestrator_fleet.wire.machine import Acquire, Leased

NOW_US = 1_767_225_600 * SECOND_US


def taken(before: lease.Lease | None, holder: str, *, now_us: int = NOW_US, floor: int = 0) -> lease.Lease:
    return lease.taken(before, holder=holder, ttl_s=60, process="", floor=floor, now_us=now_us)


def test_an_expired_lease_is_free_for_another_with_a_higher_token() -> None:
    """A holder that stopped renewing has lost it."""
    first = taken(None, "ada")
    second = taken(first, "bob", now_us=NOW_US + 61 * SECOND_US)
    assert (second.holder, second.token > first.token) == ("bob", True)


def test_the_token_rises_though_the_clock_goes_back_or_the_file_is_lost() -> None:
    """Whatever is known of earlier tokens is a floor."""
    first = taken(None, "ada")
    assert taken(lease.given_back(first), "bob", now_us=NOW_US - 3600 * SECOND_US).token > first.token
    assert taken(None, "bob", now_us=5, floor=first.token).token > first.token


def test_an_expiry_no_lease_can_have_is_not_believed() -> None:
    """A file written under a wrong clock does not lock the machine for years."""
    far = msgspec.structs.replace(taken(None, "ada"), expires_us=NOW_US * 2)
    assert taken(far, "bob").holder == "bob"


@pytest.mark.parametrize(("holder", "ttl_s"), [("", 60), ("x" * 501, 60), ("ada", 0), ("ada", 3601)])
def test_a_lease_has_a_holder_and_a_bound(holder: str, ttl_s: float) -> None:
    """Nobody holds a machine without a name, or for ever."""
    with pytest.raises(Declined):
        lease.taken(None, holder=holder, ttl_s=ttl_s, process="", floor=0, now_us=NOW_US)


def test_a_dead_holder_on_this_host_frees_the_machine_at_once(machine: Machine) -> None:
    """`kill -9` of an apply does not cost the next one a minute."""
    script = "from orchestrator_fleet.machines import processes; print(processes.own_name()); input()"
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    name = holder.stdout.readline().strip()
    assert isinstance(machine.ask(Acquire(holder="ada", ttl_s=60, process=name)), Leased)
    assert machine.refused(Acquire(holder="bob", ttl_s=60)).code == "lease_held"
    holder.kill()
    holder.wait(10)
    assert isinstance(machine.ask(Acquire(holder="bob", ttl_s=60)), Leased)


@pytest.mark.parametrize("name", ["", "x", "x/1/2", "another-boot+pid:[1]/1/1"])
def test_a_process_of_another_kernel_is_never_called_dead(name: str) -> None:
    """Only expiry frees what we can't look at."""
    assert not processes.is_known_dead(name)


def test_work_lengthens_the_lease(machine: Machine) -> None:
    """Who works is alive."""
    machine.lease(ttl_s=60)
    before = machine.look().lease
    machine.stage(control_only())
    after = machine.look().lease
    assert before is not None
    assert after is not None
    assert after.expires_us > before.expires_us


def test_two_changes_do_not_happen_at_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, and says whom for when it waited long enough."""
    machine.lease("ada")
    monkeypatch.setattr(lease.locked.__wrapped__, "__kwdefaults__", {"wait_s": 0.1})
    with lease.locked(machine.layout):
        refusal = machine.refused(staging(control_only(), machine.token))
    assert refusal.code == "lease_held"
    assert "ada is changing" in refusal.problem
    machine.stage(control_only())
