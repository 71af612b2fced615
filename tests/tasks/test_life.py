"""From creation to the end, one rule at a time."""

from __future__ import annotations

import threading

import pytest
from desk import RETRY, SPEC, Desk, held
from msgspec.structs import replace
from sqlalchemy import Connection

from orchestrator_fleet.errors import Conflict, Invalid, InvalidTransition, LeaseLost, NotFound
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.output import MAX_ATTEMPT_BYTES
from orchestrator_fleet.tasks.queries import Filters
from orchestrator_fleet.tasks.task import Held
from orchestrator_fleet.tasks.view import to_json
from orchestrator_fleet.wire.link import Usage


def test_a_task_is_routed_as_it_is_made(desk: Desk) -> None:
    """The rule stands in the row, and its orchestrator's tries too."""
    task = desk.make(orchestrator=None, discipline="sec", tags=("a", "b", "a"))
    assert (task.status, task.orchestrator, task.route, task.max_attempts) == ("TODO", "vp-b", "by-discipline", 5)
    assert task.tags == ["a", "b"]
    assert desk.get(task) == task
    (event,) = desk.events(task)
    assert (event.kind, event.actor, event.orchestrator, event.route) == (
        "task_created",
        "k-test",
        "vp-b",
        "by-discipline",
    )
    assert event.data["task"] == to_json(task)


def test_a_task_that_nobody_takes_is_kept_and_says_so(desk: Desk) -> None:
    """TODO, no orchestrator, a condition; and it is found when the rules change."""
    task = desk.make(orchestrator=None)
    assert (task.status, task.orchestrator, task.route) == ("TODO", None, None)
    assert "no routing rule matches" in (task.condition or "")
    assert to_json(task)["orchestrator"] is None
    assert [t.id for t in desk.page(filters=Filters(unrouted=True)).rows] == [task.id]
    rest = {"name": "rest", "to": {"orchestrator": "vp-a"}}
    desk.dispatch = Dispatch.of_spec({**SPEC, "routing": [rest]})
    (routed,) = desk.route_again()
    assert (routed.orchestrator, routed.route, routed.condition) == ("vp-a", "rest", None)
    assert desk.kinds(task) == ["task_created", "task_routed"]
    assert desk.route_again() == []


def test_the_least_loaded_gets_it_also_within_one_second(desk: Desk) -> None:
    """Load is counted on between two looks at the store."""
    vps = {f"vp-{n}": {"discipline": "x"} for n in "abc"}
    rule = {"name": "all", "to": {"discipline": "x"}}
    desk.dispatch = Dispatch.of_spec({"orchestrators": vps, "routing": [rule]})
    got = [desk.make(orchestrator=None).orchestrator for _ in range(6)]
    assert sorted(map(str, got)) == ["vp-a", "vp-a", "vp-b", "vp-b", "vp-c", "vp-c"]
    for name in ("vp-a", "vp-a", "vp-b"):
        (grant,) = desk.claim(name)
        desk.finish(grant)
    desk.clock.advance(3600)  # a look is good for a hundred times as long as it really took, on a slow machine too
    assert [desk.make(orchestrator=None).orchestrator for _ in range(3)] == ["vp-a", "vp-a", "vp-b"]


def test_turns_are_remembered_by_the_store(desk: Desk) -> None:
    """A restart goes on where it was."""
    vps = {f"vp-{n}": {"discipline": "x"} for n in "abc"}
    spec = {"orchestrators": vps, "routing": [{"name": "r", "to": {"discipline": "x"}, "strategy": "round-robin"}]}
    got = []
    for _ in range(4):
        desk.dispatch = Dispatch.of_spec(spec)
        got.append(desk.make(orchestrator=None).orchestrator)
    assert got == ["vp-a", "vp-b", "vp-c", "vp-a"]


def test_an_unknown_orchestrator_or_dependency_is_refused(desk: Desk) -> None:
    """Field by field."""
    with pytest.raises(Invalid, match="vp-none"):
        desk.make(orchestrator="vp-none")
    known = desk.make()
    with pytest.raises(Invalid) as refused:
        desk.make(depends_on=(known.id, "task-x", "task-y"))
    assert [field for field, _ in refused.value.errors] == ["depends_on[1]", "depends_on[2]"]
    assert desk.page().total == 1


