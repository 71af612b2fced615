"""The same done to many tasks: each by itself, a dry run without a trace."""

from __future__ import annotations

from typing import Any

import pytest
from desk import Desk

from orchestrator_fleet.tasks import bulk, queries


def test_many_changes_leave_nothing_of_the_one_that_is_refused(desk: Desk) -> None:
    """A dry run leaves nothing of any, not even an event."""
    tasks = [desk.make() for _ in range(3)]
    desk.cancel(tasks[1])

    def do(*, dry_run: bool) -> list[bulk.Result]:
        order = bulk.Order(action="cancel", reason="enough")
        return desk.store.write_sync(
            lambda c: bulk.do(
                c,
                [task.id for task in tasks],
                order,
                dispatch=desk.dispatch,
                actor="k-test",
                now_us=desk.now,
                dry_run=dry_run,
            )
        )

    before = [desk.kinds(task) for task in tasks]
    dry = do(dry_run=True)
    assert [desk.get(task).status for task in tasks] == ["TODO", "CANCELLED", "TODO"]
    assert [desk.kinds(task) for task in tasks] == before
    real = do(dry_run=False)
    assert [(one.id, one.changed, one.error is None) for one in dry] == [
        (one.id, one.changed, one.error is None) for one in real
    ]
    assert [one.error is None for one in real] == [True, False, True]
    assert desk.kinds(tasks[0]) == ["task_created", "task_cancelled"]
    assert desk.kinds(tasks[1]) == before[1]


def test_ids_of_a_filter_come_once_each_in_their_order(desk: Desk) -> None:
    """Behind the cursor, with how many there are."""
    ids = sorted(desk.make().id for _ in range(5))
    some, total = desk.store.read_sync(lambda c: queries.ids_of(c, filters=queries.Filters(), limit=2))
    assert (some, total) == (ids[:2], 5)
    rest, left = desk.store.read_sync(lambda c: queries.ids_of(c, filters=queries.Filters(), after=some[-1], limit=9))
    assert (rest, left) == (ids[2:], 3)


def test_what_no_longer_matches_is_left_alone(desk: Desk) -> None:
    """Between the look and the change somebody else may have been there."""
    filters = bulk.meant(queries.Filters(orchestrator=("vp-a",), status=("TODO",)), "cancel")
    kept, claimed = desk.make(priority="LOW"), desk.make()
    chosen = desk.store.read_sync(lambda c: bulk.choose(c, filters=filters))
    desk.claim()
    assert set(chosen.ids) == {kept.id, claimed.id}
    assert desk.store.read_sync(lambda c: queries.still_match(c, chosen.ids, filters=filters)) == [kept.id]


@pytest.mark.parametrize(("action", "means"), [("retry", {"BLOCKED"}), ("cancel", {"TODO", "IN_PROGRESS", "BLOCKED"})])
def test_a_filter_without_a_status_means_what_the_action_is_for(action: Any, means: set[str]) -> None:
    """One with a status means that."""
    assert set(bulk.meant(queries.Filters(), action).status) == means
    assert bulk.meant(queries.Filters(status=("DONE",)), action).status == ("DONE",)
