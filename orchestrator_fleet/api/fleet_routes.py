"""The control plane about itself: is it well, what is the fleet, what was."""

from __future__ import annotations

from collections import Counter
from typing import Any

from litestar import Response, get, post

from orchestrator_fleet import __version__
from orchestrator_fleet.api.asking import OfPlane, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.vp_routes import applied_generation
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.orchestrators import board, presence
from orchestrator_fleet.store import outbox
from orchestrator_fleet.tasks import life
from orchestrator_fleet.wire.http import Sql

SQL_SCOPE = "history:sql"


@get("/healthz")
async def healthz() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok", "version": __version__}


@get("/readyz")
async def readyz(plane: OfPlane) -> Response[dict[str, str]]:
    """It can serve: the store answers, and it is not closing."""
    if plane.closing.is_set():
        return Response({"status": "closing"}, status_code=503)
    try:
        await plane.store.read(outbox.last_seq)
    except FleetError as problem:
        return Response({"status": "store unavailable", "detail": str(problem)}, status_code=503)
    return Response({"status": "ready"})


@get("/api/fleet", guards=[needs("fleet:read")])
async def get_fleet(plane: OfPlane) -> dict[str, Any]:
    """The fleet in one look: machines, how many orchestrators and tasks in which state."""
    control, now_us = plane.control, plane.clock.now_us()
    names = list(control.orchestrators)
    seen, tasks = await plane.store.read(
        lambda conn: (board.look(conn, names, now_us=now_us), life.count_by_status(conn))
    )
    statuses = Counter(
        presence.status(plane.links[name].seen if name in plane.links else seen.seen.get(name), now_us=now_us)[0]
        for name in names
    )
    return {
        "fleet": control.doc.fleet,
        "generation": control.generation,
        "machines": {
            name: {
                "address": machine.get("address", "local"),
                "labels": machine.get("labels") or {},
                "generation": applied_generation(plane, name),
                "orchestrators": sorted(vp for vp, where in control.doc.placements.items() if where == name),
            }
            for name, machine in sorted(control.doc.spec["machines"].items())
        },
        "orchestrators": {"total": len(names), "by_status": dict(sorted(statuses.items()))},
        "tasks": {"total": sum(tasks.values()), "by_status": dict(sorted(tasks.items()))},
    }


@post("/api/sql", guards=[needs(SQL_SCOPE)], dto=JsonBody[Sql], return_dto=None, status_code=200)
async def ask_history(plane: OfPlane, data: Sql) -> dict[str, Any]:
    """Ask history in SQL, read-only. What was committed before the question is in the answer."""
    answer = await plane.history.ask(data.query, data.params, limit=data.limit)
    return {
        "columns": answer.columns,
        "types": answer.types,
        "rows": answer.rows,
        "truncated": answer.truncated,
    }


ROUTES = [healthz, readyz, get_fleet, ask_history]