def test_a_claim_gives_a_lease_a_token_and_a_number(desk: Desk) -> None:
    """And the attempt records what it runs under."""
    task = desk.make()
    (grant,) = desk.claim(generation="g7", charter_version="c7")
    row = desk.get(task)
    assert row == grant.task
    assert (row.status, row.attempt, row.token, row.machine) == ("IN_PROGRESS", 1, grant.token, "m1")
    assert row.lease_until_us == grant.lease_until_us == desk.now + 30_000_000
    assert (row.generation, row.charter_version, row.started_at_us) == ("g7", "c7", desk.now)
    (attempt,) = desk.attempts(task)
    assert (attempt["attempt"], attempt["holder"], attempt["generation"]) == (1, "boot/epoch", "g7")
    assert "token" not in attempt
    assert desk.claim() == []
    assert desk.kinds(task) == ["task_created", "task_claimed"]


def test_a_token_never_leaves_in_json_or_events(desk: Desk) -> None:
    """It is the holder's alone."""
    grant = desk.run()
    desk.finish(grant)
    assert grant.token not in repr(to_json(grant.task))
    assert grant.token not in repr(desk.events(grant.task))


def test_another_orchestrators_tasks_are_not_given(desk: Desk) -> None:
    """Each has its own line."""
    desk.make(orchestrator="vp-b")
    assert desk.claim("vp-a") == []
    assert len(desk.claim("vp-b")) == 1


def test_the_session_limit_counts_what_runs(desk: Desk) -> None:
    """Also within one claim, and a finished one frees a slot."""
    for _ in range(5):
        desk.make()
    first = desk.claim(limit=5, sessions_max=2)
    assert len(first) == 2
    assert desk.claim(limit=5, sessions_max=2) == []
    desk.finish(first[0])
    assert len(desk.claim(limit=5, sessions_max=2)) == 1


def test_a_task_for_later_waits_for_its_time(desk: Desk) -> None:
    """available_at is honoured, and told to who waits."""
    later = desk.now + 10_000_000
    task = desk.make(available_at_us=later)
    assert desk.claim() == []
    assert desk.store.read_sync(lambda c: life.next_available(c, "vp-a")) == later
    desk.clock.advance(9.9)
    assert desk.claim() == []
    desk.clock.advance(0.1)
    (grant,) = desk.claim()
    assert grant.task.id == task.id
    assert desk.store.read_sync(lambda c: life.next_available(c, "vp-a")) is None


def test_done_keeps_the_result_and_the_usage(desk: Desk) -> None:
    """And the event of the end has exit code, time and usage."""
    grant = desk.run()
    desk.clock.advance(2.5)
    task = desk.finish(grant, result={"x": [1]}, exit_code=0, usage=Usage(input_tokens=3, usd=0.5))
    assert (task.status, task.result, task.completed_at_us) == ("DONE", {"x": [1]}, desk.now)
    assert (task.token, task.lease_until_us) == (None, None)
    end = desk.events(task)[-1]
    assert (end.kind, end.attempt, end.machine) == ("task_done", 1, "m1")
    assert (end.data["outcome"], end.data["exit_code"], end.data["run_s"]) == ("done", 0, 2.5)
    assert end.data["usage"]["input_tokens"] == 3
    (attempt,) = desk.attempts(task)
    assert (attempt["outcome"], attempt["ended_at_us"], attempt["usage"]["usd"]) == ("done", desk.now, 0.5)


@pytest.mark.parametrize("outcome", ["done", "failed", "released", "failed_for_good", "timeout"])
def test_the_same_report_twice_gets_the_same_answer_and_changes_nothing(desk: Desk, outcome: str) -> None:
    """A daemon that doesn't know whether it was heard says it again."""
    grant = desk.run()
    first = desk.finish(grant, outcome)
    events = len(desk.events(first))
    assert desk.finish(grant, outcome).status == first.status
    assert desk.get(first) == first
    assert len(desk.events(first)) == events


def test_a_different_report_with_a_used_token_is_refused(desk: Desk) -> None:
    """What is done does not become failed."""
    grant = desk.run()
    desk.finish(grant)
    with pytest.raises(LeaseLost, match=r"attempt 1 is over \(done\)"):
        desk.finish(grant, "failed")


