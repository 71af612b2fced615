"""What orchestrators ask of each other: delegate, hand over; look at what was asked, accept it, send it back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Annotated, Any, get_args

from litestar import Response, get, post
from litestar.params import QueryParameter
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Text, Words, acts
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.settle import hand_over
from orchestrator_fleet.api.task_routes import also
from orchestrator_fleet.api.vp_routes import PATHS, check_there
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.errors import Conflict, Invalid
from orchestrator_fleet.orchestrators import asked, coordination, delegation, handoff
from orchestrator_fleet.orchestrators.asked import Answer, Role
from orchestrator_fleet.orchestrators.coordination import Coordination, Kind, State
from orchestrator_fleet.tasks import rows, view
from orchestrator_fleet.tasks.task import TaskRow
from orchestrator_fleet.wire.http import MAX_WORDS
from orchestrator_fleet.wire.vps import Decide, Delegate, HandOff

_READ, _ACTS = [acts("fleet:read", own="tasks:work")], [acts("tasks:write", own="tasks:work")]
UNDER_WAY = 202
# A handler's own `state` is Litestar's word for something else.
InState = Annotated[
    list[str] | None,
    QueryParameter(name="state", max_items=MAX_WORDS, description="Repeatable, or separated by commas."),
]


@post(
    [f"{path}/{{vp:str}}/delegate" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Delegate],
    return_dto=None,
    status_code=201,
)
async def delegate(
    request: Asked, plane: OfPlane, vp: str, data: Delegate, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Give a task to another orchestrator, which takes it by claiming it, or sends it back.

    A session that runs is ended first; the try does not count.
    """
    check_there(plane, vp)
    wrong, fields = _unknown(plane, data.to), dict[str, Any]()
    if data.priority is not None:
        fields["priority"] = data.priority
    if data.due_at is not None:
        try:
            fields["due_at_us"] = asking.instant("due_at", data.due_at)
        except Invalid as problem:
            wrong += problem.errors
    actor, now_us = request.auth.actor, plane.clock.now_us()

    def write(conn: Connection) -> Reply:
        one, task = delegation.delegate(
            conn,
            task_id=data.task,
            source=vp,
            target=data.to,
            note=data.note or None,
            fields=fields,
            actor=actor,
            now_us=now_us,
            wrong=wrong,
        )
        location = f"/api/vps/{vp}/coordinations/{one.id}"
        return Reply(content=_shown(one, task), status=201, headers={"Location": location})

    return await once.write(request, plane, idempotency_key, write)


