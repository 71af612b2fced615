"""The table of statuses, exhaustively: what is legal sets all that goes with it, what is not is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest

from orchestrator_fleet.errors import InvalidTransition
from orchestrator_fleet.store import schema
from orchestrator_fleet.tasks import transitions
from orchestrator_fleet.tasks.finish import REPORTED
from orchestrator_fleet.tasks.task import PRIORITIES, STATUSES, BlockedReason, NewTask, TaskRow
from orchestrator_fleet.tasks.transitions import LEGAL, Change, Failure

NOW = 1_000_000
FAILURE = Failure(outcome="failed", message="boom")


def _task(status: str, **fields: Any) -> TaskRow:
    """A row of that status, right in every other column."""
    row = transitions.created(
        NewTask(title="t"),
        task_id="task-1",
        actor="k",
        condition=None,
        waits_for_others=False,
        max_attempts=3,
        now_us=NOW - 10,
    )
    if status == "IN_PROGRESS":
        row = _after(row, _claimed(row))
    if status == "BLOCKED":
        row = _after(row, transitions.blocked(row, reason="manual", condition="why"))
    if status == "DONE":
        running = _task("IN_PROGRESS")
        row = _after(running, transitions.completed(running, result=None, now_us=NOW))
    if status == "CANCELLED":
        row = _after(row, transitions.cancelled(row, now_us=NOW))
    return msgspec.structs.replace(row, **fields)


def _claimed(task: TaskRow) -> Change:
    return transitions.claimed(
        task, token="x", lease_until_us=NOW + 5, machine="m", generation="g", charter_version="c", now_us=NOW
    )


def _after(task: TaskRow, change: Change) -> TaskRow:
    return msgspec.structs.replace(task, **change.values)


CHANGES: dict[str, tuple[Callable[[TaskRow], Change], str, set[str]]] = {
    "claimed": (_claimed, "IN_PROGRESS", {"TODO"}),
    "completed": (lambda t: transitions.completed(t, result=1, now_us=NOW), "DONE", {"IN_PROGRESS"}),
    "released": (lambda t: transitions.released(t, now_us=NOW), "TODO", {"IN_PROGRESS"}),
    "retried": (
        lambda t: transitions.retried(t, FAILURE, available_at_us=NOW + 9, now_us=NOW),
        "TODO",
        {"IN_PROGRESS"},
    ),
    "exhausted": (lambda t: transitions.exhausted(t, FAILURE), "BLOCKED", {"IN_PROGRESS"}),
    "cancelled": (lambda t: transitions.cancelled(t, now_us=NOW), "CANCELLED", {"TODO", "IN_PROGRESS", "BLOCKED"}),
    "blocked": (
        lambda t: transitions.blocked(t, reason="approval", condition="why"),
        "BLOCKED",
        {"TODO", "IN_PROGRESS"},
    ),
    "unblocked": (lambda t: transitions.unblocked(t, now_us=NOW), "TODO", {"BLOCKED"}),
    "ripened": (lambda t: transitions.ripened(t, now_us=NOW), "TODO", {"TODO"}),
}


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_taken_from_its_statuses_and_refused_from_all_others(name: str, status: str) -> None:
    """And after it the row is whole: lease, reason and times are there exactly where the status has them."""
    make, to, legal = CHANGES[name]
    task = _task(status)
    if status not in legal:
        with pytest.raises(InvalidTransition):
            make(task)
        return
    after = _after(task, make(task))
    assert after.status == to
    assert (after.token is not None, after.lease_until_us is not None) == (to == "IN_PROGRESS",) * 2
    assert (after.blocked_reason is not None) == (to == "BLOCKED")
    assert (after.completed_at_us is not None) == (to in ("DONE", "CANCELLED"))
    assert to == "TODO" or (after.wakes_at_us, after.ripens_at_us) == (None, None)
    assert to != "IN_PROGRESS" or after.started_at_us == NOW
    assert after.failures <= after.attempt


def test_the_changes_reach_exactly_the_edges_of_the_table() -> None:
    """No edge without a change that makes it, no change beyond the table."""
    reached = {(start, to) for _, to, legal in CHANGES.values() for start in legal if start != to}
    assert reached == {(start, to) for start, ends in LEGAL.items() for to in ends}


@pytest.mark.parametrize("status", STATUSES)
def test_a_refusal_names_the_legal_ones(status: str) -> None:
    """So that a caller knows what to ask for."""
    wrong = next(to for to in STATUSES if to not in LEGAL[status])
    with pytest.raises(InvalidTransition) as refused:
        transitions.check(_task(status), wrong)
    assert all(legal in str(refused.value) for legal in LEGAL[status])
    assert ("final" in str(refused.value)) == (status in ("DONE", "CANCELLED"))


def test_a_failed_try_counts_and_a_released_one_does_not() -> None:
    """Failures is what max_attempts is compared with."""
    task = _task("IN_PROGRESS")
    assert "failures" not in transitions.released(task, now_us=NOW).values
    retried = transitions.retried(task, FAILURE, available_at_us=NOW + 9, now_us=NOW).values
    assert (retried["failures"], retried["available_at_us"], retried["wakes_at_us"]) == (1, NOW + 9, NOW + 9)
    assert retried["error"] == {"message": "boom", "outcome": "failed", "retryable": True}


def test_a_redrive_gives_all_tries_back_and_another_unblocking_does_not() -> None:
    """attempts_exhausted is the only reason that spends them."""
    spent = _task("BLOCKED", blocked_reason="attempts_exhausted", attempt=3, failures=3)
    assert transitions.unblocked(spent, now_us=NOW).values["failures"] == 0
    waiting = _task("BLOCKED", blocked_reason="approval", attempt=3, failures=2)
    assert transitions.unblocked(waiting, now_us=NOW).values["failures"] == 2


def test_the_first_start_is_kept_over_later_claims() -> None:
    """started_at is when work began, not when it began again."""
    assert _claimed(_task("TODO", started_at_us=5)).values["started_at_us"] == 5


def test_an_edit_can_not_touch_what_a_transition_owns() -> None:
    """A status never changes by the way."""
    with pytest.raises(ValueError, match="status"):
        transitions.edited(status="DONE", title="x")
    assert transitions.edited(title="x").values == {"title": "x"}


def test_the_words_of_the_code_are_the_words_of_the_schema() -> None:
    """Statuses, priorities, reasons and outcomes: what one knows, the other takes."""
    assert (schema.TASK_STATUSES, schema.PRIORITIES) == (STATUSES, PRIORITIES)
    assert get_args(BlockedReason) == schema.BLOCKED_REASONS
    assert set(schema.OUTCOMES) == {*REPORTED, "lease_lost"}
    assert tuple(schema.tasks.c.keys()) == TaskRow.__struct_fields__


def test_a_long_error_is_cut() -> None:
    """A row stays small whatever a session says."""
    task = _task("IN_PROGRESS")
    change = transitions.exhausted(task, Failure(outcome="failed", message="x" * 10_000))
    assert len(change.values["error"]["message"]) == len(change.values["condition"]) == 4_000
