"""What people do to orchestrators: actions one by one and in bulk, with the log of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Annotated, Any, get_args

import msgspec
from litestar import Response, get, post
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once
from orchestrator_fleet.api.acting import Did, Order, attempt, begin_restart, do
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Words, acts, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Once, Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.restarting import Ended, do_restart
from orchestrator_fleet.api.task_routes import also
from orchestrator_fleet.api.vp_routes import PATHS, check_there
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict, Invalid, TaskError
from orchestrator_fleet.orchestrators import actions
from orchestrator_fleet.orchestrators.actions import Kind
from orchestrator_fleet.wire import cursor as cursors
from orchestrator_fleet.wire.http import MAX_BATCH, Deactivate, Why
from orchestrator_fleet.wire.vps import Act, BulkVps, Selector
from orchestrator_fleet.wire.vps import Action as ActionName

WAIT_S = 30.0
# What pauses, and so may end by itself.
PAUSES = ("deactivate", "pause", "drain")
_Seq = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]

_ACTS, _MANY, _READ = [acts("fleet:write")], [needs("fleet:write")], [needs("fleet:read")]
_LATER = {202: also("It goes on: a drain until the last session has ended, a restart that takes long. The log tells.")}
_MIXED = {207: also("Some were refused, or failed; the results say which and why.")}


@post(
    [f"{path}/{{vp:str}}/activate" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Why],
    return_dto=None,
    status_code=200,
)
async def activate_vp(
    request: Asked,
    plane: OfPlane,
    vp: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Let an orchestrator claim again: a pause, or a wait for a quota, ends now. Done twice it is done."""
    return await _switched(request, plane, vp, idempotency_key, _order(request, plane, "activate", data.reason))


