"""The log of what people did to orchestrators, and how what takes its time ends: on both stores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from desk import Desk

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.orchestrators import actions, pause
from orchestrator_fleet.orchestrators.actions import ABANDONED_S, Action
from orchestrator_fleet.store import outbox

ONLINE, AWAY = {"status": "ONLINE"}, {"status": "AWAY"}


def begin(desk: Desk, action: Any, orchestrator: str = "vp-a") -> Action:
    return desk.store.write_sync(
        lambda c: actions.begin(
            c,
            orchestrator=orchestrator,
            action=action,
            reason="because",
            actor="k-me",
            now_us=desk.now,
            before=ONLINE,
            after=AWAY,
        )
    )


def note(desk: Desk, action: Any, orchestrator: str = "vp-a") -> Action:
    return desk.store.write_sync(
        lambda c: actions.note(
            c,
            orchestrator=orchestrator,
            action=action,
            reason=None,
            actor="k-me",
            now_us=desk.now,
            before=ONLINE,
            after=AWAY,
            detail="it is so",
        )
    )


def end(desk: Desk, action: Action, outcome: Any = "done") -> Action:
    return desk.store.write_sync(
        lambda c: actions.end(c, action, outcome, detail="pid 1 -> 2", actor="k-me", now_us=desk.now)
    )


def settle(desk: Desk) -> list[tuple[str, str | None, str | None]]:
    due = desk.store.read_sync(lambda c: actions.any_to_settle(c, now_us=desk.now))
    settled = desk.store.write_sync(lambda c: actions.settle(c, now_us=desk.now))
    assert due == bool(settled)
    return [(one.action, one.outcome, one.detail) for one in settled]


def deactivate(desk: Desk, *, until_us: int | None = None, drain: bool = True) -> bool:
    return desk.store.write_sync(
        lambda c: pause.deactivate(
            c, orchestrator="vp-a", reason=None, until_us=until_us, drain=drain, actor="k-me", now_us=desk.now
        )
    )


def kinds(desk: Desk) -> list[tuple[str, str]]:
    events = desk.store.read_sync(lambda c: outbox.read_after(c, 0))
    return [(one.kind, one.actor) for one in events if one.kind in (actions.STARTED, actions.ENDED)]


def test_what_is_done_at_once_is_one_event_with_before_and_after(desk: Desk) -> None:
    """And one line of the log, that has ended."""
    done = note(desk, "pause")
    assert (done.outcome, done.ended_at_us) == ("done", done.at_us)
    (event,) = desk.store.read_sync(lambda c: outbox.read_after(c, 0))
    assert (event.kind, event.orchestrator, event.actor) == ("action_ended", "vp-a", "k-me")
    shown = actions.to_json(done)
    by = shown.pop("by")
    assert event.data == {**shown, "asked_by": by, "before": ONLINE, "after": AWAY}
    assert (event.data["duration_s"], event.data["state"]) == (0.0, "done")


def test_what_takes_its_time_begins_and_ends_each_with_its_event(desk: Desk) -> None:
    """With how long it took."""
    begun = begin(desk, "restart")
    assert actions.to_json(begun)["state"] == "running"
    assert desk.store.read_sync(lambda c: actions.open_of(c, ["vp-a", "vp-b"])) == [begun]
    desk.clock.advance(2.5)
    ended = actions.to_json(end(desk, begun, "failed"))
    assert (ended["duration_s"], ended["outcome"], ended["detail"]) == (2.5, "failed", "pid 1 -> 2")
    assert kinds(desk) == [("action_started", "k-me"), ("action_ended", "k-me")]
    assert desk.store.read_sync(actions.all_open) == []


def test_one_of_a_kind_goes_on_for_an_orchestrator(desk: Desk) -> None:
    """The others are told which; another kind, or another orchestrator, is free."""
    begun = begin(desk, "restart")
    with pytest.raises(Conflict, match=begun.id) as refused:
        begin(desk, "restart")
    assert refused.value.code == "in_progress"
    begin(desk, "drain")
    begin(desk, "restart", "vp-b")
    end(desk, begun)
    begin(desk, "restart")


def test_of_many_at_once_one_goes_on(desk: Desk) -> None:
    """Whoever was first."""

    def attempt(_: int) -> bool:
        try:
            begin(desk, "restart")
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_it_ends_once(desk: Desk) -> None:
    """Who comes second is told how it ended."""
    begun = begin(desk, "restart")
    first = end(desk, begun)
    assert end(desk, begun, "failed") == first
    assert [kind for kind, _ in kinds(desk)] == ["action_started", "action_ended"]


def test_a_drain_ends_with_the_last_session(desk: Desk) -> None:
    """Not sooner."""
    grant = desk.run()
    deactivate(desk)
    begin(desk, "drain")
    assert settle(desk) == []
    desk.clock.advance(7)
    desk.finish(grant)
    assert settle(desk) == [("drain", "done", "its last session has ended")]
    assert kinds(desk)[-1] == ("action_ended", "system")
    assert settle(desk) == []


def test_a_drain_whose_pause_ends_first_has_failed(desk: Desk) -> None:
    """Activated by somebody, or over by itself."""
    desk.run()
    deactivate(desk)
    begun = begin(desk, "drain")
    desk.store.write_sync(lambda c: actions.activated(c, "vp-a", actor="k-you", now_us=desk.now))
    ended = desk.store.read_sync(lambda c: actions.find(c, begun.id))
    assert ended is not None
    assert (ended.outcome, ended.detail) == ("failed", "it was activated before its last session ended")
    deactivate(desk, until_us=desk.now + 5 * SECOND_US)
    begin(desk, "drain")
    assert settle(desk) == []
    desk.clock.advance(6)
    assert settle(desk) == [("drain", "failed", "its pause ended before its last session")]


def test_a_restart_that_nobody_does_any_more_is_closed(desk: Desk) -> None:
    """At a start alone, whatever its age; else when it is too old. A drain needs nobody and goes on."""
    desk.run()
    deactivate(desk)
    begin(desk, "drain")
    begin(desk, "restart")
    assert settle(desk) == []
    left = desk.store.write_sync(lambda c: actions.abandon(c, now_us=desk.now))
    assert [(one.action, one.outcome, one.detail) for one in left] == [("restart", "failed", "the control plane ended")]
    begin(desk, "restart")
    desk.clock.advance(ABANDONED_S - 1)
    assert settle(desk) == []
    desk.clock.advance(1)
    assert settle(desk) == [("restart", "failed", "the control plane ended")]


def test_the_log_is_read_newest_first_page_by_page(desk: Desk) -> None:
    """No row twice or left out while others are written; by kind, too."""
    made = [note(desk, "pause" if n % 2 else "resume").id for n in range(5)]
    note(desk, "pause", "vp-b")

    def page(**asked: Any) -> actions.Page:
        return desk.store.read_sync(lambda c: actions.page(c, "vp-a", **asked))

    first = page(limit=2)
    note(desk, "pause")
    second = page(limit=2, before_seq=first.next_seq)
    third = page(limit=2, before_seq=second.next_seq)
    assert [one.id for one in (*first.rows, *second.rows, *third.rows)] == made[::-1]
    assert (first.total, third.next_seq) == (5, None)
    paused = page(limit=10, kinds=("pause",))
    assert ([one.action for one in paused.rows], paused.total) == (["pause"] * 3, 3)


def test_stopped_sessions_stand_in_line_again_and_lost_no_try(desk: Desk) -> None:
    """What ended, or is another's, is left; no pause comes of it."""
    grant, other = desk.run(), desk.run("other", orchestrator="vp-b")
    ended = desk.run("ended")
    desk.finish(ended)
    stopped = desk.store.write_sync(
        lambda c: pause.stop_sessions(c, orchestrator="vp-a", reason="too hot", actor="k-me", now_us=desk.now)
    )
    assert stopped == 1
    task = desk.get(grant.task)
    assert (task.status, task.failures) == ("TODO", 0)
    assert desk.events(task)[-1].data["reason"] == "the sessions of vp-a were stopped: too hot"
    assert desk.get(other.task).status == "IN_PROGRESS"
    assert desk.get(ended.task).status == "DONE"
    assert desk.claim()[0].task.id == task.id


def test_nothing_is_claimed_past_a_pause(desk: Desk) -> None:
    """Of claims and a pause at once: what the pause did not see run is claimed by nobody."""
    for n in range(20):
        desk.make(f"t{n}")
    with ThreadPoolExecutor(4) as pool:
        claims = [pool.submit(desk.claim, sessions_max=100) for _ in range(12)]
        pool.submit(deactivate, desk, drain=False).result()
        running = desk.store.read_sync(lambda c: pause.running(c, "vp-a"))
        assert running == []
        for claim in claims:
            claim.result()
    assert desk.store.read_sync(lambda c: pause.running(c, "vp-a")) == []
