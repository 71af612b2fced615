"""The table of statuses, exhaustively: what is legal sets all that goes with it, what is not is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

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
    if status == "TODO":
        row = msgspec.structs.replace(row, parked_by="per-repo=r")
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
        task,
        token="x",
        lease_until_us=NOW + 5,
        machine="m",
        generation="g",
        charter_version="c",
        counts_on=[["per-repo", "r"]],
        now_us=NOW,
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
    "waits_for_quota": (lambda t: transitions.waits_for_quota(t, NOW + 9, "why"), "BLOCKED", {"IN_PROGRESS"}),
    "waits_for_budget": (
        lambda t: transitions.waits_for_budget(t, NOW + 9, "why"),
        "BLOCKED",
        {"TODO", "IN_PROGRESS"},
    ),
    "unblocked": (lambda t: transitions.unblocked(t, now_us=NOW), "TODO", {"BLOCKED"}),
    "approved": (lambda t: transitions.approved(t, now_us=NOW), "TODO", set()),
    "ripened": (lambda t: transitions.ripened(t, now_us=NOW), "TODO", {"TODO"}),
}


@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=30))
def test_whatever_happens_to_a_task_its_times_and_reasons_stay_right(names: list[str]) -> None:
    """Every walk along the table, approvals and moments that come included, keeps to what the schema demands."""
    row = _task("TODO")
    for name in names:
        make = CHANGES[name][0]
        before = row
        try:
            row = _after(row, make(row))
        except InvalidTransition:
            continue
        assert row.status in (*LEGAL[before.status], before.status)
        assert (row.status == "BLOCKED") == (row.blocked_reason is not None)
        assert (row.status in ("DONE", "CANCELLED")) == (row.completed_at_us is not None)
        assert (row.status == "IN_PROGRESS") == (row.token is not None) == (row.lease_until_us is not None)
        assert (row.started_at_us is not None) == (row.attempt > 0)
        assert before.started_at_us in (None, row.started_at_us)
        assert row.status == "TODO" or (row.wakes_at_us, row.parked_by) == (None, None)
        assert row.status == "IN_PROGRESS" or row.counts_on is None
        assert row.ripens_at_us is None or row.status == "TODO" or row.blocked_reason in ("quota", "budget")
        assert 0 <= row.failures <= row.attempt


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_taken_from_its_statuses_and_refused_from_all_others(name: str, status: str) -> None:
    """And after it the row is whole: lease, reason, times and counts are there exactly where the status has them."""
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
    ripens_by_itself = after.blocked_reason in ("quota", "budget")
    assert to == "TODO" or after.wakes_at_us is None
    assert to == "TODO" or (after.ripens_at_us is not None) == ripens_by_itself
    assert (after.counts_on is not None) == (to == "IN_PROGRESS")
    assert after.parked_by == ("per-repo=r" if name == "ripened" else None)
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


def test_an_approval_lets_a_task_past_a_spent_budget() -> None:
    """From then on, and only if it was the budget that held it; what waits for nobody is not approved."""
    over = _after(row := _task("BLOCKED", blocked_reason="budget"), transitions.approved(row, now_us=NOW))
    assert (over.status, over.over_budget) == ("TODO", True)
    assert _after(over, _claimed(over)).over_budget
    asked = _task("BLOCKED", blocked_reason="approval")
    assert not _after(asked, transitions.approved(asked, now_us=NOW)).over_budget
    with pytest.raises(InvalidTransition, match="BLOCKED/quota"):
        transitions.approved(_task("BLOCKED", blocked_reason="quota"), now_us=NOW)


@pytest.mark.parametrize("reason", ["quota", "budget"])
def test_what_waits_for_quota_or_budget_is_todo_again_when_that_has_room(reason: str) -> None:
    """No try was spent, its place is that of its waiting, and no other reason ends by time."""
    row = _task("BLOCKED", blocked_reason=reason, waiting_since_us=7, attempt=2, failures=1, ripens_at_us=NOW)
    after = _after(row, transitions.ripened(row, now_us=NOW))
    assert (after.status, after.blocked_reason, after.condition) == ("TODO", None, None)
    assert (after.waiting_since_us, after.attempt, after.failures) == (7, 2, 1)
    for other in ("manual", "approval", "dependency", "escalation", "attempts_exhausted"):
        with pytest.raises(InvalidTransition):
            transitions.ripened(_task("BLOCKED", blocked_reason=other), now_us=NOW)


def test_quota_spends_no_try() -> None:
    """It is the provider that said no, and nothing that the task did."""
    change = transitions.waits_for_quota(_task("IN_PROGRESS"), NOW + 9, "x" * 10_000)
    assert "failures" not in change.values
    assert "error" not in change.values
    assert len(change.values["condition"]) == 4_000


def test_a_budget_without_an_end_waits_for_somebody() -> None:
    """Nothing ripens then."""
    assert transitions.waits_for_budget(_task("TODO"), None, "why").values["ripens_at_us"] is None


def test_the_first_start_is_kept_over_later_claims() -> None:
    """started_at is when work began, not when it began again."""
    assert _claimed(_task("TODO", started_at_us=5)).values["started_at_us"] == 5


def test_an_edit_can_not_touch_what_a_transition_owns() -> None:
    """A status never changes by the way; and a parked task stands in line again, as its limits may be others now."""
    with pytest.raises(ValueError, match="status"):
        transitions.edited(status="DONE", title="x")
    assert transitions.edited(title="x").values == {"title": "x", "parked_by": None}


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
