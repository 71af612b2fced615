"""What the views say is what the live store says, for any history."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from story import DISPATCH, VPS, Story

from orchestrator_fleet.errors import TaskError
from orchestrator_fleet.history import door
from orchestrator_fleet.history.ingest import Ingester
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import life
from orchestrator_fleet.tasks.task import Grant, TaskRow
from orchestrator_fleet.tasks.view import to_json
from orchestrator_fleet.wire.link import Usage

PLAIN = (  # columns of the view `tasks` that are the API's fields of the same name
    "id", "title", "status", "blocked_reason", "priority", "orchestrator", "discipline", "route", "attempt",
    "max_attempts", "tags", "created_by", "created_at", "updated_at", "due_at", "started_at", "completed_at", "result",
    "generation", "charter_version", "depends_on", "parent", "metadata", "description", "estimate_s", "version",
)  # fmt: skip
OUTCOMES = ("done", "failed", "failed_for_good", "timeout", "crashed", "cancelled", "released")
CHANGES: dict[str, Callable[[int], dict[str, Any]]] = {  # function of `life` -> its arguments
    "assign": lambda which: {"orchestrator": VPS[which % 2], "reason": "better there"},
    "update_task": lambda which: {"fields": {"title": f"edited {which}"}, "version": None},
    "retry": lambda _: {"dispatch": DISPATCH, "reason": None},
    "purge": lambda _: {},
    "cancel": lambda _: {"reason": "because"},
    "unblock": lambda _: {"reason": "because"},
}
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "make",
                "claim",
                "finish",
                "finish",
                "expire",
                "cancel",
                "unblock",
                "assign",
                "retry",
                "purge",
                "edit",
                "wait",
            )
        ),
        st.integers(0, 5),
        st.sampled_from(OUTCOMES),
    ),
    min_size=1,
    max_size=40,
)


class Teller:
    """Does random steps, of which the rules refuse some."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.tasks: list[TaskRow] = []
        self.grants: list[Grant] = []

    def step(self, what: str, which: int, outcome: str) -> None:
        """Do one, if the rules allow it."""
        self.story.clock.advance(1 + which / 7)
        with contextlib.suppress(TaskError):  # the rules said no: nothing happened
            if what in ("make", "claim", "expire"):
                getattr(self, f"_{what}")(which, outcome)
            elif what == "finish" and self.grants:
                self._finish(self.grants.pop(which % len(self.grants)), which, outcome)
            elif what in CHANGES and self.tasks:
                self._change(what, self.tasks[which % len(self.tasks)], which)

    def _make(self, which: int, outcome: str) -> None:
        fields: dict[str, Any] = {"orchestrator": VPS[which % 2], "tags": ("x", outcome)}
        if which == 3 and self.tasks:
            fields["depends_on"] = (self.tasks[-1].id,)
        if which == 4:
            fields |= {"orchestrator": None, "discipline": "sec", "metadata": {"a": [1, {"b": None}]}}
        made = self.story.make(f"{outcome} {which}", priority="HIGH" if which % 2 else "LOW", **fields)
        self.tasks.append(made)

    def _claim(self, which: int, _outcome: str) -> None:
        self.grants += self.story.claim(VPS[which % 2], limit=which)

    def _expire(self, _which: int, _outcome: str) -> None:
        self.story.clock.advance(31)
        self.story.expire()

    def _finish(self, grant: Grant, which: int, outcome: str) -> None:
        usage = Usage(input_tokens=which, output_tokens=2, usd=which / 4) if which % 2 else None
        result = {"headline": outcome} if outcome == "done" else None
        self.story.finish(grant, outcome, usage=usage, exit_code=which, result=result, error=f"{outcome} it is")

    def _change(self, what: str, task: TaskRow, which: int) -> None:
        made = self.story.change(getattr(life, what), task, **CHANGES[what](which))
        if what == "retry":
            self.tasks.append(made)


def table(history: Ingester, query: str) -> list[dict[str, Any]]:
    answer = door.ask(history, query)
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


def live_tasks(story: Story) -> dict[str, dict[str, Any]]:
    def read(conn: Any) -> dict[str, dict[str, Any]]:
        found = conn.exec_driver_sql("select id from tasks").scalars().all()
        return {one: to_json(life.get_task(conn, one)) for one in found}

    return story.store.read_sync(read)


def live_attempts(story: Story) -> dict[tuple[str, int], dict[str, Any]]:
    def read(conn: Any) -> dict[tuple[str, int], dict[str, Any]]:
        ids = conn.exec_driver_sql("select id from tasks").scalars().all()
        return {(one, row["attempt"]): row for one in ids for row in life.attempts_of(conn, one)}

    return story.store.read_sync(read)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, cuts=st.sets(st.integers(0, 40), max_size=4))
