"""Limits per key: never exceeded, and nobody who waits for a place is forgotten."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from asker import Asker, line, spec_of
from desk import RETRY, Desk
from sqlalchemy import Connection

from orchestrator_fleet.clock import SystemClock
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.schema import limit_uses, tasks
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import life, limits, rows, transitions
from orchestrator_fleet.tasks.limits import applying
from orchestrator_fleet.tasks.rules import Rules
from orchestrator_fleet.tasks.task import Grant, NewTask, TaskRow

MINUTE_US = 60_000_000
PER_REPO = {"name": "per-repo", "key": "task.metadata.repo", "max_running": 1}
PER_TEAM = {"name": "per-team", "key": "task.metadata.team", "max_running": 2}
RATE = {"name": "rate", "key": "task.metadata.api", "max_per_minute": 2}


def under(desk: Desk, *declared: dict[str, Any]) -> Asker:
    """Somebody who claims under these limits."""
    return Asker(desk, spec_of({}, limits=list(declared)))


def parked(desk: Desk) -> dict[str, str]:
    """Where tasks are parked, by title."""
    query = tasks.select().where(tasks.c.parked_by.is_not(None)).order_by(tasks.c.title)
    return {row.title: row.parked_by for row in desk.store.read_sync(lambda c: c.execute(query).all())}


def uses(desk: Desk) -> list[tuple[str, str, bool]]:
    """(limit, value, whether it still counts), in order."""
    rows = desk.store.read_sync(lambda c: c.execute(limit_uses.select()).all())
    return sorted((row.limit_name, row.value, row.ended_at_us is None) for row in rows)


def freed(desk: Desk) -> list[tuple[str | None, dict[str, Any]]]:
    """The orchestrators that were told of a place, and which."""
    events = desk.store.read_sync(lambda c: outbox.read_after(c, 0))
    return [(event.orchestrator, event.data) for event in events if event.kind == "limit_freed"]


def call_up(desk: Desk, asker: Asker) -> int:
    """What the loop does now and then."""
    return desk.store.write_sync(lambda c: limits.call_up(c, rules=asker.rules, now_us=desk.now))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hot statements that are run meanwhile."""
    seen: list[str] = []
    for name in ("rows", "run", "many"):
        run = getattr(Statement, name)

        def told(self: Statement, *args: Any, run: Any = run, name: str = name) -> Any:
            seen.append(name)
            return run(self, *args)

        monkeypatch.setattr(Statement, name, told)
    yield seen
    monkeypatch.undo()


def of_repo(repo: str, **more: Any) -> dict[str, Any]:
    """The metadata of a task of that repository."""
    return {"metadata": {"repo": repo, **more}}


def test_a_key_runs_as_often_as_its_limit_says_and_others_go_on(desk: Desk) -> None:
    """Within one claim too; who was passed over is parked, and the next claim does not see him."""
    asker = under(desk, PER_REPO)
    line(desk, "a0", "a1", "a2", **of_repo("a"))
    line(desk, "b0", "b1", **of_repo("b"))
    line(desk, "free")
    assert asker.titles(limit=10) == ["a0", "b0", "free"]
    assert parked(desk) == {"a1": "per-repo=a", "a2": "per-repo=a", "b1": "per-repo=b"}
    assert asker.titles(limit=10) == []
    assert uses(desk) == [("per-repo", "a", True), ("per-repo", "b", True)]


def test_the_end_of_one_calls_up_the_next_of_its_key(desk: Desk) -> None:
    """One place, one task; and who waits for it is told."""
    asker = under(desk, PER_REPO)
    line(desk, "a0", "a1", "a2", **of_repo("a"))
    (first,) = asker.ask(limit=10).grants
    desk.finish(first)
    assert parked(desk) == {"a2": "per-repo=a"}
    assert freed(desk) == [("vp-a", {"limit": "per-repo", "value": "a"})]
    assert asker.titles(limit=10) == ["a1"]
    assert uses(desk) == [("per-repo", "a", False), ("per-repo", "a", True)]


