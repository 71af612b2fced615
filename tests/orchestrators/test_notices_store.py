"""Notices on both stores: kept, told once, forgotten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from desk import Desk

from orchestrator_fleet.orchestrators import notices
from orchestrator_fleet.store import outbox


def tell(desk: Desk, text: str = "hello", *, orchestrator: str = "vp-a", kind: str = "delegation_pending") -> str:
    return desk.store.write_sync(
        lambda c: notices.tell(
            c, orchestrator=orchestrator, kind=kind, data={"text": text}, actor="k-1", now_us=desk.now
        )
    )


def waiting(desk: Desk, orchestrator: str = "vp-a", *, limit: int = 100, after: int = 0) -> list[notices.Notice]:
    return list(
        desk.store.read_sync(lambda c: notices.waiting(c, orchestrator, limit=limit, now_us=desk.now, after=after))
    )


def delivered(desk: Desk, *ids: str, orchestrator: str = "vp-a") -> list[str]:
    return list(
        desk.store.write_sync(lambda c: notices.delivered(c, orchestrator, ids, actor="daemon:x", now_us=desk.now))
    )


def forget(desk: Desk) -> int:
    return desk.store.write_sync(lambda c: notices.forget(c, now_us=desk.now))


def events(desk: Desk) -> list[tuple[str, str, str, Any]]:
    found = desk.store.read_sync(lambda c: outbox.read_after(c, 0))
    return [(one.kind, one.actor, one.orchestrator or "", one.data["notice"]) for one in found]


def test_what_waits_comes_in_order_in_pages(desk: Desk) -> None:
    """Of one orchestrator alone, oldest first; each has its event."""
    told = [tell(desk, str(n)) for n in range(5)]
    other = tell(desk, orchestrator="vp-b")
    first = waiting(desk, limit=3)
    rest = waiting(desk, after=first[-1].seq)
    assert [one.id for one in (*first, *rest)] == told
    assert [one.data["text"] for one in first] == ["0", "1", "2"]
    assert [one.id for one in waiting(desk, "vp-b")] == [other]
    assert desk.store.read_sync(lambda c: notices.count_waiting(c, "vp-a", now_us=desk.now)) == 5
    assert events(desk) == [("notice_kept", "k-1", "vp-a", one) for one in told] + [
        ("notice_kept", "k-1", "vp-b", other)
    ]


def test_a_notice_is_news_once(desk: Desk) -> None:
    """Said twice, by another, or of what never was: nothing happens, and no event is written."""
    first, second = tell(desk), tell(desk)
    assert delivered(desk, second, first, second, "ntc-none", "\0") == [first, second]
    assert delivered(desk, first, second) == []
    assert delivered(desk) == []
    third = tell(desk)
    assert delivered(desk, third, orchestrator="vp-b") == []
    assert [one.id for one in waiting(desk)] == [third]
    said = [one for one in events(desk) if one[0] == "notice_delivered"]
    assert said == [("notice_delivered", "daemon:x", "vp-a", one) for one in (first, second)]


def test_nobody_takes_it_for_a_week(desk: Desk) -> None:
    """It is told no more, and an event says so; what was delivered goes a day later, in silence."""
    lost, taken = tell(desk), tell(desk)
    assert delivered(desk, taken) == [taken]
    assert forget(desk) == 0
    desk.clock.advance(notices.DELIVERED_KEPT_S)
    assert (forget(desk), forget(desk)) == (1, 0)
    assert [one.id for one in waiting(desk)] == [lost]
    desk.clock.advance(notices.KEPT_S - notices.DELIVERED_KEPT_S - 1)
    assert [one.id for one in waiting(desk)] == [lost]
    desk.clock.advance(1)
    assert waiting(desk) == []
    assert delivered(desk, lost) == []
    assert (forget(desk), forget(desk)) == (1, 0)
    assert events(desk)[-1] == ("notice_expired", "system", "vp-a", lost)
    assert [one[3] for one in events(desk) if one[0] == "notice_expired"] == [lost]


def test_forgetting_is_bounded(desk: Desk) -> None:
    """Others get their turn in between."""
    many = notices.MAX_FORGOTTEN + 3

    def tell_all(conn: Any) -> None:
        for _ in range(many):
            notices.tell(conn, orchestrator="vp-a", kind="k", data={}, actor="k-1", now_us=desk.now)

    desk.store.write_sync(tell_all)
    desk.clock.advance(notices.KEPT_S)
    assert (forget(desk), forget(desk), forget(desk)) == (notices.MAX_FORGOTTEN, 3, 0)


def test_two_who_say_it_at_once_are_told_apart(desk: Desk) -> None:
    """A link and a poller have the same notices: each is news to one of them."""
    told = [tell(desk, str(n)) for n in range(40)]
    with ThreadPoolExecutor(4) as threads:
        orders = [told, told[::-1], told[20:] + told[:20], told]
        found = [one for got in threads.map(lambda ids: delivered(desk, *ids), orders) for one in got]
    assert sorted(found) == sorted(told)
    assert len([one for one in events(desk) if one[0] == "notice_delivered"]) == 40
