"""What a task brings to its next session from those who were asked about it before: a handoff, collaborators' results.

Tasks that nobody was asked about (`TaskRow.coordinated` is false) cost nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection

from orchestrator_fleet.orchestrators import collaboration, coordination, handoff
from orchestrator_fleet.orchestrators.coordination import Coordination
from orchestrator_fleet.tasks.task import TaskRow

MAX_BYTES = 1 << 20  # as JSON: many tasks may be granted at once, and travel in one frame with all this


def along(conn: Connection, tasks: Sequence[TaskRow]) -> Mapping[str, dict[str, Any]]:
    """What stands in the JSON of these claimed tasks beside the task itself, by task.

    `handoff`: the newest, as long as its target has the task. `collaboration`: see `collaboration.results`. What goes
    beyond MAX_BYTES for all of them is named in `left_out`; the API has it.
    """
    room, found = MAX_BYTES, dict[str, dict[str, Any]]()
    for task in tasks:
        if not task.coordinated:
            continue
        told, left_out = dict[str, Any](), list[str]()
        for name, value in _of(conn, task).items():
            size = len(msgspec.json.encode(value))
            if size > room:
                left_out.append(name)
                continue
            room -= size
            told[name] = value
        found[task.id] = {**told, "left_out": left_out} if left_out else told
    return found


def _of(conn: Connection, task: TaskRow) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if one := _handed_over(coordination.of_task(conn, task.id), to=task.orchestrator):
        told["handoff"] = handoff.carried(one)
    if results := collaboration.results(conn, task.id):
        told["collaboration"] = results
    return told


def _handed_over(ones: Sequence[Coordination], *, to: str | None) -> Coordination | None:
    handed = [one for one in ones if one.kind == "handoff" and one.state == "accepted"]
    return handed[-1] if handed and handed[-1].target == to else None