def test_a_key_is_one_over_all_orchestrators_and_each_that_waits_is_told(desk: Desk) -> None:
    """Whoever comes first gets the place, the other waits on."""
    asker = under(desk, PER_REPO)
    line(desk, "a0", "a1", **of_repo("r"))
    line(desk, "b0", "b1", orchestrator="vp-b", **of_repo("r"))
    (first,) = asker.ask("vp-a").grants
    assert asker.titles("vp-a") == asker.titles("vp-b", limit=5) == []
    desk.finish(first)
    assert [orchestrator for orchestrator, _ in freed(desk)] == ["vp-a", "vp-b"]
    assert asker.titles("vp-b") == ["b0"]
    assert asker.titles("vp-a") == []
    assert parked(desk) == {"a1": "per-repo=r", "b1": "per-repo=r"}


def test_the_first_of_the_line_is_called_up_not_the_first_that_was_parked(desk: Desk) -> None:
    """Priority counts among those who wait, and so does what aging made of it."""
    asker = under(desk, PER_REPO)
    line(desk, "running", **of_repo("a"))
    (first,) = asker.ask().grants
    line(desk, "low", priority="LOW", **of_repo("a"))
    assert asker.titles() == []
    desk.clock.advance(3 * 86_400)
    line(desk, "high", priority="HIGH", **of_repo("a"))
    assert asker.titles() == []
    desk.finish(first)
    assert asker.titles(limit=5) == ["low"]
    assert parked(desk) == {"high": "per-repo=a"}


def test_a_task_begins_when_all_its_limits_have_room(desk: Desk) -> None:
    """It counts on each of them, and gives each free."""
    asker = under(desk, PER_REPO, PER_TEAM)
    line(desk, "x0", "x1", **of_repo("x", team="t"))
    line(desk, "y0", **of_repo("y", team="t"))
    line(desk, "z0", **of_repo("z", team="t"))
    x0, y0 = asker.ask(limit=10).grants
    assert (x0.task.title, y0.task.title) == ("x0", "y0")
    assert x0.task.counts_on == [["per-repo", "x"], ["per-team", "t"]]
    assert parked(desk) == {"x1": "per-repo=x", "z0": "per-team=t"}
    desk.finish(y0)
    assert asker.titles(limit=10) == ["z0"]
    desk.finish(x0)
    assert asker.titles(limit=10) == ["x1"]


def test_a_limit_that_has_no_value_for_a_task_does_not_bind_it(desk: Desk) -> None:
    """A key that is missing, null, or can't be evaluated."""
    asker = under(desk, PER_REPO, {"name": "odd", "key": "task.estimate_s / 0.0 > task.title", "max_running": 1})
    line(desk, "t0", "t1", metadata={})
    line(desk, "t2", "t3", metadata={"repo": None})
    assert asker.titles(limit=10) == ["t0", "t1", "t2", "t3"]
    assert uses(desk) == []


def test_a_rate_lets_so_many_begin_in_any_minute(desk: Desk) -> None:
    """Whether they still run or not; and the claim says when to ask again."""
    asker = under(desk, RATE)
    line(desk, "t0", "t1", "t2", "t3", metadata={"api": "x"})
    (t0,) = asker.ask().grants
    began_us = desk.now
    desk.finish(t0)
    desk.clock.advance(20)
    (t1,) = asker.ask(limit=5).grants
    desk.finish(t1)
    nothing = asker.ask()
    assert (nothing.grants, nothing.again_at_us) == ((), began_us + MINUTE_US)
    desk.clock.advance(39.999)
    assert asker.titles() == []
    desk.clock.advance(0.001)
    assert asker.titles(limit=5) == ["t2"]
    assert asker.ask().again_at_us == began_us + MINUTE_US + 20_000_000


def test_a_rate_comes_free_for_a_line_that_is_never_empty(desk: Desk) -> None:
    """The loop calls up what comes before the first of the line, and says so; then there is nothing to do for it."""
    asker = under(desk, RATE)
    line(desk, "t0", "t1", "urgent", priority="HIGH", metadata={"api": "x"})
    assert asker.titles(limit=2) == ["t0", "t1"]
    line(desk, *(f"other{n}" for n in range(9)))
    assert asker.titles() == ["other0"]
    assert call_up(desk, asker) == 0
    desk.clock.advance(60)
    assert asker.titles() == ["other1"]
    assert call_up(desk, asker) == 1
    assert freed(desk) == [("vp-a", {"limit": "rate", "value": "x"})]
    assert call_up(desk, asker) == 0
    assert asker.titles() == ["urgent"]


