"""Holds: begun, changed, ended and told, each once."""

from __future__ import annotations

from typing import Any

from desk import Desk

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import holds
from orchestrator_fleet.tasks.holds import Hold

HOUR_US = 3_600_000_000


def put(
    desk: Desk, *, kind: Any = "pause", reason: str | None = "why", until_us: int | None = None, by: str = "k"
) -> bool:
    """Hold vp-a; whether that changed anything."""
    return desk.store.write_sync(
        lambda c: holds.put(c, orchestrator="vp-a", kind=kind, by=by, reason=reason, until_us=until_us, now_us=desk.now)
    )


def lift(desk: Desk, *, kind: Any = "pause") -> bool:
    """End a hold on vp-a; whether there was one."""
    return desk.store.write_sync(
        lambda c: holds.lift(c, orchestrator="vp-a", by="k", reason="go", now_us=desk.now, kind=kind)
    )


def found(desk: Desk) -> list[Hold]:
    """The holds on vp-a."""
    return desk.store.read_sync(lambda c: holds.find(c, "vp-a"))


def told(desk: Desk) -> list[Event]:
    """Every event."""
    return list(desk.store.read_sync(lambda c: outbox.read_after(c, 0)))


def test_a_pause_begins_and_ends_once(desk: Desk) -> None:
    """The second time changes nothing and tells nothing, whoever says it."""
    assert [put(desk), put(desk), put(desk, by="another")] == [True, False, False]
    assert found(desk) == [Hold(orchestrator="vp-a", kind="pause", by="k", reason="why", at_us=desk.now, until_us=None)]
    assert [lift(desk), lift(desk)] == [True, False]
    assert found(desk) == []
    events = told(desk)
    assert [(event.kind, event.orchestrator, event.actor) for event in events] == [
        ("orchestrator_paused", "vp-a", "k"),
        ("orchestrator_resumed", "vp-a", "k"),
    ]
    assert [event.data for event in events] == [{"kind": "pause", "reason": "why"}, {"kind": "pause", "reason": "go"}]


def test_another_reason_or_end_changes_a_pause(desk: Desk) -> None:
    """And is told; a reason too long for a row is cut."""
    put(desk)
    assert put(desk, reason="another")
    assert put(desk, reason="another", until_us=desk.now + HOUR_US)
    assert not put(desk, reason="another", until_us=desk.now + HOUR_US)
    assert put(desk, reason="x" * 10_000)
    (hold,) = found(desk)
    assert (len(hold.reason or ""), hold.until_us) == (4_000, None)
    assert told(desk)[2].data["until"] == to_rfc3339(desk.now + HOUR_US)


def test_of_two_ends_of_a_quota_the_later_counts(desk: Desk) -> None:
    """Two sessions tell of it at nearly the same time."""
    assert put(desk, kind="quota", until_us=desk.now + HOUR_US)
    assert not put(desk, kind="quota", until_us=desk.now + HOUR_US // 2, reason="another")
    assert put(desk, kind="quota", until_us=desk.now + 2 * HOUR_US)
    (hold,) = found(desk)
    assert hold.until_us == desk.now + 2 * HOUR_US
    assert [event.kind for event in told(desk)] == ["orchestrator_quota"] * 2


def test_a_pause_and_a_quota_are_two_holds(desk: Desk) -> None:
    """The end of one leaves the other."""
    put(desk)
    put(desk, kind="quota", until_us=desk.now + HOUR_US)
    assert [hold.kind for hold in found(desk)] == ["pause", "quota"]
    assert lift(desk)
    assert [hold.kind for hold in found(desk)] == ["quota"]


def test_what_ends_by_itself_is_ended_by_the_next_who_looks(desk: Desk) -> None:
    """To the microsecond, told once, and only that."""
    put(desk)
    put(desk, kind="quota", until_us=desk.now + HOUR_US)
    assert desk.store.read_sync(holds.next_end) == desk.now + HOUR_US
    desk.clock.advance(3_599.999999)
    assert desk.store.write_sync(lambda c: holds.ended(c, desk.now)) == []
    desk.clock.advance(0.000001)
    (over,) = desk.store.write_sync(lambda c: holds.ended(c, desk.now))
    assert over.kind == "quota"
    assert desk.store.write_sync(lambda c: holds.ended(c, desk.now)) == []
    assert desk.store.read_sync(holds.next_end) is None
    last = told(desk)[-1]
    assert (last.kind, last.actor, last.data) == ("orchestrator_resumed", "system", {"kind": "quota"})


def test_a_hold_that_is_over_is_none_even_before_somebody_takes_it_away(desk: Desk) -> None:
    """It is not listed, a new one begins anew, and lifting it is no change."""
    put(desk, until_us=desk.now + 1)
    desk.clock.advance(1)
    assert holds.in_force(found(desk), desk.now) == []
    assert desk.store.read_sync(lambda c: holds.find_all(c, desk.now)) == {}
    assert not lift(desk)
    put(desk, until_us=desk.now + 1)
    desk.clock.advance(1)
    assert put(desk, until_us=desk.now + 1)
    assert list(desk.store.read_sync(lambda c: holds.find_all(c, desk.now))) == ["vp-a"]


def test_a_quota_that_somebody_lifts_frees_what_met_it(desk: Desk) -> None:
    """Those tasks wait for the quota, and not for the moment that was told."""
    desk.run()
    grant = desk.run("met it")
    desk.finish(grant, "quota", until_us=desk.now + HOUR_US)
    other = desk.run("of another", orchestrator="vp-b")
    desk.finish(other, "quota", until_us=desk.now + HOUR_US)
    assert lift(desk, kind="quota")
    assert [one.task.id for one in desk.claim()] == [grant.task.id]
    assert desk.get(other.task).status == "BLOCKED"