def test_views_agree_with_the_live_store(steps: list[tuple[str, int, str]], cuts: set[int]) -> None:
    """Every field of every task and attempt, wherever the batches were cut."""
    with tempfile.TemporaryDirectory() as folder:
        story = Story(Path(folder) / "store.sqlite")
        history = Ingester(story.url, Path(folder) / "history.duckdb")
        teller = Teller(story)
        for number, step in enumerate(steps):
            teller.step(*step)
            if number in cuts:
                history.flush()
        try:
            check(story, history)
        finally:
            history.close()
            story.close()


def check(story: Story, history: Ingester) -> None:
    live, tries = live_tasks(story), live_attempts(story)
    seen = {row["id"]: row for row in table(history, "select * from tasks")}
    assert {one: {name: row[name] for name in PLAIN} for one, row in seen.items()} == {
        one: {name: task[name] for name in PLAIN} for one, task in live.items()
    }
    for one, row in seen.items():
        mine = [attempt for (task, _), attempt in tries.items() if task == one]
        check_sums(row, live[one], mine)
    kept = [row for row in table(history, "select * from attempts") if row["task"] in live]  # purging takes attempts
    assert {(row["task"], row["attempt"]): of_view(row) for row in kept} == {
        key: of_store(row) for key, row in tries.items()
    }
    assert len(kept) == len(tries)
    check_counts(table(history, "select * from orchestrators"), live)
    assert len(table(history, "select * from events")) == len(story.outbox())


def check_sums(row: dict[str, Any], task: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
    ended = [(a["ended_at_us"] - a["started_at_us"]) / 1e6 for a in attempts if a["ended_at_us"] is not None]
    assert row["run_time_s"] is None if not ended else abs(row["run_time_s"] - sum(ended)) < 1e-6
    paid = [a["usage"]["usd"] for a in attempts if a["usage"]]
    assert row["usd"] == (sum(paid) if paid else None)
    assert (row["lead_time_s"] is None) == (task["completed_at"] is None)
    assert row["error"] == (task["error"] or {}).get("message")


def of_view(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["orchestrator"], row["machine"], row["outcome"], row["exit_code"], row["usd"], row["charter_version"]


def of_store(row: dict[str, Any]) -> tuple[Any, ...]:
    usd = row["usage"]["usd"] if row["usage"] else None
    return row["orchestrator"], row["machine"], row["outcome"], row["exit_code"], usd, row["charter_version"]


def check_counts(orchestrators: list[dict[str, Any]], live: dict[str, dict[str, Any]]) -> None:
    for row in orchestrators:
        mine = [task["status"] for task in live.values() if task["orchestrator"] == row["name"]]
        assert (row["tasks"], row["done"], row["blocked"], row["cancelled"]) == (
            len(mine),
            mine.count("DONE"),
            mine.count("BLOCKED"),
            mine.count("CANCELLED"),
        )


def test_presence_and_machines_are_told(story: Story, history: Ingester) -> None:
    """The last arrival or leave says the status; machines sum up what ran on them."""
    story.run(run_s=2.0)
    story.run(outcome="failed", run_s=3.0)
    for at, kind in enumerate(("orchestrator_online", "orchestrator_offline", "orchestrator_online")):
        story.tell(Event(at_us=at, kind=kind, actor="system", orchestrator="vp-a", machine="m-vp-a", generation="g2"))
    story.tell(Event(at_us=9, kind="orchestrator_offline", actor="system", orchestrator="vp-b", machine="m2"))
    query = (
        "select name, status, machine, tasks, done, attempts, failed_attempts, run_s, generation "
        "from orchestrators order by name"
    )
    assert door.ask(history, query).rows == [
        ["vp-a", "ONLINE", "m-vp-a", 2, 1, 2, 1, 5.0, "g2"],
        ["vp-b", "OFFLINE", "m2", 0, 0, 0, 0, None, None],
    ]
    query = "select name, orchestrators, attempts, done, failed_attempts, running, run_s from machines"
    assert door.ask(history, query).rows == [["m-vp-a", ["vp-a"], 2, 1, 1, 0, 5.0]]


def test_every_view_and_column_can_be_looked_up(history: Ingester) -> None:
    """`show tables`, `describe tasks` and the comments tell a stranger what is there."""
    assert [row[0] for row in door.ask(history, "show tables").rows if row[0] != "history_schema"] == [
        "attempts", "events", "machines", "measurements", "orchestrators", "stores", "tasks",
    ]  # fmt: skip
    without = "select view_name from duckdb_views() where not internal and comment is null"
    assert door.ask(history, without).rows == []
    described = {row[0]: row[1] for row in door.ask(history, "describe tasks").rows}
    assert described["completed_at"] == "TIMESTAMP WITH TIME ZONE"
    assert described["tags"] == "VARCHAR[]"