def test_a_clock_that_was_set_back_keeps_no_rate_shut(desk: Desk) -> None:
    """Starts that are yet to come are not of the last minute."""
    asker = under(desk, RATE)
    line(desk, "t0", "t1", "t2", metadata={"api": "x"})
    assert asker.titles(limit=5) == ["t0", "t1"]
    desk.clock.advance(-3_600)
    assert asker.titles(limit=5) == ["t2"]


END: dict[str, Any] = {
    "done": lambda desk, grant: desk.finish(grant),
    "failed": lambda desk, grant: desk.finish(grant, "failed"),
    "failed for good": lambda desk, grant: desk.finish(grant, "failed_for_good"),
    "released": lambda desk, grant: desk.finish(grant, "released"),
    "quota": lambda desk, grant: desk.finish(grant, "quota", until_us=desk.now + 1),
    "cancelled": lambda desk, grant: desk.cancel(grant.task),
    "blocked": lambda desk, grant: desk.set_status(grant.task, "BLOCKED"),
    "taken away": lambda desk, grant: desk.assign(grant.task, "vp-b"),
    "lease lost": lambda desk, _: (desk.clock.advance(31), desk.expire()),
    "daemon restarted": lambda desk, _: desk.hello(),
}


@pytest.mark.parametrize("how", END)
def test_however_an_attempt_ends_its_place_comes_free(desk: Desk, how: str) -> None:
    """Its own task may need it again; the one that waits gets its turn."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", "t1", **of_repo("a"))
    (grant,) = asker.ask(limit=5).grants
    END[how](desk, grant)
    assert uses(desk) == [("per-repo", "a", False)]
    assert parked(desk) == {}
    assert desk.get(grant.task).counts_on is None


LEAVE: dict[str, Any] = {
    "cancelled": lambda desk, task: desk.cancel(task),
    "blocked": lambda desk, task: desk.set_status(task, "BLOCKED"),
    "edited": lambda desk, task: desk.update(task, metadata={"repo": "another"}),
    "put off": lambda desk, task: desk.update(task, available_at_us=desk.now + 3_600_000_000),
    "assigned": lambda desk, task: desk.assign(task, "vp-b"),
}


@pytest.mark.parametrize("how", LEAVE)
def test_who_was_called_up_and_left_the_line_takes_nobodys_place_along(desk: Desk, how: str) -> None:
    """The next of the key is called up by the next claim that finds nothing."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", "t1", "t2", **of_repo("a"))
    (grant,) = asker.ask().grants
    called = desk.page(limit=9).rows[1]
    assert asker.titles(limit=5) == []
    desk.finish(grant)
    LEAVE[how](desk, desk.get(called))
    assert "t2" in asker.titles(limit=5)


@pytest.mark.parametrize("how", LEAVE)
def test_a_parked_task_that_is_changed_is_looked_at_anew(desk: Desk, how: str) -> None:
    """It is parked no more: its limits, its line or its status are others."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", "t1", **of_repo("a"))
    asker.ask(limit=5)
    waiting = next(task for task in desk.page(limit=9).rows if task.parked_by)
    LEAVE[how](desk, waiting)
    assert parked(desk) == {}
    if how == "edited":
        assert asker.titles() == ["t1"]


def test_a_changed_priority_moves_a_parked_task_among_those_who_wait(desk: Desk) -> None:
    """As it moves one that stands in line."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", "t1", "t2", **of_repo("a"))
    (grant,) = asker.ask(limit=5).grants
    desk.update(next(task for task in desk.page(limit=9).rows if task.title == "t2"), priority="CRITICAL")
    assert asker.titles(limit=5) == []
    desk.finish(grant)
    assert asker.titles(limit=5) == ["t2"]


def change_rules(desk: Desk, asker: Asker, *declared: dict[str, Any]) -> None:
    """What the control plane does when another generation comes into force."""
    asker.rules = Rules.of_spec(spec_of({}, limits=list(declared)))
    while desk.store.write_sync(lambda c: limits.unpark_all(c, desk.now)):
        pass
    after: str | None = ""
    while after is not None:
        after = desk.store.write_sync(lambda c, a=after: limits.recount(c, rules=asker.rules, after=a))


