"""A spent budget keeps its orchestrator from beginning anything: until there is room, or until somebody approves."""

from __future__ import annotations

from typing import Any

from asker import Asker, line, spec_of
from desk import Desk

from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.queries import Filters
from orchestrator_fleet.tasks.task import TaskRow
from orchestrator_fleet.wire.link import Usage

DAY_S = 86_400


def asker(desk: Desk, **budget: Any) -> Asker:
    """Claims for an orchestrator that has used its 10 dollars."""
    desk.finish(desk.run("dear"), usage=Usage(usd=10.0))
    return Asker(desk, spec_of({"budget": {"usd_per_day": 10, **budget}}))


def blocked(desk: Desk) -> list[TaskRow]:
    """What waits for the budget."""
    return [one for one in desk.page(filters=Filters(status=("BLOCKED",))).rows if one.blocked_reason == "budget"]


def approve(desk: Desk, task: TaskRow) -> TaskRow:
    """Let it pass."""
    return desk.store.write_sync(
        lambda c: life.approve(c, task_id=task.id, reason=None, actor="k-test", now_us=desk.now)
    )


def test_with_pause_nothing_begins_until_the_window_has_room(desk: Desk) -> None:
    """And the answer says what is spent, and when to ask again."""
    vp = asker(desk, on_breach="pause")
    line(desk, "a")
    nothing = vp.ask()
    assert nothing.grants == ()
    assert "10.00 of 10 dollars" in nothing.reason
    assert nothing.again_at_us is not None
    assert blocked(desk) == []
    desk.clock.advance(DAY_S + 60)
    assert vp.titles() == ["a"]


def test_with_escalate_what_would_begin_waits_to_be_approved(desk: Desk) -> None:
    """The others stay in line; the one that is approved passes them all."""
    vp = asker(desk, on_breach="escalate")
    line(desk, "a", "b", "c", "d")
    assert vp.titles(limit=2) == []
    assert sorted(task.title for task in blocked(desk)) == ["a", "b"]
    (b,) = [task for task in blocked(desk) if task.title == "b"]
    line(desk, "before all", priority="HIGH")
    assert approve(desk, b).status == "TODO"
    assert desk.kinds(b) == ["task_created", "task_blocked", "task_approved"]
    assert vp.titles() == ["b"]
    assert sorted(task.title for task in blocked(desk)) == ["a", "before all"]


def test_what_waits_for_a_budget_is_in_line_again_when_there_is_room(desk: Desk) -> None:
    """By itself, in its old place."""
    vp = asker(desk, on_breach="escalate")
    line(desk, "a", "b")
    assert vp.titles(limit=5) == []
    assert len(blocked(desk)) == 2
    desk.clock.advance(DAY_S + 60)
    assert vp.titles() == ["a"]
    assert [task.title for task in desk.page(filters=Filters(status=("TODO",))).rows] == ["b"]