@pytest.mark.parametrize("outcome", ["failed", "timeout", "crashed"])
def test_a_failed_try_comes_back_after_a_wait_until_the_tries_are_spent(desk: Desk, outcome: str) -> None:
    """2 s, 4 s, then BLOCKED/attempts_exhausted; a redrive begins anew."""
    desk.make()
    for number, wait_s in ((1, 2), (2, 4)):
        (grant,) = desk.claim()
        assert grant.attempt == number
        task = desk.finish(grant, outcome, error="boom")
        assert (task.status, task.available_at_us) == ("TODO", desk.now + wait_s * 1_000_000)
        assert task.error == {"message": "boom", "outcome": outcome, "retryable": True}
        assert desk.claim() == []
        desk.clock.advance(wait_s)
    (grant,) = desk.claim()
    task = desk.finish(grant, outcome, error="boom")
    assert (task.status, task.blocked_reason) == ("BLOCKED", "attempts_exhausted")
    assert task.condition == "3 of 3 attempts failed: boom"
    assert desk.kinds(task)[-2:] == ["task_failed", "task_blocked"]
    again = desk.retry(task)
    assert (again.id, again.status, again.failures) == (task.id, "TODO", 0)
    (grant,) = desk.claim()
    assert grant.attempt == 4
    assert desk.finish(grant).error is None


def test_a_failure_for_good_is_not_tried_again(desk: Desk) -> None:
    """And says that it is final."""
    task = desk.finish(desk.run(), "failed_for_good", error="no such repo", exit_code=78)
    assert (task.status, task.blocked_reason) == ("BLOCKED", "attempts_exhausted")
    assert task.condition == "failed for good: no such repo"
    assert task.error == {"message": "no such repo", "outcome": "failed_for_good", "retryable": False}


def test_a_failure_without_a_word_still_says_something(desk: Desk) -> None:
    """The outcome and the exit code."""
    task = desk.finish(desk.run(), "failed", exit_code=3)
    assert task.error is not None
    assert task.error["message"] == "failed, exit code 3"


def test_a_release_gives_it_back_at_once_and_does_not_count(desk: Desk) -> None:
    """As often as one likes."""
    desk.make(max_attempts=1)
    for number in range(1, 5):
        (grant,) = desk.claim()
        assert grant.attempt == number
        task = desk.finish(grant, "released")
        assert (task.status, task.failures) == ("TODO", 0)


def test_a_result_that_is_too_big_or_an_outcome_that_is_none_is_refused(desk: Desk) -> None:
    """And the attempt goes on."""
    grant = desk.run()
    with pytest.raises(Invalid, match="1048576"):
        desk.finish(grant, result="x" * (1 << 20))
    with pytest.raises(Invalid, match="lease_lost"):
        desk.finish(grant, "lease_lost")
    assert desk.finish(grant).status == "DONE"


def test_beats_hold_a_lease_and_silence_loses_it(desk: Desk) -> None:
    """The task is back in line at once, and the try counts."""
    grant = desk.run()
    for _ in range(5):
        desk.clock.advance(20)
        assert desk.beat(held(grant)) == ()
        assert desk.expire() == []
    assert desk.store.read_sync(life.next_lease_expiry) == desk.now + 30_000_000
    desk.clock.advance(30)
    (task,) = desk.expire()
    assert (task.status, task.failures, task.token) == ("TODO", 1, None)
    assert desk.attempts(task)[0]["outcome"] == "lease_lost"
    assert desk.kinds(task)[-1] == "lease_expired"
    assert desk.store.read_sync(life.next_lease_expiry) is None
    (second,) = desk.claim()
    assert second.attempt == 2
    assert second.token != grant.token


def test_a_lease_lost_again_and_again_ends_blocked(desk: Desk) -> None:
    """A task that kills its machine does not go round for ever."""
    task = desk.make(max_attempts=2)
    for _ in range(2):
        desk.claim()
        desk.clock.advance(31)
        desk.expire()
    assert (desk.get(task).status, desk.get(task).blocked_reason) == ("BLOCKED", "attempts_exhausted")


