"""What must be true of any history of tasks, whoever died when: events replayed, and held against the ledger. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator_fleet.store.outbox import Event

ENDS = {"task_done", "task_failed", "task_released", "lease_expired"}
LEGAL = {
    ("TODO", "IN_PROGRESS"),
    ("TODO", "BLOCKED"),
    ("TODO", "CANCELLED"),
    ("IN_PROGRESS", "DONE"),
    ("IN_PROGRESS", "TODO"),
    ("IN_PROGRESS", "BLOCKED"),
    ("IN_PROGRESS", "CANCELLED"),
    ("BLOCKED", "TODO"),
    ("BLOCKED", "CANCELLED"),
}


def of_events(events: Sequence[Event], *, max_running: Mapping[str, int] | None = None) -> list[str]:
    """What is wrong with a history; [] when nothing is. `max_running`: metadata field -> most that run with a value."""
    replay = _Replay(max_running or {})
    for event in events:
        if event.task is not None and event.kind != "task_purged":
            replay.see(event, event.data.get("task", {}))
    return replay.wrong + [f"{task}: done {many} times" for task, many in replay.done.items() if many > 1]


class _Replay:
    """Every task as the events told so far have it, and what they told that can't be."""

    def __init__(self, max_running: Mapping[str, int]) -> None:
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self._max_running = max_running
        self._status: dict[str, str] = {}
        self._version: dict[str, int] = {}
        self._attempt: dict[str, int] = {}
        self._running: dict[str, dict[str, Any]] = {}

    def see(self, event: Event, told: dict[str, Any]) -> None:
        """The next event of a task."""
        task = str(event.task)
        here = f"{event.seq} {event.kind} {task} {event.attempt}"
        if not event.actor:
            self.wrong.append(f"{here}: nobody did it")
        if (event.kind == "task_created") != (task not in self._status):
            self.wrong.append(f"{here}: created twice, or after it was there")
        if event.kind == "task_created":
            self._attempt[task] = 0
        else:
            self._change(here, task, event.kind, told)
        self._status[task], self._version[task] = told["status"], told["version"]

    def _change(self, here: str, task: str, kind: str, told: dict[str, Any]) -> None:
        before, after = self._status.get(task, "nothing"), told["status"]
        if after != before and (before, after) not in LEGAL:
            self.wrong.append(f"{here}: {before} became {after}")
        version = self._version.get(task, 0)
        if told["version"] < version or (told["version"] == version and after != before):
            self.wrong.append(f"{here}: version {told['version']} after {version}")
        if kind == "task_claimed":
            self._claim(here, task, told)
        elif kind in ENDS and before != "IN_PROGRESS":
            self.wrong.append(f"{here}: an attempt ended while {before}")
        if after != "IN_PROGRESS":
            self._running.pop(task, None)
        self.done[task] += kind == "task_done"

    def _claim(self, here: str, task: str, told: dict[str, Any]) -> None:
        if self._status.get(task) != "TODO":
            self.wrong.append(f"{here}: claimed while {self._status.get(task)}")
        if told["attempt"] != self._attempt.get(task, 0) + 1:
            self.wrong.append(f"{here}: attempt {told['attempt']} after {self._attempt.get(task)}")
        unmet = [one for one in told["depends_on"] if self._status.get(one) != "DONE"]
        self.wrong += [f"{here}: depends on {one}, which is {self._status.get(one)}" for one in unmet]
        self._attempt[task], self._running[task] = told["attempt"], told["metadata"]
        for name, most in self._max_running.items():
            value = told["metadata"].get(name)
            count = sum(value is not None and one.get(name) == value for one in self._running.values())
            if count > most:
                self.wrong.append(f"{here}: {count} run with {name}={value}, at most {most} may")


def of_ledger(lines: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> list[str]:
    """Where the workers' own ledger and the control plane's events disagree; [] when nowhere."""
    claimed = {(event.task, event.attempt) for event in events if event.kind == "task_claimed"}
    done = {str(event.task): event for event in events if event.kind == "task_done"}
    given = [line for line in lines if line["step"] in ("claimed", "started")]
    asked = {(line["task"], line["attempt"]) for line in lines if line["step"] == "complete?"}
    answered = {(line["task"], line["attempt"]) for line in lines if line["step"] == "complete!"}
    wrong = [
        f"{line['step']} {line['task']} {line['attempt']}: no event tells of this attempt"
        for line in lines
        if (line["task"], line["attempt"]) not in claimed
    ]
    attempts = Counter((line["task"], line["attempt"]) for line in given)
    wrong += [f"{one}: given {many} times" for one, many in attempts.items() if many > 1]
    tokens = Counter(line["token"] for line in given if "token" in line)
    wrong += [f"{one}: a token given {many} times" for one, many in tokens.items() if many > 1]
    told = {(task, event.attempt) for task, event in done.items()}
    wrong += [f"{one}: answered as done, and it is not" for one in answered - told]
    wrong += [f"{one}: done, and its worker never reported that" for one in told - asked]
    for task, event in done.items():
        result = event.data["task"].get("result")
        if not isinstance(result, dict) or result.get("attempt") != event.attempt:
            wrong.append(f"{task}: done by attempt {event.attempt}, with the result {result}")
    return wrong


def rescues_s(lines: Sequence[Mapping[str, Any]], killed_at: Mapping[int, float]) -> list[float]:
    """For each attempt that died with its worker: seconds until the task was in other hands."""
    found = []
    for at, line in enumerate(lines):
        if line["step"] != "claimed" or line["pid"] not in killed_at:
            continue
        mine = [one for one in lines if (one["task"], one["attempt"]) == (line["task"], line["attempt"])]
        if any(one["step"].endswith("!") or one["step"] == "refused" for one in mine):
            continue
        later = [one for one in lines[at + 1 :] if one["task"] == line["task"] and one["step"] == "claimed"]
        if later:
            found.append(max(0.0, later[0]["at"] - killed_at[line["pid"]]))
    return found
