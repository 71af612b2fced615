"""What a plan refuses, what it notes, and where it takes who runs where from."""

from __future__ import annotations

import pytest
from builders import Living, fleet, plan
from msgspec.structs import replace

from orchestrator_fleet.errors import EXIT_REFUSED, Protected, Refused
from orchestrator_fleet.plan.between import fingerprint, residents
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.plan.show import to_json
from orchestrator_fleet.wire.machine import Acquire, Leased, Observed, Reject


def of(*names: str, **spec) -> dict:
    return {name: {"machine": "m1", **spec} for name in names}


def test_a_protected_orchestrator_is_not_deleted() -> None:
    """Lifting it takes an apply of its own."""
    living = Living()
    living.apply(fleet(machines=1, orchestrators=of("vp-1", "vp-2", protect=True)))
    only_one = fleet(machines=1, orchestrators=of("vp-1"))
    with pytest.raises(Protected, match=r"would delete vp-2, marked protect: true; put it back") as caught:
        living.plan(only_one)
    assert caught.value.exit_code == EXIT_REFUSED
    living.apply(fleet(machines=1, orchestrators=of("vp-1", "vp-2")))
    assert living.plan(only_one).summary.stop == 1


def test_a_protected_orchestrator_may_move() -> None:
    """It is not deleted by that."""
    living = Living()
    living.apply(fleet(orchestrators={"vp-1": {"machine": "m1", "protect": True}}))
    moved = living.plan(fleet(orchestrators={"vp-1": {"machine": "m2", "protect": True}}))
    assert {(a.target, a.kind) for a in moved.actions if a.subject == "vp-1"} == {("m1", "stop"), ("m2", "start")}


def test_more_deletes_than_the_share_allows_are_refused_with_the_numbers() -> None:
    """One alone always may go; moves are no deletes."""
    living = Living()
    living.apply(fleet(machines=1, orchestrators=of(*(f"vp-{n}" for n in range(8)))))
    six, five = (fleet(machines=1, orchestrators=of(*(f"vp-{n}" for n in range(count)))) for count in (6, 5))
    assert living.plan(six, max_deletes=0.25).summary.stop == 2
    with pytest.raises(Refused) as caught:
        living.plan(five, max_deletes=0.25)
    assert str(caught.value) == (
        "the plan would delete 3 of 8 orchestrators (vp-5, vp-6, vp-7), rollout.max_deletes allows 25%; "
        "when you mean it, raise rollout.max_deletes or pass --allow-deletes"
    )
    seven = fleet(machines=1, orchestrators=of(*(f"vp-{n}" for n in range(7))))
    assert living.plan(seven, max_deletes=0.0).summary.stop == 1


def test_nothing_is_planned_for_a_machine_that_cannot_be_seen() -> None:
    """The plan is not empty, and says why."""
    living = Living()
    living.apply(fleet())
    desired, seen = living.desired(fleet()), living.observe()
    made = plan(desired, {**seen, "m2": "connection refused"})
    assert not made.empty
    assert [(t.name, t.problem) for t in made.targets if t.problem] == [("m2", "connection refused")]
    assert {a.target for a in made.actions} == {CONTROL_PLANE, "m1"}
    del seen["m2"]
    assert [t.problem for t in plan(desired, seen).targets] == ["", "", "it was not looked at"]


def test_who_lives_on_a_machine_out_of_reach_is_known_from_the_control_plane() -> None:
    """So nobody is started a second time elsewhere."""
    living = Living()
    spec = fleet(orchestrators={"vp-1": {}, "vp-2": {}})
    living.apply(spec)
    seen = living.observe()
    where = residents(seen)
    assert sorted(where) == ["vp-1", "vp-2"]
    assert residents({**seen, "m1": "gone", "m2": "gone"}) == where
    assert residents({"m1": "gone"}) == {}


def test_of_two_generations_that_name_one_the_told_one_counts() -> None:
    """An interrupted move does not turn back."""
    living = Living()
    living.apply(fleet(orchestrators={"vp-1": {"machine": "m1"}}))
    old = living.observe()["m1"]
    living.apply(fleet(orchestrators={"vp-1": {"machine": "m2"}}))
    assert residents({**living.observe(), "m1": old}) == {"vp-1": "m2"}