def test_every_write_of_an_old_token_is_refused(desk: Desk) -> None:
    """Beat, heartbeat, finish, log, progress: the newer attempt alone is heard."""
    old = desk.run()
    desk.clock.advance(31)
    desk.expire()
    (new,) = desk.claim()
    assert desk.beat(held(old), held(new)) == (old.task.id,)
    for refused in (
        lambda: desk.finish(old),
        lambda: desk.log(old, "late"),
        lambda: desk._write(life.progress, task_id=old.task.id, token=old.token, message="late"),
        lambda: desk.store.write_sync(
            lambda c: life.heartbeat(c, task_id=old.task.id, token=old.token, lease_s=9, now_us=desk.now)
        ),
    ):
        with pytest.raises(LeaseLost, match="stop"):
            refused()
    assert desk.get(new.task) == new.task
    assert desk.finish(new).status == "DONE"


def test_an_invented_token_is_refused(desk: Desk) -> None:
    """It never was."""
    grant = desk.run()
    with pytest.raises(LeaseLost, match="never given"):
        desk.finish(replace(grant, token="0" * 32))
    waiting = desk.make()
    with pytest.raises(LeaseLost):
        desk._write(life.progress, task_id=waiting.id, token="", message="x")


def test_hello_keeps_what_is_held_and_takes_back_what_is_not(desk: Desk) -> None:
    """Of that orchestrator on that machine alone."""
    kept, dropped = desk.run(), desk.run()
    desk.make()
    (elsewhere,) = desk.claim(machine="m2")
    other = desk.run(orchestrator="vp-b")
    stale = Held(task=dropped.task.id, token="0" * 32)
    answer = desk.hello(held(kept), stale)
    assert answer.lost == (dropped.task.id,)
    assert [task.id for task in answer.requeued] == [dropped.task.id]
    assert desk.get(dropped.task).status == "TODO"
    assert [desk.get(g.task).status for g in (kept, elsewhere, other)] == ["IN_PROGRESS"] * 3


def test_a_claim_whose_answer_was_lost_counts_for_nothing(desk: Desk) -> None:
    """The process that claimed is still the same and says it has nothing: nothing was tried."""
    grant = desk.run(max_attempts=1)
    (requeued,) = desk.hello(holder="boot/epoch").requeued
    assert (requeued.status, requeued.failures) == ("TODO", 0)
    (again,) = desk.claim()
    assert (again.task.id, again.attempt) == (grant.task.id, 2)
    assert desk.finish(again).status == "DONE"


def test_an_attempt_that_died_with_its_daemon_counts(desk: Desk) -> None:
    """Else a task that kills its machine would be tried for ever."""
    desk.run(max_attempts=1)
    (requeued,) = desk.hello().requeued
    assert (requeued.status, requeued.blocked_reason) == ("BLOCKED", "attempts_exhausted")


def test_cancelling_stops_who_runs_it(desk: Desk) -> None:
    """The answer names the attempt; its later reports are refused, but for the word that it stopped."""
    grant = desk.run()
    changed = desk.cancel(grant.task)
    assert changed.task.status == "CANCELLED"
    assert changed.stopped is not None
    assert (changed.stopped.token, changed.stopped.machine, changed.stopped.attempt) == (grant.token, "m1", 1)
    assert desk.beat(held(grant)) == (grant.task.id,)
    with pytest.raises(LeaseLost):
        desk.finish(grant)
    assert desk.finish(grant, "cancelled").status == "CANCELLED"
    with pytest.raises(InvalidTransition, match="final"):
        desk.cancel(grant.task)
    assert desk.cancel(desk.make()).stopped is None


def test_an_ended_task_is_made_anew_by_retry_and_names_its_parent(desk: Desk) -> None:
    """The old one stays as it was."""
    old = desk.finish(desk.run(title="x", priority="HIGH", tags=("a",), metadata={"m": 1}))
    new = desk.retry(old)
    assert (new.parent, new.title, new.priority, new.tags, new.metadata) == (old.id, "x", "HIGH", ["a"], {"m": 1})
    assert (new.status, new.attempt, new.orchestrator) == ("TODO", 0, "vp-a")
    assert desk.get(old) == old
    with pytest.raises(InvalidTransition, match="TODO"):
        desk.retry(new)


