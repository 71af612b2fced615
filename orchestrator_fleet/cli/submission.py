"""Many tasks at once: a JSON list whose items are the API's fields, and may name each other.

`ref` names an item within the list; `after` lists refs that must be done first. Tasks are created in that order,
so that `depends_on` names ids that exist. Then, if asked, they are waited for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from graphlib import CycleError, TopologicalSorter
from typing import Any

from orchestrator_fleet.cli.client import ControlPlane
from orchestrator_fleet.errors import ControlPlaneError, FleetError

MAX_TASKS = 10_000
MAX_NAME_CHARS = 100
MAX_DEPENDENCIES = 200  # looked at one by one, each time
POLL_S = 0.5
_CLOCK_SLACK = timedelta(seconds=1)

Task = dict[str, Any]


def parse(text: str, *, name: str) -> list[Task]:
    """The items of a JSON list (one object counts as a list of one), in the order they can be created.

    Raises FleetError with every problem: not JSON, not objects, too many, unknown or doubled refs, a cycle.
    """
    try:
        items = json.loads(text)
    except ValueError as error:
        raise FleetError(f"{name}: not JSON: {error}") from None
    items = [items] if isinstance(items, dict) else items
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise FleetError(f"{name}: wanted a JSON list of objects with at least a title each")
    if len(items) > MAX_TASKS:
        raise FleetError(f"{name}: {len(items)} tasks, at most {MAX_TASKS} at once; split the file")
    return _in_order(items, name=name)


def _in_order(items: list[Task], *, name: str) -> list[Task]:
    place = {str(item.get("ref", f"#{n}")): n for n, item in enumerate(items)}
    problems = [
        f"{name}: [{n}].after: no item has the ref {ref!r}"
        for n, item in enumerate(items)
        for ref in item.get("after", [])
        if ref not in place
    ]
    if len(place) < len(items):
        refs = [item["ref"] for item in items if "ref" in item]
        problems += [f"{name}: the ref {ref!r} stands twice" for ref in sorted({r for r in refs if refs.count(r) > 1})]
    if problems:
        raise FleetError("\n".join(problems))
    graph = {n: {place[ref] for ref in item.get("after", [])} for n, item in enumerate(items)}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " -> ".join(str(items[n].get("ref", f"[{n}]")) for n in reversed(error.args[1]))
        raise FleetError(f"{name}: the items wait for each other: {circle}") from None
    return [items[n] for n in order]


def submit(
    plane: ControlPlane, items: Iterable[Task], *, told: Callable[[Task], None], idempotency_key: str | None = None
) -> None:
    """Create the tasks of an ordered list; `told` gets each as the API shows it.

    A ControlPlaneError says which of several it was, and how many stand already.
    """
    ids: dict[str, str] = {}
    items = list(items)
    for added, item in enumerate(items):
        body = {field: value for field, value in item.items() if field not in ("ref", "after")}
        after = [ids[ref] for ref in item.get("after", [])]
        if after:
            body["depends_on"] = [*body.get("depends_on", []), *after]
        try:
            task: Task = plane.post("/api/tasks", body, idempotency_key=idempotency_key)
        except ControlPlaneError as error:
            if len(items) == 1:
                raise
            name = str(item.get("ref") or item.get("title") or "a task without a title")[:MAX_NAME_CHARS]
            which = f"{name}, when {added} of {len(items)} were added"
            raise ControlPlaneError(f"{which}: {error}", status=error.status, code=error.code) from None
        if "ref" in item:
            ids[str(item["ref"])] = task["id"]
        told(task)


def wait(
    plane: ControlPlane, tasks: list[Task], *, timeout_s: float, told: Callable[[list[Task]], None]
) -> tuple[list[Task], bool]:
    """Look at the tasks until none can move any more, or the time is over (then the second value is False).

    `told` hears of the tasks at every look. A task that is blocked by anything but a dependency waits for
    a person, so it counts as unable to move.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        tasks = _look(plane, tasks)
        told(tasks)
        known = {task["id"]: task for task in tasks}
        if moving(known | _dependencies(plane, known)).isdisjoint(known):
            return tasks, True
        if time.monotonic() >= deadline:
            return tasks, False
        time.sleep(POLL_S)


def _look(plane: ControlPlane, tasks: list[Task]) -> list[Task]:
    """The tasks as they are now: a page of the list for each hundred, not a request for each."""
    if len(tasks) == 1:
        return [plane.get(f"/api/tasks/{tasks[0]['id']}")]
    wanted = {task["id"] for task in tasks}
    first = min(datetime.fromisoformat(task["created_at"]) for task in tasks) - _CLOCK_SLACK
    params = {"created_after": first.isoformat(), "sort": "created_at", "order": "asc"}
    listed, _ = plane.list("/api/tasks", params, limit=MAX_TASKS)
    now = {task["id"]: task for task in listed if task["id"] in wanted}
    return [now.get(task["id"], task) for task in tasks]


def _dependencies(plane: ControlPlane, tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks that blocked ones wait for and that are not among them, and what those wait for."""
    found: dict[str, Task] = {}
    asked = [i for task in tasks.values() for i in _waits_for(task)]
    while asked and len(found) < MAX_DEPENDENCIES:
        dependency = asked.pop()
        if dependency not in tasks and dependency not in found:
            found[dependency] = plane.get(f"/api/tasks/{dependency}")
            asked += _waits_for(found[dependency])
    return found


def _waits_for(task: Task) -> list[str]:
    blocked = task["status"] == "BLOCKED" and task.get("blocked_reason") == "dependency"
    return list(task.get("depends_on", [])) if blocked else []


def moving(tasks: Mapping[str, Task]) -> set[str]:
    """Ids of the tasks that can still move by themselves.

    A task blocked by a dependency moves as long as each of its dependencies is done, moves, or is not among these.
    """
    found = {i for i, t in tasks.items() if t["status"] in ("TODO", "IN_PROGRESS")}
    waiting = {i: _waits_for(task) for i, task in tasks.items() if _waits_for(task)}

    def may_come(dependency: str) -> bool:
        return dependency not in tasks or tasks[dependency]["status"] == "DONE" or dependency in found

    more = True
    while more:
        freed = {i for i, needed in waiting.items() if i not in found and all(map(may_come, needed))}
        more = bool(freed)
        found |= freed
    return found


def counts(tasks: Iterable[Task]) -> str:
    """`12 of 40 done, 4 in progress, 24 waiting`."""
    by_status: dict[str, int] = {}
    for task in tasks:
        by_status[task["status"]] = by_status.get(task["status"], 0) + 1
    waiting = by_status.get("TODO", 0) + by_status.get("BLOCKED", 0)
    cancelled = f", {by_status['CANCELLED']} cancelled" if "CANCELLED" in by_status else ""
    done, total = by_status.get("DONE", 0), sum(by_status.values())
    return f"{done} of {total} done, {by_status.get('IN_PROGRESS', 0)} in progress, {waiting} waiting{cancelled}"


def all_done(tasks: Iterable[Task]) -> bool:
    """Whether every task is DONE."""
    return all(task["status"] == "DONE" for task in tasks)
