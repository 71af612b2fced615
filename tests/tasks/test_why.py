"""Why a task does not run: every kind of hold, which of several counts, the place in line, the estimate."""

from __future__ import annotations

from typing import Any

import pytest
from desk import Desk

from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.errors import NotFound
from orchestrator_fleet.spec.expressions import compile_cel
from orchestrator_fleet.spec.hours import parse_hours
from orchestrator_fleet.tasks import holds, life, spending, why
from orchestrator_fleet.tasks.rules import Budget, Hours, Limit, OrchestratorRules, Rules
from orchestrator_fleet.tasks.task import TaskRow
from orchestrator_fleet.tasks.why import Around, Hold, Why
from orchestrator_fleet.wire.link import Usage

HOUR_S = 3600
THERE = Around(machine="m1")
REPO = Limit(name="one-per-repo", key=compile_cel("task.metadata.repo"), max_running=1)


def asked(desk: Desk, task: TaskRow, *, rules: Rules | None = None, around: Around = THERE) -> Why:
    """Why, of a desk whose daemons are there unless told otherwise."""
    here = {"vp-a": around, "vp-b": around}
    return desk.store.read_sync(lambda c: why.look(c, task.id, rules=rules or Rules(), around=here, now_us=desk.now))


def kinds(answer: Why) -> list[str]:
    """The holds, the binding one first."""
    assert answer.binding.kind == answer.holds[0].kind
    return [hold.kind for hold in answer.holds]


def of(**declared: Any) -> Rules:
    """Rules of vp-a."""
    return Rules(orchestrators={"vp-a": OrchestratorRules(**declared)})


def block(desk: Desk, task: TaskRow, reason: Any, said: str | None = None) -> TaskRow:
    """Block it with a reason."""
    changed = desk.store.write_sync(
        lambda c: life.block(c, task_id=task.id, blocked_reason=reason, reason=said, actor="k-test", now_us=desk.now)
    )
    return changed.task


def pause(desk: Desk, *, kind: Any = "pause", until_us: int | None = None) -> None:
    """Hold vp-a."""
    desk.store.write_sync(
        lambda c: holds.put(
            c, orchestrator="vp-a", kind=kind, by="k-test", reason="a holiday", until_us=until_us, now_us=desk.now
        )
    )


def test_a_task_alone_is_the_next_and_may_start_now(desk: Desk) -> None:
    """Nothing holds it; the estimate needs no history for that."""
    answer = asked(desk, desk.make())
    assert (answer.binding.kind, answer.holds) == ("next", [])
    assert answer.place is not None
    assert (answer.place.ahead, answer.place.of) == (0, 1)
    assert answer.starts_at_us == desk.now


def test_a_place_in_line_is_the_claims_own_order(desk: Desk) -> None:
    """How many come before it, of how many; the same order as the claims'."""
    low, high, due = (
        desk.make(priority="LOW"),
        desk.make(priority="HIGH"),
        desk.make(due_at_us=desk.now + HOUR_S * SECOND_US),
    )
    places = {task.id: asked(desk, task).place for task in (low, high, due)}
    assert [(one.ahead, one.of) for one in places.values() if one] == [(2, 3), (0, 3), (1, 3)]
    assert asked(desk, low).binding.kind == "in_line"
    claimed = [grant.task.id for grant in desk.claim(limit=3)]
    assert claimed == sorted(places, key=lambda task: places[task].ahead if places[task] else -1)


def test_a_running_task_says_where_and_an_ended_one_since_when(desk: Desk) -> None:
    """Such a task has no holds, no place and no estimate."""
    grant = desk.run()
    running = asked(desk, grant.task)
    assert running.binding.kind == "running"
    assert running.binding.evidence["machine"] == "m1"
    assert running.binding.evidence["lease_expires_at"] == to_rfc3339(grant.lease_until_us)
    assert (running.holds, running.place, running.starts_at_us) == ((), None, None)
    done = desk.finish(grant)
    assert asked(desk, done).binding.kind == "done"
    cancelled = desk.make()
    desk.cancel(cancelled)
    assert asked(desk, cancelled).binding.evidence["completed_at"] == to_rfc3339(desk.now)


def test_a_dependency_is_named_with_its_status(desk: Desk) -> None:
    """Only those that are not done; a cancelled one needs somebody, so there is no estimate either way."""
    done, first, second = desk.run("done"), desk.make("first"), desk.make("second")
    desk.finish(done)
    task = desk.make(depends_on=(done.task.id, first.id, second.id))
    answer = asked(desk, task)
    assert kinds(answer) == ["dependency"]
    assert sorted(answer.binding.evidence["waits_for"], key=lambda one: str(one["title"])) == [
        {"id": first.id, "status": "TODO", "title": "first"},
        {"id": second.id, "status": "TODO", "title": "second"},
    ]
    assert answer.starts_at_us is None
    desk.cancel(first)
    assert asked(desk, task).binding.evidence["cancelled"]


