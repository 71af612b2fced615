"""`/api/tasks/{id}/why`: what holds a task."""

from __future__ import annotations

from typing import Any

from litestar import get
from sqlalchemy import Connection

from orchestrator_fleet.api.asking import OfPlane, needs
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.orchestrators import attendance, presence
from orchestrator_fleet.orchestrators.presence import Seen
from orchestrator_fleet.tasks import life, why
from orchestrator_fleet.tasks.why import Around

_READ = [needs("tasks:read")]


@get("/tasks/{task_id:str}/why", guards=_READ)
async def task_why(plane: OfPlane, task_id: str) -> dict[str, Any]:
    """What holds a task, its place in line, and when it may begin.

    `binding` is what counts, `holds` is all that would hold it: first what somebody has to end, then what ends with
    something else, then what time ends (the last to end first), then what ends as other work does.
    """
    rules, now_us = plane.control.rules, plane.clock.now_us()

    def look(conn: Connection) -> why.Why:
        name = life.get_task(conn, task_id).orchestrator
        around = {}
        if name is not None and name in plane.control.orchestrators:
            around[name] = _around(plane, name, attendance.last_seen(conn).get(name), now_us=now_us)
        return why.look(conn, task_id, rules=rules, around=around, now_us=now_us)

    return why.to_json(await plane.store.read(look))


def _around(plane: Plane, name: str, last_seen: Seen | None, *, now_us: int) -> Around:
    """What is known of its daemon, and of clients that poll for it."""
    link = plane.links.get(name)
    seen = link.seen if link is not None else last_seen
    status, reason = presence.status(seen, now_us=now_us)
    away = status == presence.OFFLINE
    return Around(
        machine=plane.control.doc.placements.get(name, ""),
        sessions_max=None if seen is None or away else seen.sessions_max,
        offline=f"{reason}, and no client polls" if away and not plane.workers.anybody(name) else "",
    )


ROUTES = [task_why]