@post(
    [f"{path}/{{vp:str}}/deactivate" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Deactivate],
    return_dto=None,
    status_code=200,
)
async def deactivate_vp(
    request: Asked,
    plane: OfPlane,
    vp: str,
    data: Deactivate = Deactivate(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Let an orchestrator claim nothing, until a time or until it is activated. Done twice it is done.

    What runs is finished; with `drain: false` it is ended, and its tasks stand in line again.
    """
    until_us = _to_come(plane, asking.instant("until", data.until))
    order = _order(request, plane, "deactivate", data.reason, until_us=until_us, drain=data.drain)
    return await _switched(request, plane, vp, idempotency_key, order)


async def _switched(request: Asked, plane: Plane, vp: str, key: str | None, order: Order) -> Response[dict[str, Any]]:
    check_there(plane, vp)

    def write(conn: Connection) -> Reply:
        did = do(conn, plane, vp, order)
        told = {"changed": did.changed, "id": vp, **did.after, "previous": did.before["status"]}
        return Reply(content={**told, "action_id": did.action.id})

    return await once.write(request, plane, key, write)


@post(
    [f"{path}/{{vp:str}}/actions" for path in PATHS],
    guards=_ACTS,
    dto=JsonBody[Act],
    return_dto=None,
    status_code=200,
    responses=_LATER,
)
async def act_on_vp(
    request: Asked, plane: OfPlane, vp: str, data: Act, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Do something to an orchestrator.

    `activate`, `resume`: it claims again. `deactivate`, `pause`: it claims nothing until then, or until it is
    activated; what runs goes on. `drain`: the same, and the action ends when the last session has. `stop_sessions`:
    what runs is ended, stands in line again and has lost no try. `restart`: its daemon is restarted by the supervisord
    of its machine; its sessions go on. 202 while a drain or a long restart goes on: `state` is `running`, and the log
    has its end. 409 `in_progress` while the same goes on; of a restart also `unreachable`, `not_running` and
    `lease_held`, when an apply is at its machine.
    """
    check_there(plane, vp)
    until_us = asking.instant("until", data.until)
    if until_us is not None and data.action not in PAUSES:
        raise Invalid([("until", f"is only for {', '.join(PAUSES)}")])
    order = _order(request, plane, data.action, data.reason, until_us=_to_come(plane, until_us))
    if order.action == "restart":
        return await _alone(request, plane, idempotency_key, partial(_restart, plane, vp, order))

    def write(conn: Connection) -> Reply:
        did = do(conn, plane, vp, order)
        return Reply(content=_told(did), status=200 if did.action.outcome else 202)

    return await once.write(request, plane, idempotency_key, write)


@get([f"{path}/{{vp:str}}/actions" for path in PATHS], guards=_READ)
async def list_actions(
    *, plane: OfPlane, vp: str, limit: Limit, action: Words = None, cursor: Cursor = None
) -> dict[str, Any]:
    """What was done to an orchestrator, newest first."""
    check_there(plane, vp)
    kinds = asking.words("action", action, among=get_args(ActionName))
    before_seq = None if cursor is None else cursors.read(cursor, _Seq)
    page = await plane.store.read(lambda conn: actions.page(conn, vp, kinds=kinds, before_seq=before_seq, limit=limit))
    next_cursor = None if page.next_seq is None else cursors.write(page.next_seq)
    shown = [actions.to_json(one) for one in page.rows]
    return asking.page(shown, limit=limit, total=page.total, next_cursor=next_cursor)


@post(
    [f"{path}/bulk" for path in PATHS],
    guards=_MANY,
    dto=JsonBody[BulkVps],
    return_dto=None,
    status_code=200,
    responses=_MIXED,
)
async def act_on_many(
    request: Asked, plane: OfPlane, data: BulkVps, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Do the same to many orchestrators: those named, in that order, or those that a selector means, by name.

    Each is done by itself, and one that is refused leaves the others done: 207, and `results` says which and why. What
    goes on after a while (drains, restarts) has `state: running` there. `dry_run` says whom it would change.
    """
    acts_for = request.auth.acts_for
    names = _targets(plane, data, acts_for=acts_for)
    order = _order(request, plane, data.action, data.reason)

    async def work() -> Reply:
        refused = {name: error for name in names if (error := _refusal(plane, name, acts_for=acts_for))}
        going = [name for name in names if name not in refused]
        results = refused | await _each(plane, going, order, dry_run=data.dry_run)
        told = [_outcome(name, results[name], dry_run=data.dry_run) for name in names]
        failed = sum(not one["ok"] for one in told)
        counts = {"action": data.action, "dry_run": data.dry_run, "matched": len(names), "failed": failed}
        return Reply(content={**counts, "results": told}, status=207 if failed else 200)

    return await _alone(request, plane, idempotency_key, work)


def _targets(plane: Plane, data: BulkVps, *, acts_for: str | None) -> list[str]:
    """Whom it is about; raises Invalid with all that is wrong."""
    wrong = []
    if (data.ids is None) == (data.selector is None):
        wrong.append(("ids", "give either ids or selector"))
    ids = data.ids or []
    if doubles := sorted({name for name in ids if ids.count(name) > 1}):
        wrong.append(("ids", f"names {', '.join(doubles)} more than once"))
    if data.selector is not None and not (data.selector.labels or data.selector.discipline):
        wrong.append(("selector", "it names nothing and so means everybody; give a label or a discipline"))
    if wrong:
        raise Invalid(wrong)
    if data.selector is None:
        return ids
    # A key of an orchestrator's own learns nothing of the others.
    found = [name for name in _selected(plane, data.selector) if acts_for in (None, name)]
    if len(found) > MAX_BATCH:
        raise Invalid([("selector", f"it means {len(found)} orchestrators, wanted at most {MAX_BATCH}; narrow it")])
    return found


def _selected(plane: Plane, by: Selector) -> list[str]:
    disciplines = (by.discipline,) if isinstance(by.discipline, str) else tuple(by.discipline or ())
    return sorted(
        name
        for name, spec in plane.control.orchestrators.items()
        if (not disciplines or spec.get("discipline") in disciplines)
        and by.labels.items() <= (spec.get("labels") or {}).items()
    )


def _refusal(plane: Plane, name: str, *, acts_for: str | None) -> TaskError | None:
    """Why this one may not be acted on; whether another exists is not for an orchestrator's key to learn."""
    if acts_for not in (None, name):
        return asking.for_it_alone(acts_for)
    try:
        check_there(plane, name)
    except TaskError as error:
        return error
    return None


async def _each(plane: Plane, names: Sequence[str], order: Order, *, dry_run: bool) -> dict[str, Did | TaskError]:
    """Do it to each, in a transaction of its own."""
    if order.action == "restart" and not dry_run:
        return await _restart_many(plane, names, order)
    act = attempt if dry_run else do
    done: dict[str, Did | TaskError] = {}
    for name in names:
        done[name] = await _unless_refused(plane, partial(act, plane=plane, vp=name, order=order))
        plane.pulse.nudge()
    return done


async def _restart_many(plane: Plane, names: Sequence[str], order: Order) -> dict[str, Did | TaskError]:
    done: dict[str, Did | TaskError] = {}
    tasks: dict[str, asyncio.Task[Ended]] = {}
    for name in names:
        done[name] = begun = await _unless_refused(plane, partial(begin_restart, plane=plane, vp=name, order=order))
        if isinstance(begun, Did):
            tasks[name] = plane.errands.begin(do_restart(plane, begun.action, before=begun.before))
    await _wait(plane, tasks.values())
    return done | {name: _ended(task.result()) for name, task in tasks.items() if task.done()}


async def _unless_refused(plane: Plane, do: Callable[[Connection], Did]) -> Did | TaskError:
    try:
        return await plane.store.write(do)
    except TaskError as error:
        return error


def _ended(ended: Ended) -> Did | TaskError:
    if ended.refused is not None:
        return ended.refused
    if ended.action.outcome == "failed":
        return Conflict("failed", ended.action.detail or "")
    return Did(action=ended.action, changed=True, before=ended.before, after=ended.after)


def _outcome(name: str, done: Did | TaskError, *, dry_run: bool) -> dict[str, Any]:
    if isinstance(done, TaskError):
        return {"id": name, "ok": False, "error": {"code": done.code, "message": str(done)}}
    if dry_run:
        return {"id": name, "ok": True, "would_change": done.changed, "status": done.before.get("status")}
    told = _told(done)
    shown = ("changed", "previous", "status", "state", "outcome", "detail")
    return {"id": name, "ok": True, "action_id": told["id"], **{field: told[field] for field in shown}}


async def _restart(plane: Plane, vp: str, order: Order) -> Reply:
    begun = await plane.store.write(partial(begin_restart, plane=plane, vp=vp, order=order))
    plane.pulse.nudge()
    task = plane.errands.begin(do_restart(plane, begun.action, before=begun.before))
    await _wait(plane, [task])
    if not task.done():
        return Reply(content=_told(begun), status=202)
    ended = task.result()
    if ended.refused is not None:
        raise ended.refused
    did = Did(action=ended.action, changed=True, before=ended.before, after=ended.after)
    return Reply(content=_told(did))


async def _wait(plane: Plane, tasks: Collection[asyncio.Task[Ended]]) -> None:
    """Until all have ended, at most WAIT_S, or until the control plane closes."""
    if not tasks:
        return
    ended, closing = asyncio.ensure_future(asyncio.wait(tasks)), asyncio.ensure_future(plane.closing.wait())
    try:
        await asyncio.wait({ended, closing}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended.cancel()
        closing.cancel()


async def _alone(
    request: Asked, plane: Plane, key: str | None, work: Callable[[], Awaitable[Reply]]
) -> Response[dict[str, Any]]:
    """Answer what takes more than one transaction: once for each Idempotency-Key, refused while it goes on."""
    kept = await once.keyed(request, plane, key)
    if kept is None:
        return once.respond(plane, await work())
    with plane.errands.answering(actor=kept.actor, key=kept.key, fingerprint=kept.fingerprint):
        reply = await plane.store.write(kept.before)
        if reply is None:
            reply = await work()
            await plane.store.write(partial(_keep, kept=kept, reply=reply))
        return once.respond(plane, reply)


def _keep(conn: Connection, *, kept: Once, reply: Reply) -> None:
    if kept.before(conn) is None:  # else another control plane was asked the same meanwhile
        kept.keep(conn, reply)


def _told(did: Did) -> dict[str, Any]:
    shown = {"changed": did.changed, "previous": did.before.get("status"), **did.after}
    return {**actions.to_json(did.action), **shown}


def _order(
    request: Asked, plane: Plane, action: Kind, reason: str, *, until_us: int | None = None, drain: bool = True
) -> Order:
    return Order(
        action=action,
        reason=reason or None,
        actor=request.auth.actor,
        now_us=plane.clock.now_us(),
        until_us=until_us,
        drain=drain,
    )


def _to_come(plane: Plane, until_us: int | None) -> int | None:
    if until_us is not None and until_us <= plane.clock.now_us():
        raise Invalid([("until", f"got {to_rfc3339(until_us)}, wanted a time to come")])
    return until_us


ROUTES = [activate_vp, deactivate_vp, act_on_vp, list_actions, act_on_many]