@pytest.mark.parametrize("reason", ["approval", "escalation", "manual"])
def test_what_waits_for_somebody_says_what_to_do(desk: Desk, reason: str) -> None:
    """The condition that was given, and the cure."""
    answer = asked(desk, block(desk, desk.make(), reason, "the lawyers look at it"))
    assert kinds(answer) == [reason]
    assert answer.binding.reason.startswith("the lawyers look at it; ")


def test_spent_attempts_show_the_last_error(desk: Desk) -> None:
    """And how many there were."""
    task = desk.finish(desk.run(), "failed_for_good", error="no such repo")
    answer = asked(desk, task)
    assert kinds(answer) == ["attempts_exhausted"]
    assert answer.binding.evidence["error"]["message"] == "no such repo"


def test_a_task_that_nobody_gets_has_no_route(desk: Desk) -> None:
    """Whether no rule takes it, or whoever had it is not declared any more."""
    assert kinds(asked(desk, desk.make(orchestrator=None))) == ["no_route"]
    gone = asked(desk, desk.make(), around=Around(declared=False))
    assert kinds(gone) == ["no_route"]
    assert "vp-a is not declared" in gone.binding.reason


def test_a_time_to_come_is_told_and_so_is_a_backoff(desk: Desk) -> None:
    """With its moment; the estimate is not before it."""
    later = desk.now + HOUR_S * SECOND_US
    answer = asked(desk, desk.make(available_at_us=later))
    assert kinds(answer) == ["not_yet"]
    assert (answer.binding.until_us, answer.place) == (later, None)
    assert answer.starts_at_us == later
    failed = desk.finish(desk.run(), "failed", error="flaky")
    assert "tried again" in asked(desk, failed).binding.reason


def test_a_task_whose_moment_has_come_stands_in_line_before_any_claim(desk: Desk) -> None:
    """Nobody has noticed yet, and nothing holds it any more."""
    task = desk.make(available_at_us=desk.now + SECOND_US)
    desk.clock.advance(2)
    answer = asked(desk, task)
    assert answer.binding.kind == "next"
    assert answer.place is not None
    assert (answer.place.ahead, answer.place.of) == (0, 1)


def test_pause_quota_and_hours_hold_as_they_do_at_the_claim(desk: Desk) -> None:
    """Each by itself; a CRITICAL task passes outside of hours."""
    task, urgent = desk.make(), desk.make(priority="CRITICAL")
    closed = of(hours=Hours(timezone="UTC", windows=parse_hours("Mon-Fri 08:00-18:00"), text="Mon-Fri 08:00-18:00"))
    assert kinds(asked(desk, task, rules=closed)) == ["schedule"]
    assert asked(desk, urgent, rules=closed).holds == []
    pause(desk, kind="quota", until_us=desk.now + 60 * SECOND_US)
    assert kinds(asked(desk, task)) == ["quota"]
    pause(desk)
    answer = asked(desk, task)
    assert kinds(answer) == ["pause", "quota"]
    assert "a holiday" in answer.binding.reason


def test_a_spent_budget_holds_unless_somebody_approved_it(desk: Desk) -> None:
    """With `escalate`, the approved one passes."""
    usage = Usage(input_tokens=10, output_tokens=0, cache_read_tokens=0, cache_write_tokens=0, usd=5.0)
    desk.store.write_sync(lambda c: spending.settle_all(c, [("vp-a", usage)], now_us=desk.now))
    rules = of(budget=Budget(usd_per_day=1.0, on_breach="escalate"))
    task = desk.make()
    assert kinds(asked(desk, task, rules=rules)) == ["budget"]
    waits = block(desk, task, "budget", "over")
    approved = desk.store.write_sync(
        lambda c: life.approve(c, task_id=waits.id, reason=None, actor="k-test", now_us=desk.now)
    )
    assert asked(desk, approved, rules=rules).holds == []


def test_taken_sessions_and_a_taken_machine_hold(desk: Desk) -> None:
    """And the estimate says when one is free, by the pace of the last attempts."""
    for _ in range(2):
        grant = desk.run()
        desk.clock.advance(30)
        desk.finish(grant)
    desk.run()
    rules = of(sessions_max=1)
    answer = asked(desk, desk.make(), rules=rules)
    assert kinds(answer) == ["sessions"]
    assert answer.starts_at_us == desk.now + 30 * SECOND_US
    assert why.to_json(answer)["estimate"]["based_on"] == {
        "mean_run_s": 30.0,
        "attempts": 2,
        "slots": 1,
        "running": 1,
        "ahead": 0,
    }
    second = asked(desk, desk.make(priority="LOW"), rules=rules)
    assert second.starts_at_us == desk.now + 60 * SECOND_US
    assert kinds(asked(desk, desk.make(), rules=Rules(sessions_on={"m1": 1}))) == ["machine"]


