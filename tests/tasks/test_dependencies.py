"""What waits for what."""

from __future__ import annotations

import pytest
from desk import Desk

from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.tasks import life


def test_a_task_waits_until_the_last_of_its_dependencies_is_done(desk: Desk) -> None:
    """And is TODO in the transaction that completes it."""
    first, second = desk.make("1"), desk.make("2")
    task = desk.make("3", depends_on=(first.id, second.id))
    assert (task.status, task.blocked_reason) == ("BLOCKED", "dependency")
    assert first.id in (task.condition or "")
    for _ in range(2):
        assert desk.get(task).status == "BLOCKED"
        (grant,) = desk.claim()
        desk.finish(grant)
    after = desk.get(task)
    assert (after.status, after.condition, after.waiting_since_us) == ("TODO", None, desk.now)
    assert desk.kinds(task) == ["task_created", "task_blocked", "task_unblocked"]
    assert desk.claim()[0].task.id == task.id


def test_done_dependencies_do_not_block(desk: Desk) -> None:
    """Nor does one named twice."""
    done = desk.finish(desk.run())
    task = desk.make(depends_on=(done.id, done.id))
    assert (task.status, task.depends_on) == ("TODO", [done.id])


def test_a_cancelled_dependency_blocks_with_its_own_message_until_a_person_decides(desk: Desk) -> None:
    """Unblocking waives it."""
    first, second = desk.make("1"), desk.make("2")
    task = desk.make("3", depends_on=(first.id, second.id))
    desk.cancel(first)
    blocked = desk.get(task)
    assert blocked.condition == f"waits for {first.id}, which was cancelled; unblock it, or cancel it too"
    with pytest.raises(Conflict, match=second.id) as refused:
        desk.unblock(task)
    assert refused.value.code == "dependency_unmet"
    desk.cancel(second)
    free = desk.unblock(task)
    assert (free.status, free.depends_on) == ("TODO", [])
    assert desk.make(depends_on=(first.id,)).condition == blocked.condition


def test_an_edit_of_dependencies_blocks_and_frees(desk: Desk) -> None:
    """As creation and completion do."""
    first, task = desk.make("1"), desk.make("2")
    assert desk.update(task, depends_on=[first.id]).status == "BLOCKED"
    assert desk.update(task, depends_on=[]).status == "TODO"
    desk.update(task, depends_on=[first.id])
    (grant,) = desk.claim()
    with pytest.raises(Conflict) as refused:
        desk.update(first, depends_on=[task.id])
    assert refused.value.code == "in_progress"
    desk.finish(grant)
    assert desk.get(task).status == "TODO"


def test_a_cycle_is_refused_with_its_path_and_nothing_changes(desk: Desk) -> None:
    """However long, and a task can't wait for itself."""
    a = desk.make("a")
    b = desk.make("b", depends_on=(a.id,))
    c = desk.make("c", depends_on=(b.id,))
    with pytest.raises(Conflict) as refused:
        desk.update(a, depends_on=[c.id])
    assert refused.value.code == "dependency_cycle"
    assert f"{a.id} -> {c.id} -> {b.id} -> {a.id}" in str(refused.value)
    with pytest.raises(Conflict, match=f"{a.id} -> {a.id}"):
        desk.update(a, depends_on=[a.id])
    assert desk.get(a) == a


def test_a_purge_of_what_another_needs_is_refused(desk: Desk) -> None:
    """The edge would hang in the air."""
    done = desk.finish(desk.run())
    desk.make(depends_on=(done.id,))
    with pytest.raises(Conflict) as refused:
        desk._write(life.purge, task_id=done.id)
    assert refused.value.code == "needed"
