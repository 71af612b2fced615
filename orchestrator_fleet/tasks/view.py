"""A task as the API, the daemons and the history see it. Pure."""

from __future__ import annotations

from typing import Any

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.tasks.task import TaskRow


def to_json(task: TaskRow) -> dict[str, Any]:
    """The API's Task: RFC 3339 times; no lease token. `condition` stands only where something holds the task."""
    shown = {
        "id": task.id,
        "title": task.title,
        "description": task.description,
        "priority": task.priority,
        "status": task.status,
        "blocked_reason": task.blocked_reason,
        "orchestrator": task.orchestrator,
        "discipline": task.discipline,
        "tags": task.tags,
        "due_at": _time(task.due_at_us),
        "available_at": _time(task.available_at_us),
        "estimate_s": task.estimate_s,
        "depends_on": task.depends_on,
        "parent": task.parent,
        "metadata": task.metadata,
        "route": task.route,
        "attempt": task.attempt,
        "max_attempts": task.max_attempts,
        "created_by": task.created_by,
        "created_at": _time(task.created_at_us),
        "updated_at": _time(task.updated_at_us),
        "started_at": _time(task.started_at_us),
        "completed_at": _time(task.completed_at_us),
        "result": task.result,
        "error": task.error,
        "version": task.version,
        "generation": task.generation,
        "charter_version": task.charter_version,
    }
    if task.condition is not None:
        shown["condition"] = task.condition
    return shown


def _time(us: int | None) -> str | None:
    return None if us is None else to_rfc3339(us)