def test_no_estimate_is_made_up(desk: Desk) -> None:
    """Without a finished attempt there is nothing to go by."""
    desk.run()
    answer = asked(desk, desk.make(), rules=of(sessions_max=1))
    assert answer.starts_at_us is None
    assert why.to_json(answer)["estimate"] is None


def test_a_full_limit_names_who_holds_it(desk: Desk) -> None:
    """Before a claim has parked the task, and after; who waits there before it is counted."""
    rules = Rules(limits=(REPO,))
    desk.make("holder", metadata={"repo": "acme"})
    (holder,) = desk.claim(rules=rules)
    waiting = [desk.make(metadata={"repo": "acme"}, priority=priority) for priority in ("MEDIUM", "LOW")]
    other = desk.make(metadata={"repo": "other"})
    (before,) = asked(desk, waiting[1], rules=rules).holds
    assert (before.kind, before.evidence["running"], before.evidence["ahead"]) == ("limit", [holder.task.id], None)
    assert asked(desk, other, rules=rules).holds == []
    desk.claim(rules=rules, limit=5)
    after = asked(desk, waiting[1], rules=rules)
    assert kinds(after) == ["limit"]
    assert (after.binding.evidence["limit"], after.binding.evidence["value"]) == ("one-per-repo", "acme")
    assert (after.binding.evidence["ahead"], after.place) == (1, None)
    desk.finish(holder)


def test_a_limit_by_the_minute_says_when_it_opens(desk: Desk) -> None:
    """A minute after the oldest start that counts."""
    rules = Rules(limits=(Limit(name="slow", key=compile_cel("'all'"), max_per_minute=1),))
    desk.make()
    desk.claim(rules=rules)
    began = desk.now
    desk.clock.advance(10)
    answer = asked(desk, desk.make(), rules=rules)
    assert kinds(answer) == ["limit"]
    assert answer.binding.until_us == answer.starts_at_us == began + 60 * SECOND_US


def test_nobody_there_is_told_unless_a_client_works_for_it(desk: Desk) -> None:
    """A running attempt of a client over HTTP shows that somebody polls."""
    away = Around(machine="m1", offline="its daemon has never connected")
    task = desk.make()
    assert kinds(asked(desk, task, around=away)) == ["offline"]
    desk.make(priority="HIGH")
    desk.claim(machine="")
    assert asked(desk, task, around=away).holds == []


def test_of_several_holds_the_one_that_lasts_counts(desk: Desk) -> None:
    """Somebody's act, something else, time (the latest first), other work."""
    soon, later = desk.now + 60 * SECOND_US, desk.now + HOUR_S * SECOND_US
    pause(desk, until_us=soon)
    pause(desk, kind="quota", until_us=later)
    desk.run(orchestrator="vp-b")
    away = Around(machine="m1", offline="silent")
    task = desk.make(available_at_us=desk.now + 120 * SECOND_US)
    rules = Rules(sessions_on={"m1": 1})
    assert kinds(asked(desk, task, rules=rules)) == ["quota", "not_yet", "pause", "machine"]
    assert kinds(asked(desk, task, rules=rules, around=away)) == ["offline", "quota", "not_yet", "pause", "machine"]
    pause(desk)
    assert asked(desk, task, rules=rules, around=away).binding.kind == "pause"
    assert asked(desk, block(desk, task, "approval"), rules=rules).binding.kind == "approval"


def test_an_answer_is_json_with_every_hold(desk: Desk) -> None:
    """What the API shows."""
    shown = why.to_json(asked(desk, desk.make(available_at_us=desk.now + SECOND_US)))
    assert shown["binding"] == shown["holds"][0]
    assert shown["binding"]["kind"] == "not_yet"
    assert shown["binding"]["until"] == to_rfc3339(desk.now + SECOND_US)
    assert shown["place_in_line"] is None


def test_a_task_that_is_not_there_is_not_found(desk: Desk) -> None:
    """As everywhere."""
    task = desk.make()
    desk.cancel(task)
    desk.store.write_sync(lambda c: life.purge(c, task_id=task.id, actor="k-test", now_us=desk.now))
    with pytest.raises(NotFound):
        asked(desk, task)


def test_a_hold_without_an_end_of_its_own_is_somebodys_to_end() -> None:
    """So a budget that only an approval passes comes before one that time gives room."""
    forever, awhile = Hold(kind="budget", reason=""), Hold(kind="budget", reason="", until_us=5)
    assert sorted([awhile, forever], key=why._lasts) == [forever, awhile]