def test_who_recounts_and_who_ends_an_attempt_take_their_locks_in_one_order(desk: Desk) -> None:
    """Else PostgreSQL ends one of them a second later, to do it again."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", **of_repo("a"))
    (grant,) = asker.ask().grants
    tried: list[str] = []

    def recount(conn: Connection) -> None:
        tried.append("recount")
        limits.recount(conn, rules=asker.rules)

    recounting = threading.Thread(target=lambda: desk.store.write_sync(recount))

    def finish(conn: Connection) -> None:
        tried.append("finish")
        rows.get_to_change(conn, grant.task.id)
        if recounting.ident is None:
            recounting.start()
            recounting.join(0.3)
        known = {"retry": RETRY, "roll": 0.5, "actor": "k-test", "now_us": desk.now}
        life.finish(conn, task_id=grant.task.id, token=grant.token, outcome="done", **known)

    desk.store.write_sync(finish)
    recounting.join()
    assert sorted(tried) == ["finish", "recount"]


def test_a_wider_limit_takes_effect_at_once(desk: Desk) -> None:
    """And one that is gone binds nobody."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", "t1", "t2", "t3", **of_repo("a"))
    assert asker.titles(limit=5) == ["t0"]
    change_rules(desk, asker, {**PER_REPO, "max_running": 2})
    assert asker.titles(limit=5) == ["t1"]
    change_rules(desk, asker)
    assert asker.titles(limit=5) == ["t2", "t3"]


def test_a_new_limit_counts_what_runs_already(desk: Desk) -> None:
    """Under its new key, from when it began; and an old key counts no more."""
    asker = under(desk)
    line(desk, "t0", "t1", **of_repo("a", team="x"))
    assert asker.titles() == ["t0"]
    change_rules(desk, asker, PER_REPO)
    assert asker.titles(limit=5) == []
    assert uses(desk) == [("per-repo", "a", True)]
    change_rules(desk, asker, {**PER_REPO, "key": "task.metadata.team"})
    assert uses(desk) == [("per-repo", "x", True)]
    assert asker.titles(limit=5) == []
    change_rules(desk, asker)
    assert uses(desk) == []
    assert asker.titles(limit=5) == ["t1"]


def test_a_limit_that_was_forgotten_by_a_later_control_plane_keeps_nobody(desk: Desk) -> None:
    """What is parked at a limit that the asking rules do not know has room."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", "t1", **of_repo("a"))
    assert asker.titles(limit=5) == ["t0"]
    asker.rules = Rules.of_spec(spec_of({}))
    assert call_up(desk, asker) == 1
    assert asker.titles(limit=5) == ["t1"]


def test_old_uses_are_forgotten_and_those_that_count_are_not(desk: Desk) -> None:
    """A rate asks for a minute, and no more."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", **of_repo("a"))
    line(desk, "t1", **of_repo("b"))
    first, _ = asker.ask(limit=5).grants
    desk.finish(first)
    assert desk.store.write_sync(lambda c: limits.forget(c, desk.now)) == 0
    desk.clock.advance(121)
    assert desk.store.write_sync(lambda c: limits.forget(c, desk.now)) == 1
    assert uses(desk) == [("per-repo", "b", True)]


def test_a_purged_task_takes_its_uses_along(desk: Desk) -> None:
    """Nothing counts for what is not there."""
    asker = under(desk, PER_REPO)
    line(desk, "t0", **of_repo("a"))
    (grant,) = asker.ask().grants
    desk.finish(grant)
    desk._write(life.purge, task_id=grant.task.id)
    assert uses(desk) == []


def of(value: Any) -> TaskRow:
    """A task whose key has a value."""
    return transitions.created(
        NewTask(title="t", metadata={"repo": value}),
        task_id="task-1",
        actor="k",
        condition=None,
        waits_for_others=False,
        max_attempts=1,
        now_us=1,
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        ("", ""),
        (True, "true"),
        (7, "7"),
        (1.5, "1.5"),
        ("x=y", "x=y"),
        ("nul\0l", "nul?l"),
        (["a", 1], "['a', 1]"),
    ],
)
def test_a_value_is_a_text_that_every_database_holds(value: Any, text: str) -> None:
    """Whatever JSON the key gives."""
    (limit,) = Rules.of_spec(spec_of({}, limits=[PER_REPO])).limits
    assert applying(of(value), [limit]) == [(limit, text)]


