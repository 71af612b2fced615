"""The machine in memory breaks as declared; what it does when it doesn't is in the suite for all transports."""

from __future__ import annotations

import asyncio

import pytest
from builders import Living, fleet, plan

from orchestrator_fleet.clock import FrozenClock
from orchestrator_fleet.errors import Unreachable
from orchestrator_fleet.machines.fake import CRASHES, FakeTransport, Faults
from orchestrator_fleet.wire.machine import Acquire, Leased, Observe, Observed, Refusal, Stage


def applied() -> Living:
    living = Living()
    living.apply(fleet(machines=1))
    return living


def look(living: Living) -> Observed:
    seen = living.observe()["m1"]
    assert isinstance(seen, Observed)
    return seen


def test_an_unreachable_machine_gets_no_request() -> None:
    """The error names it."""
    living = applied()
    living["m1"].faults = Faults(unreachable=True)
    with pytest.raises(Unreachable, match="m1: no route to it"):
        living.ask("m1", Observe())


def test_a_slow_machine_does_what_it_is_told_though_nobody_hears() -> None:
    """The lease is taken; only the answer is lost."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    machine = FakeTransport("m1", clock=FrozenClock(), faults=Faults(delay_s=3), sleep=sleep)
    with pytest.raises(Unreachable, match="no answer in 2 s"):
        asyncio.run(machine.call(Acquire(holder="me", ttl_s=60), timeout_s=2))
    seen = asyncio.run(machine.call(Observe(), timeout_s=5))
    assert isinstance(seen, Observed)
    assert seen.lease is not None
    assert seen.lease.holder == "me"
    assert waited == [2, 3]


def test_a_full_disk_takes_no_generation() -> None:
    """And a request may be refused by name."""
    living = applied()
    leased = living.ask("m1", Acquire(holder="me", ttl_s=60))
    assert isinstance(leased, Leased)
    bundle = living.desired(fleet(machines=1, orchestrators={"vp-9": {}})).machines["m1"]
    request = Stage(token=leased.token, digest=bundle.digest, manifest=bundle.manifest_bytes, blobs={})
    living["m1"].faults = Faults(disk_full=True)
    assert living.ask("m1", request) == Refusal(code="failed", problem="stage: no space left on device")
    living["m1"].faults = Faults(refuse={"stage": "read-only file system"})
    assert living.ask("m1", request) == Refusal(code="failed", problem="read-only file system")
    assert look(living).generations == (look(living).current,)


def test_a_program_that_never_runs_is_planned_again() -> None:
    """FATAL after each start, until the cause is gone."""
    living = Living()
    living.desired(fleet(machines=1))
    living["m1"].faults = Faults(never_run=frozenset({"vp-1"}))
    living.apply(fleet(machines=1))
    assert look(living).programs["vp-1"].state == "FATAL"
    assert "it is FATAL (Exited too quickly)" in {a.reason for a in living.plan(fleet(machines=1)).actions}
    living["m1"].faults = Faults()
    living.apply(fleet(machines=1))
    assert living.plan(fleet(machines=1)).empty


@pytest.mark.parametrize("step", CRASHES)
def test_a_crash_after_any_step_is_mended_by_the_next_apply(step: str) -> None:
    """The answer is lost, what was done stays, and it happens once."""
    living = applied()
    wanted = fleet(machines=1, orchestrators={"vp-2": {}, "vp-3": {}})
    living["m1"].faults = Faults(crash_after=step)
    with pytest.raises(Unreachable, match="the connection was lost"):
        living.apply(wanted)
    assert living["m1"].faults.crash_after is None
    living.clock.advance(120)
    living.apply(wanted)
    assert living.plan(wanted).empty
    assert set(look(living).programs) == {"vp-2", "vp-3"}


def test_a_crash_leaves_what_was_done_before_it() -> None:
    """After the link and before the programs: the new generation, the old programs."""
    living = applied()
    wanted = fleet(machines=1, orchestrators={"vp-2": {}})
    living["m1"].faults = Faults(crash_after="linked")
    with pytest.raises(Unreachable):
        living.apply(wanted)
    seen = look(living)
    assert seen.current == living.desired(wanted).machines["m1"].digest
    assert set(seen.programs) == {"vp-1"}
    made = plan(living.desired(wanted), living.observe())
    assert {(a.subject, a.kind, a.change) for a in made.actions if a.target == "m1"} == {
        ("vp-1", "stop", "drift"),
        ("vp-2", "start", "not_running"),
    }
