"""The control plane about itself: is it well, what is the fleet, what was."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import msgspec
from litestar import MediaType, Response, get, post
from litestar.params import Parameter

from orchestrator_fleet import __version__
from orchestrator_fleet.api import applying, asking, once, reconciler
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Words, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.task_routes import also
from orchestrator_fleet.api.vp_routes import applied_generation
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict, FleetError, Invalid, Refused, SpecInvalid, UsageError
from orchestrator_fleet.machines import generations, journal
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.orchestrators import board, presence
from orchestrator_fleet.plan import show
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.reconcile.fleet import Planned
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.store import outbox
from orchestrator_fleet.tasks import life
from orchestrator_fleet.wire.http import Sql
from orchestrator_fleet.wire.vps import ApplyFleet

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


@get("/api/fleet/plan", guards=[needs("fleet:read")])
async def get_plan(
    *,
    plane: OfPlane,
    only: Words = None,
    allow_deletes: Annotated[
        bool, Parameter(description="Plan even for more deletes than rollout.max_deletes.")
    ] = False,
) -> Response[bytes]:
    """What an apply would do now, and why, as `fleet plan --format json` prints it. Changes nothing anywhere."""
    names = asking.words("only", only)
    planned = await _planned(plane, only=names or None, allow_deletes=allow_deletes)
    return Response(show.to_json(planned.plan), media_type=MediaType.JSON)


@post(
    "/api/fleet/apply",
    guards=[needs("fleet:write")],
    dto=JsonBody[ApplyFleet],
    return_dto=None,
    status_code=200,
    responses={202: also("It takes longer than a minute and goes on; GET /api/fleet/plan tells when it is done.")},
)
async def apply_fleet(
    request: Asked,
    plane: OfPlane,
    data: ApplyFleet = ApplyFleet(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Make the machines match the fleet's files. `result` says what came of it, also where machines went back.

    `dry_run` answers the plan alone. 409 when it must not be: somebody else applies, or a guard of the plan says no.
    """
    asking.check_for_all(request.auth)
    ask = await once.keyed(request, plane, idempotency_key)
    if (answered := await once.answered(plane, ask)) is not None:
        return answered
    if data.dry_run:
        planned = await _planned(plane, only=data.only, allow_deletes=data.allow_deletes)
        plan = {"summary": show.summary(planned.plan), "plan": msgspec.to_builtins(planned.plan)}
        return await once.keep(plane, ask, Reply(content={"dry_run": True, "result": "planned", **plan}))
    try:
        done = await applying.apply(plane, actor=request.auth.actor, only=data.only, allow_deletes=data.allow_deletes)
    except UsageError as wrong:
        raise Invalid([("only", str(wrong).removeprefix("--only: "))]) from None
    if done is None:
        return await once.keep(plane, ask, Reply(content={"dry_run": False, **applying.told(None)}, status=202))
    if done.report is None and not done.good:
        raise Conflict(done.result, done.problem)
    return await once.keep(plane, ask, Reply(content={"dry_run": False, **done.to_json()}))


async def _planned(plane: Plane, *, only: Collection[str] | None, allow_deletes: bool) -> Planned:
    try:
        return await plane.reconciler.plan(only=only, allow_deletes=allow_deletes)
    except UsageError as wrong:
        raise Invalid([("only", str(wrong).removeprefix("--only: "))]) from None
    except (Refused, SpecInvalid) as problem:
        raise Conflict(reconciler.result_of(problem), str(problem)) from None


@get("/api/fleet/generations", guards=[needs("fleet:read")])
async def list_generations(*, plane: OfPlane, limit: Limit, cursor: Cursor = None) -> dict[str, Any]:
    """The generations of the control plane and of the machines on this host: all that are there, youngest first.

    `current` is in force, `last_good` is the one that was confirmed healthy last: where a failed apply goes back to.
    """
    state = State(plane.fleet_file)
    roots = {CONTROL_PLANE: state.control_root, **await asyncio.to_thread(state.local_roots)}
    names = sorted(name for name in roots if cursor is None or name > cursor)
    shown = await asyncio.to_thread(lambda: [_generations(name, roots[name]) for name in names[:limit]])
    next_cursor = names[limit - 1] if len(names) > limit else None
    return asking.page(shown, limit=limit, total=len(roots), next_cursor=next_cursor)


def _generations(name: str, root: Path) -> dict[str, Any]:
    layout = Layout(root)
    entries = journal.read(layout.journal)
    there, ages = generations.present(layout), journal.ages(entries)
    confirmed = {entry.digest: to_rfc3339(entry.at_us) for entry in entries if entry.step == journal.CONFIRMED}
    rejected = journal.rejected(entries)
    return {
        "target": name,
        "current": generations.current(layout),
        "last_good": journal.last_good(entries, present=there),
        "generations": [
            {"digest": digest, "confirmed_at": confirmed.get(digest), "rejected": rejected.get(digest)}
            for digest in sorted(there, key=lambda digest: ages.get(digest, -1), reverse=True)
        ],
    }


ROUTES = [healthz, readyz, get_fleet, ask_history, get_plan, apply_fleet, list_generations]