def test_long_values_are_cut_and_stay_different() -> None:
    """By a digest at their end."""
    declared = Rules.of_spec(spec_of({}, limits=[PER_REPO])).limits
    ((_, one),) = applying(of("x" * 5_000 + "a"), declared)
    ((_, other),) = applying(of("x" * 5_000 + "b"), declared)
    assert len(one) == len(other) == 200
    assert one != other


def test_a_thousand_who_wait_cost_a_claim_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are walked over once; after that a claim and an end run as many statements as with two."""
    asker = under(desk, PER_REPO)
    line(desk, "first", **of_repo("a"))
    (grant,) = asker.ask().grants
    counts = []
    for waiting in (2, 1_000):
        line(desk, *(f"t{n}" for n in range(waiting)), **of_repo("a"))
        while asker.titles() or len(parked(desk)) < waiting:
            pass
        line(desk, "other")
        with counted(monkeypatch) as claim:
            assert asker.titles() == ["other"]
        with counted(monkeypatch) as end:
            desk.finish(grant)
        counts.append((len(claim), len(end)))
        (grant,) = asker.ask().grants
    assert counts[0] == counts[1]


class Shift:
    """Workers who each take a task before they finish the last one, and count who runs what."""

    def __init__(self, rules: Rules, tasks_in_all: int) -> None:
        self.rules, self.left = rules, tasks_in_all
        self.running: Counter[tuple[str, ...]] = Counter()
        self.most: dict[tuple[str, ...], int] = {}
        self._counting = threading.Lock()
        self.give_up_at = time.monotonic() + 60

    def work(self, store: Store, orchestrator: str) -> None:
        """Until nothing is left. What runs is counted a little less long than the store counts it."""
        desk = Desk(store)
        desk.clock = SystemClock()  # type: ignore[assignment] # they share no frozen one
        asker = Asker(desk, spec_of({}))
        asker.rules = self.rules
        held: Sequence[Grant] = ()
        while (self.left > 0 or held) and time.monotonic() < self.give_up_at:
            new = asker.ask(orchestrator).grants
            self._count(new, 1)
            self._count(held, -1)
            for grant in held:
                desk.finish(grant)
            held = new

    def _count(self, grants: Sequence[Grant], by: int) -> None:
        with self._counting:
            for key in (tuple(key) for grant in grants for key in grant.task.counts_on or ()):
                self.running[key] += by
                self.most[key] = max(self.most.get(key, 0), self.running[key])
            self.left -= len(grants) if by > 0 else 0


def test_eight_workers_at_once_never_pass_a_limit_and_leave_nothing_behind(desk: Desk) -> None:
    """On two stores where the database is one for many: each claim counts what the others have just begun."""
    several = desk.store.url.startswith("postgresql")
    stores = [desk.store, open_store(desk.store.url) if several else desk.store]
    for n in range(60):
        desk.make(orchestrator=("vp-a", "vp-b")[n % 2], **of_repo(f"r{n % 3}", team=f"t{n % 4}"))
    rules = Rules.of_spec(spec_of({}, limits=[{**PER_REPO, "max_running": 2}, PER_TEAM]))
    shift = Shift(rules, tasks_in_all=60)
    threads = [
        threading.Thread(target=shift.work, args=(stores[number % 2], ("vp-a", "vp-b")[number // 2 % 2]))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if several:
        stores[1].close()
    assert (shift.left, set(shift.running.values())) == (0, {0})
    assert len(shift.most) == 7
    assert max(shift.most.values()) <= 2
    assert parked(desk) == {}


def test_a_claim_that_finds_only_full_limits_says_so(desk: Desk) -> None:
    """And which."""
    vp = under(desk, PER_REPO)
    line(desk, "a", "b", metadata={"repo": "one"})
    assert vp.titles() == ["a"]
    assert "per-repo=one" in vp.ask().reason
