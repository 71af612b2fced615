"""`/api/vps/{id}/escalate` and `/collaborate`: an orchestrator asks above for a word, and others for a part."""

from __future__ import annotations

from typing import Any

from litestar import Response, post
from sqlalchemy import Connection

from orchestrator_fleet.api import once
from orchestrator_fleet.api.asking import Asked, OfPlane, acts
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.vp_routes import PATHS, check_there
from orchestrator_fleet.orchestrators import collaboration, coordination, escalation
from orchestrator_fleet.orchestrators.collaboration import Wanted
from orchestrator_fleet.tasks import view
from orchestrator_fleet.wire.vps import Collaborate, Escalate

_ACTS = [acts("tasks:write", own="tasks:work")]


@post(
    [f"{path}/{{vp:str}}/escalate" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Escalate],
    return_dto=None,
    status_code=201,
)
async def escalate(
    request: Asked, plane: OfPlane, vp: str, data: Escalate, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Ask above about a task: it is BLOCKED/escalation until somebody approves, rejects or unblocks it.

    Goes up `escalate_to` (from `to` on, or to `to` alone and what is above that), a level each time nobody answers in
    `escalation_timeout`; a person is asked until somebody decides.
    """
    check_there(plane, vp)
    declared, actor, now_us = plane.control.orchestrators, request.auth.actor, plane.clock.now_us()

    def write(conn: Connection) -> Reply:
        done = escalation.escalate(
            conn,
            source=vp,
            task_id=data.task,
            reason=data.reason,
            severity=data.severity,
            to=data.to,
            declared=declared,
            actor=actor,
            now_us=now_us,
        )
        content = {**coordination.to_json(done.asked), "task": view.to_json(done.changed.task)}
        return Reply(content=content, status=201)

    return await once.write(request, plane, idempotency_key, write)


@post(
    [f"{path}/{{vp:str}}/collaborate" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Collaborate],
    return_dto=None,
    status_code=201,
)
async def collaborate(
    request: Asked, plane: OfPlane, vp: str, data: Collaborate, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Ask others for a part of a task: each gets a child task, and what comes of it is an event of this one.

    With mode `advise` the task goes on meanwhile; with `split` it waits for them, and a session that runs is ended.
    """
    check_there(plane, vp)
    dispatch, actor, now_us = plane.control.dispatch, request.auth.actor, plane.clock.now_us()
    wanted = Wanted(collaborators=data.with_, roles=data.roles, note=data.note, mode=data.mode)

    def write(conn: Connection) -> Reply:
        done = collaboration.collaborate(
            conn, source=vp, task_id=data.task, wanted=wanted, dispatch=dispatch, actor=actor, now_us=now_us
        )
        content = {
            "id": done.id,
            "mode": data.mode,
            "task": view.to_json(done.changed.task),
            "collaborations": [coordination.to_json(one) for one in done.asked],
        }
        return Reply(content=content, status=201)

    return await once.write(request, plane, idempotency_key, write)


ROUTES = [escalate, collaborate]