@post(
    [f"{path}/{{vp:str}}/handoff" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[HandOff],
    return_dto=None,
    status_code=200,
    responses={UNDER_WAY: also("Its session is still being ended; the task is handed over right after that.")},
)
async def hand_off(
    request: Asked, plane: OfPlane, vp: str, data: HandOff, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Give a task to another orchestrator with what is known of it, which its sessions are told and it remembers.

    A session that runs on a machine is ended first, and waited for, up to 15 s; the try does not count.
    """
    check_there(plane, vp)
    repeatable = await once.keyed(request, plane, idempotency_key)
    wrong, actor, now_us = _unknown(plane, data.to), request.auth.actor, plane.clock.now_us()

    def begin(conn: Connection) -> Reply:
        if repeatable is not None and (before := repeatable.before(conn)) is not None:
            return before
        one, task = handoff.begin(
            conn,
            task_id=data.task,
            source=vp,
            target=data.to,
            notes=data.notes or None,
            context=data.context,
            completion=data.completion,
            actor=actor,
            now_us=now_us,
            wrong=wrong,
        )
        reply = _handed_over(one, task)
        if repeatable is not None:
            repeatable.keep(conn, reply)
        return reply

    reply = await plane.store.write(begin)
    plane.pulse.nudge()
    if reply.status == UNDER_WAY:
        reply = await _finish(plane, reply, repeatable)
    return once.respond(plane, reply)


async def _finish(plane: Plane, reply: Reply, repeatable: once.Once | None) -> Reply:
    """Wait until a handoff that is under way is over, and answer (from now on) how it is then."""
    of = reply.headers["Location"].rpartition("/")[2]
    await _wait_until_over(plane, of)

    def look(conn: Connection) -> Reply:
        one = coordination.find(conn, of)
        if one.state == "expired":
            raise Conflict("not_handed_over", f"{one.id}: {one.reason}")
        now = _handed_over(one, rows.get(conn, one.task))
        if repeatable is not None and now.status != UNDER_WAY:
            repeatable.replace(conn, now)
        return now

    return await plane.store.write(look)


async def _wait_until_over(plane: Plane, of: str) -> None:
    """Return when a handoff is not pending any more, which is soon after its time at the latest; or at the closing."""
    loop = asyncio.get_running_loop()
    one = await plane.store.read(lambda conn: coordination.find(conn, of))
    left_us = (one.expires_at_us or 0) - plane.clock.now_us()
    ends_at = loop.time() + min(max(left_us / SECOND_US, 0.0), handoff.STOP_S)
    with plane.readers.waiting(one.task) as woken:
        while not plane.closing.is_set():
            woken.clear()
            one = await plane.store.read(lambda conn: coordination.find(conn, of))
            if one.state != "pending":
                return
            if loop.time() >= ends_at:
                await hand_over(plane, of, stopped=False)
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(ends_at):
                    await woken.wait()


@get([f"{path}/{{vp:str}}/coordinations" for path in PATHS], guards=_READ)
async def list_coordinations(
    *,
    plane: OfPlane,
    vp: str,
    limit: Limit,
    in_state: InState = None,
    kind: Words = None,
    role: Text = None,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """What an orchestrator asked of others (role=source) and they of it (role=target), the newest first."""
    check_there(plane, vp)
    query = asking.Query()
    states = query.words("state", in_state, among=get_args(State))
    kinds = query.words("kind", kind, among=get_args(Kind))
    side: Any = None if role is None else query.one_of("role", role, among=Role, default="")
    query.check()
    page = await plane.store.read(
        lambda conn: asked.page(conn, vp, role=side, kinds=kinds, states=states, cursor=cursor, limit=limit)
    )
    shown = [coordination.to_json(one) for one in page.rows]
    return asking.page(shown, limit=limit, total=page.total, next_cursor=page.next_cursor)


@get([f"{path}/{{vp:str}}/coordinations/{{of:str}}" for path in PATHS], guards=_READ)
async def get_coordination(plane: OfPlane, vp: str, of: str) -> dict[str, Any]:
    """One of them."""
    check_there(plane, vp)
    return coordination.to_json(await plane.store.read(lambda conn: asked.find(conn, of, vp)))


@post(
    [f"{path}/{{vp:str}}/coordinations/{{of:str}}/accept" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Decide],
    return_dto=None,
    status_code=200,
)
async def accept(
    *,
    request: Asked,
    plane: OfPlane,
    vp: str,
    of: str,
    data: Decide = Decide(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Say yes to what was asked of it; a claim of the task says so too."""
    return await once.write(
        request, plane, idempotency_key, _answer(request, plane, vp=vp, of=of, said="accept", data=data)
    )


@post(
    [f"{path}/{{vp:str}}/coordinations/{{of:str}}/reject" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Decide],
    return_dto=None,
    status_code=200,
)
async def reject(
    *,
    request: Asked,
    plane: OfPlane,
    vp: str,
    of: str,
    data: Decide = Decide(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Say no to what was asked of it: a delegated task goes back to who had it, and a session that runs is ended."""
    return await once.write(
        request, plane, idempotency_key, _answer(request, plane, vp=vp, of=of, said="reject", data=data)
    )


def _answer(
    request: Asked, plane: Plane, *, vp: str, of: str, said: Answer, data: Decide
) -> Callable[[Connection], Reply]:
    check_there(plane, vp)
    reason, actor, now_us = data.reason or None, request.auth.actor, plane.clock.now_us()

    def write(conn: Connection) -> Reply:
        one, task = asked.answer(conn, of, vp, said, reason=reason, actor=actor, now_us=now_us)
        return Reply(content=_shown(one, task))

    return write


def _unknown(plane: Plane, to: str) -> list[tuple[str, str]]:
    return [] if to in plane.control.orchestrators else [("to", f"there is no orchestrator {to}")]


def _handed_over(one: Coordination, task: TaskRow) -> Reply:
    status = UNDER_WAY if one.state == "pending" else 200
    location = f"/api/vps/{one.source}/coordinations/{one.id}"
    return Reply(content=_shown(one, task), status=status, headers={"Location": location})


def _shown(one: Coordination, task: TaskRow) -> dict[str, Any]:
    return {**coordination.to_json(one), "task": view.to_json(task)}


ROUTES = [delegate, hand_off, list_coordinations, get_coordination, accept, reject]