def test_assigning_a_running_task_takes_it_from_its_holder_first(desk: Desk) -> None:
    """The old attempt is fenced off before the new owner can have it."""
    grant = desk.run()
    changed = desk.assign(grant.task, "vp-b")
    assert (changed.task.status, changed.task.orchestrator) == ("TODO", "vp-b")
    assert changed.stopped is not None
    assert changed.stopped.token == grant.token
    with pytest.raises(LeaseLost):
        desk.finish(grant)
    (new,) = desk.claim("vp-b")
    assert new.attempt == 2
    assert desk.assign(new.task, "vp-b").stopped is None
    done = desk.finish(new)
    with pytest.raises(Conflict, match="final"):
        desk.assign(done, "vp-a")


def test_an_edit_needs_the_version_that_was_seen(desk: Desk) -> None:
    """Two editors do not undo each other."""
    task = desk.make()
    edited = desk.update(task, version=1, title="new", tags=["b"])
    assert (edited.title, edited.version) == ("new", 2)
    with pytest.raises(Conflict, match="version 2") as stale:
        desk.update(task, version=1, title="other")
    assert stale.value.code == "stale"
    assert desk.update(task, title="new").version == 2
    assert [t.id for t in desk.page(filters=Filters(tag=("b",))).rows] == [task.id]
    assert desk.kinds(task) == ["task_created", "task_updated"]
    with pytest.raises(Invalid, match="status"):
        desk.update(task, status="DONE")


def test_an_edit_moves_a_task_in_line(desk: Desk) -> None:
    """Priority, due date and availability are its place."""
    first, second, third = desk.make("1"), desk.make("2"), desk.make("3")
    desk.update(third, priority="CRITICAL")
    desk.update(second, due_at_us=desk.now + 5)
    desk.update(first, available_at_us=desk.now + 60_000_000)
    assert [g.task.title for g in desk.claim(limit=5)] == ["3", "2"]
    desk.update(first, available_at_us=None)
    assert [g.task.title for g in desk.claim(limit=5)] == ["1"]


def test_a_persons_status_moves_only_along_the_table(desk: Desk) -> None:
    """Each legal edge, and a refusal for the rest."""
    task = desk.make()
    assert desk.set_status(task, "BLOCKED").task.blocked_reason == "manual"
    assert desk.set_status(task, "TODO").task.status == "TODO"
    with pytest.raises(InvalidTransition, match="only a claim"):
        desk.set_status(task, "IN_PROGRESS")
    with pytest.raises(InvalidTransition, match="IN_PROGRESS, BLOCKED, CANCELLED"):
        desk.set_status(task, "DONE")
    (grant,) = desk.claim()
    assert desk.set_status(task, "IN_PROGRESS").task.version == grant.task.version
    released = desk.set_status(task, "TODO")
    assert released.stopped is not None
    (grant,) = desk.claim()
    done = desk.set_status(task, "DONE")
    assert done.stopped is not None
    assert done.stopped.token == grant.token
    with pytest.raises(InvalidTransition, match="final"):
        desk.set_status(task, "TODO")


def test_purging_removes_an_ended_task_and_its_words_but_not_its_events(desk: Desk) -> None:
    """That it was is remembered."""
    grant = desk.run(tags=("a",))
    desk.log(grant, "hello")
    with pytest.raises(Conflict, match="cancel it first"):
        desk._write(life.purge, task_id=grant.task.id)
    desk.finish(grant)
    desk._write(life.purge, task_id=grant.task.id)
    with pytest.raises(NotFound):
        desk.get(grant.task)
    assert desk.store.read_sync(lambda c: life.read_log(c, task_id=grant.task.id)) == []


def test_what_a_session_prints_is_kept_in_order_and_once(desk: Desk) -> None:
    """A piece sent again after a reconnect is cut to what is new."""
    grant = desk.run()
    assert desk.log(grant, "héllo ")
    assert not desk.log(grant, "héllo ")
    assert desk.log(grant, "lo world", offset=4)
    assert desk.log(grant, "oops\0", stream="stderr")
    pieces = desk.store.read_sync(lambda c: life.read_log(c, task_id=grant.task.id))
    assert [(p.stream, p.byte_offset, p.text) for p in pieces] == [
        ("stdout", 0, "héllo "),
        ("stdout", 7, "world"),
        ("stderr", 0, "oops\ufffd"),
    ]
    rest = desk.store.read_sync(lambda c: life.read_log(c, task_id=grant.task.id, after_seq=pieces[0].seq, attempt=1))
    assert list(rest) == list(pieces[1:])
    with pytest.raises(Invalid, match="stream"):
        desk.log(grant, "x", stream="fleet")