def test_who_comes_from_a_machine_out_of_reach_is_said_to() -> None:
    """It may still run there."""
    living = Living()
    living.apply(fleet(orchestrators={"vp-1": {"machine": "m1"}}))
    desired = living.desired(fleet(orchestrators={"vp-1": {"machine": "m2"}}))
    made = plan(desired, {**living.observe(), "m1": "no route"})
    start = next(a for a in made.actions if a.kind == "start")
    assert (start.change, start.reason) == (
        "moved",
        "it moves here from m1, which cannot be asked whether it still runs there",
    )


def test_a_generation_that_failed_before_is_noted() -> None:
    """It is planned nevertheless: what it failed of may be gone."""
    living = Living()
    living.apply(fleet(machines=1))
    other = fleet(machines=1, orchestrators=of("vp-9"))
    digest = living.desired(other).machines["m1"].digest
    leased = living.ask("m1", Acquire(holder="test", ttl_s=60))
    assert isinstance(leased, Leased)
    living.ask("m1", Reject(token=leased.token, digest=digest, reason="vp-9 is FATAL"))
    assert living.plan(other).notes == (
        f"m1: generation {digest[:8]} was tried before and did not get healthy: vp-9 is FATAL",
    )


def test_drift_is_ignored_where_it_is_to_be() -> None:
    """Correct, warn and ignore."""
    living = Living()
    living.apply(fleet())
    living["m1"].edit("notes.txt", b"mine")
    assert not living.plan(fleet()).empty
    warned, ignored = living.plan(fleet(), drift="warn"), living.plan(fleet(), drift="ignore")
    assert (warned.empty, len(warned.notes)) == (True, 1)
    assert (ignored.empty, ignored.notes) == (True, ())


def test_a_generation_that_was_never_confirmed_is_written_again() -> None:
    """An apply that died between its switch and its verdict is taken up."""
    living = Living()
    living.apply(fleet())
    seen = living.observe()
    m1 = seen["m1"]
    assert isinstance(m1, Observed)
    made = plan(living.desired(fleet()), {**seen, "m1": replace(m1, last_good=None)})
    assert [(a.kind, a.change) for a in made.actions if a.kind != "no-op"] == [("write", "unconfirmed")]


def test_a_fingerprint_is_of_what_a_plan_depends_on() -> None:
    """Time passing and a link lost change nothing; a state, a digest or a file does."""
    living = Living()
    living.apply(fleet(machines=1))
    first = living.observe()["m1"]
    living.clock.advance(60)
    again = living.observe()["m1"]
    assert isinstance(first, Observed)
    assert isinstance(again, Observed)
    assert fingerprint(first) == fingerprint(again)
    prints = {fingerprint(first)}
    living["m1"].edit("notes.txt", b"")
    prints.add(fingerprint(living.observe()["m1"]))
    living["m1"].kill_program("vp-1")
    prints.add(fingerprint(living.observe()["m1"]))
    living["m1"].run_program("vp-1", digest="0" * 16)
    prints.add(fingerprint(living.observe()["m1"]))
    living["m1"].stop_supervisord()
    prints.add(fingerprint(living.observe()["m1"]))
    assert len(prints) == 5


def test_a_plan_is_named_by_what_it_says() -> None:
    """The time it was made is not part of that."""
    living = Living()
    first = living.plan(fleet())
    living.clock.advance(60)
    assert living.plan(fleet()).id == first.id
    assert living.plan(fleet(machines=3)).id != first.id


def test_no_secret_and_no_hash_of_one_stands_in_a_plan() -> None:
    """8 digits of a hash tell keys apart, and no more."""
    living = Living()
    living.apply(fleet())
    sha256 = "ab" * 32
    made = living.plan(fleet(keys={"k-00000001": {"owner": "person:me", "sha256": sha256, "scopes": ["admin"]}}))
    assert sha256[:8].encode() in to_json(made)
    assert sha256[:9].encode() not in to_json(made)