def test_a_piece_that_comes_twice_at_once_is_kept_once(desk: Desk) -> None:
    """By two connections of its daemon: the first one's is still on its way in when the second sends it again."""
    grant = desk.run()
    again: list[bool] = []
    sending = threading.Thread(target=lambda: again.append(desk.log(grant, "hello")))

    def log_slowly(conn: Connection) -> None:
        known = {"stream": "stdout", "offset": 0, "now_us": desk.now}
        assert life.append_log(conn, task_id=grant.task.id, token=grant.token, text="hello", **known)
        sending.start()
        sending.join(0.3)

    desk.store.write_sync(log_slowly)
    sending.join()
    assert again == [False]
    assert len(desk.store.read_sync(lambda c: life.read_log(c, task_id=grant.task.id))) == 1


def test_a_log_ends_at_its_limit_with_one_remark(desk: Desk) -> None:
    """However much comes after."""
    grant = desk.run()
    chunk = "x" * 60_000
    kept = [desk.log(grant, chunk, offset=n * len(chunk)) for n in range(30)]
    assert (kept[0], kept[-1]) == (True, False)
    pieces = desk.store.read_sync(lambda c: life.read_log(c, task_id=grant.task.id))
    assert sum(len(p.text) for p in pieces if p.stream == "stdout") == MAX_ATTEMPT_BYTES
    assert [p.stream for p in pieces].count("fleet") == 1
    assert "cut at 1 MiB" in pieces[-1].text


def test_progress_is_an_event(desk: Desk) -> None:
    """With the holder's words."""
    grant = desk.run()
    desk._write(life.progress, task_id=grant.task.id, token=grant.token, message="half way")
    last = desk.events(grant.task)[-1]
    assert (last.kind, last.data["message"]) == ("task_progress", "half way")


def test_what_is_not_there_is_told(desk: Desk) -> None:
    """By its id."""
    with pytest.raises(NotFound, match="task-none"):
        desk.store.read_sync(lambda c: life.get_task(c, "task-none"))
    with pytest.raises(NotFound, match="task-none"):
        desk.store.read_sync(lambda c: life.events_of(c, task_id="task-none"))
    with pytest.raises(NotFound, match="task-none"):
        desk._write(life.finish, task_id="task-none", token="x", outcome="done", retry=RETRY, roll=0)


def test_json_has_the_contracts_fields_and_times(desk: Desk) -> None:
    """Absent values are null, times are RFC 3339 in UTC."""
    shown = to_json(desk.make(due_at_us=desk.now))
    assert shown["due_at"] == shown["created_at"] == "2026-01-01T00:00:00.000000Z"
    assert shown["completed_at"] is None
    assert set(shown) == {
        *("id", "title", "description", "priority", "status", "blocked_reason", "orchestrator", "discipline", "tags"),
        *("due_at", "available_at", "estimate_s", "depends_on", "parent", "metadata", "route", "attempt"),
        *("max_attempts", "created_by", "created_at", "updated_at", "started_at", "completed_at", "result", "error"),
        *("version", "generation", "charter_version"),
    }


def test_what_somebody_else_called_done_is_no_longer_the_attempts_to_end(desk: Desk) -> None:
    """Its own report is told so, and not taken for the same one again."""
    grant = desk.run()
    assert desk.set_status(grant.task, "DONE").task.status == "DONE"
    with pytest.raises(LeaseLost):
        desk.finish(grant, result={"mine": 1})


def test_json_may_hold_any_text(desk: Desk) -> None:
    """A NUL in a result, which a session's bytes may well have, is no reason to lose it; nor one that is spelt out."""
    odd = {"nul": "a\0b", "spelt": "\\u0000", "key\0": ['"', "\\", "\ud7ff\U0001f600"]}
    grant = desk.run(metadata=odd)
    after = desk.finish(grant, result=odd)
    assert (desk.get(after).result, desk.get(after).metadata) == (odd, odd)
    assert [event.data["task"]["metadata"] for event in desk.events(after)] == [odd] * 3
    assert desk.events(after)[-1].data["task"]["result"] == odd
