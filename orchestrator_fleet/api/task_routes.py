"""`/api/tasks`: what people and services do with tasks."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from litestar import MediaType, Response, delete, get, post, put
from litestar.params import Parameter
from msgspec import UNSET
from sqlalchemy import Connection

from orchestrator_fleet.api import asking
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Text, Time, Words, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import Forbidden
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict, Invalid, TaskError
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.store import idempotency
from orchestrator_fleet.store.idempotency import Answered
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import life, view
from orchestrator_fleet.tasks.queries import Filters, Sort
from orchestrator_fleet.tasks.task import PRIORITIES, STATUSES, NewTask, TaskRow
from orchestrator_fleet.wire.http import MAX_IDEMPOTENCY_KEY_CHARS, AssignTasks, CreateTask, EditTask, Why

Order = Literal["asc", "desc"]
PURGE_SCOPE = "admin"

_READ, _WRITE = [needs("tasks:read")], [needs("tasks:write")]
_TIMES = {"due_at": "due_at_us", "available_at": "available_at_us"}


def shown(task: TaskRow, *, status_code: int = 200) -> Response[dict[str, Any]]:
    """One task with its ETag."""
    return Response(view.to_json(task), status_code=status_code, headers={"ETag": f'"{task.version}"'})


@get("/tasks", guards=_READ)
async def list_tasks(
    *,
    plane: OfPlane,
    limit: Limit,
    status: Words = None,
    priority: Words = None,
    orchestrator: Words = None,
    discipline: Words = None,
    tag: Words = None,
    q: Text = None,
    due_before: Time = None,
    due_after: Time = None,
    created_after: Time = None,
    sort: Text = None,
    order: Text = None,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """Tasks, by default in the order in which they will be claimed."""
    filters = Filters(
        status=asking.words("status", status, among=STATUSES),
        priority=asking.words("priority", priority, among=PRIORITIES),
        orchestrator=asking.words("orchestrator", orchestrator),
        discipline=asking.words("discipline", discipline),
        tag=asking.words("tag", tag),
        q=q or "",
        due_before_us=asking.instant(due_before),
        due_after_us=asking.instant(due_after),
        created_after_us=asking.instant(created_after),
    )
    by: Sort = asking.one_of("sort", sort, among=Sort, default="claim")  # type: ignore[assignment] # one of Sort's words
    descending = asking.one_of("order", order, among=Order, default="asc") == "desc"
    now_us = plane.clock.now_us()
    page = await plane.store.read(
        lambda conn: life.list_tasks(
            conn, filters=filters, now_us=now_us, sort=by, descending=descending, cursor=cursor, limit=limit
        )
    )
    return asking.page(
        [view.to_json(task) for task in page.rows], limit=limit, total=page.total, next_cursor=page.next_cursor
    )


@post("/tasks", guards=_WRITE, dto=JsonBody[CreateTask], return_dto=None)
async def create_task(
    request: Asked,
    plane: OfPlane,
    data: CreateTask,
    idempotency_key: Annotated[str | None, Parameter(header="Idempotency-Key")] = None,
) -> Response[bytes]:
    """Make a task; it is routed at once. The same `Idempotency-Key` again gets the first answer again."""
    _check_idempotency_key(idempotency_key)
    actor, now_us = request.auth.actor, plane.clock.now_us()
    fingerprint = hashlib.sha256(b"POST /api/tasks\n" + await request.body()).hexdigest()
    key = idempotency_key

    def create(conn: Connection) -> Answered:
        if key and (before := idempotency.find(conn, actor=actor, key=key, fingerprint=fingerprint)):
            return before
        task = life.create_task(conn, new=_new_task(data), dispatch=plane.control.dispatch, actor=actor, now_us=now_us)
        answered = Answered(
            actor=actor,
            key=key or "",
            fingerprint=fingerprint,
            status=201,
            headers={"Location": f"/api/tasks/{task.id}", "ETag": f'"{task.version}"'},
            body=msgspec.json.encode(view.to_json(task)).decode(),
            at_us=now_us,
        )
        if key:
            idempotency.remember(conn, answered)
        return answered

    answered = await plane.store.write(create)
    plane.pulse.nudge()
    return Response(
        answered.body.encode(),
        status_code=answered.status,
        headers=answered.headers,
        media_type=MediaType.JSON,
    )


def _check_idempotency_key(key: str | None) -> None:
    if key is not None and not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS:
        wanted = f"got {len(key)} characters, wanted 1 to {MAX_IDEMPOTENCY_KEY_CHARS}"
        raise Invalid([("Idempotency-Key", wanted)])


@get("/tasks/{task_id:str}", guards=_READ)
async def get_task(plane: OfPlane, task_id: str) -> Response[dict[str, Any]]:
    """One task."""
    return shown(await plane.store.read(lambda conn: life.get_task(conn, task_id)))


@put("/tasks/{task_id:str}", guards=_WRITE, dto=JsonBody[EditTask], return_dto=None)
async def edit_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: EditTask,
    if_match: Annotated[str | None, Parameter(header="If-Match")] = None,
) -> Response[dict[str, Any]]:
    """Change some fields; with `If-Match` only if nobody changed the task since."""
    if data.status is not UNSET and not _is_persons(request.auth, plane):
        raise Forbidden(f"the key of {request.auth.owner} can't set a status; poll and complete instead")
    version, actor = asking.version_of(if_match), request.auth.actor
    task = await plane.store.write(lambda conn: _edit(conn, plane, data, task_id, version=version, actor=actor))
    plane.pulse.nudge()
    return shown(task)


def _edit(
    conn: Connection,
    plane: Plane,
    data: EditTask,
    task_id: str,
    *,
    version: int | None,
    actor: str,
) -> TaskRow:
    now_us = plane.clock.now_us()
    task = life.get_task(conn, task_id)
    if version is not None and version != task.version:
        raise Conflict("stale", f"{task_id}: it is at version {task.version}; read it again")
    if fields := _fields(data):
        task = life.update_task(conn, task_id=task_id, fields=fields, version=None, actor=actor, now_us=now_us)
    if data.orchestrator is not UNSET:
        _check_known(plane, data.orchestrator)
        task = life.assign(
            conn, task_id=task_id, orchestrator=data.orchestrator, reason=None, actor=actor, now_us=now_us
        ).task
    if data.status is not UNSET:
        task = life.set_status(conn, task_id=task_id, status=data.status, reason=None, actor=actor, now_us=now_us).task
    return task


@delete("/tasks/{task_id:str}", guards=_WRITE)
async def delete_task(request: Asked, plane: OfPlane, task_id: str, purge: bool = False) -> None:  # noqa: FBT001, FBT002 - a query parameter
    """Cancel a task; with `purge`, remove one that has ended."""
    actor = request.auth.actor
    if purge:
        if not request.auth.allows(PURGE_SCOPE):
            raise Forbidden(f"purging needs a key with the scope {PURGE_SCOPE}")
        await plane.store.write(
            lambda conn: life.purge(conn, task_id=task_id, actor=actor, now_us=plane.clock.now_us())
        )
    else:
        await _cancel(plane, task_id, reason=None, actor=actor)
    plane.pulse.nudge()


@post("/tasks/assign", guards=_WRITE, dto=JsonBody[AssignTasks], return_dto=None)
async def assign_tasks(request: Asked, plane: OfPlane, data: AssignTasks) -> Response[dict[str, Any]]:
    """Give tasks to an orchestrator, each in its own transaction; 207 when some could not be given."""
    _check_known(plane, data.orchestrator)
    actor, now_us = request.auth.actor, plane.clock.now_us()
    results: list[dict[str, Any]] = []
    for task_id in dict.fromkeys(data.task_ids):
        try:
            await plane.store.write(
                lambda conn, task_id=task_id: life.assign(  # type: ignore[misc] # bound now, not when it runs
                    conn,
                    task_id=task_id,
                    orchestrator=data.orchestrator,
                    reason=data.reason or None,
                    actor=actor,
                    now_us=now_us,
                )
            )
            results.append({"id": task_id, "ok": True})
        except TaskError as problem:
            results.append({"id": task_id, "ok": False, "error": {"code": problem.code, "message": str(problem)}})
    plane.pulse.nudge()
    return Response({"results": results}, status_code=200 if all(one["ok"] for one in results) else 207)


@post("/tasks/{task_id:str}/cancel", guards=_WRITE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def cancel_task(request: Asked, plane: OfPlane, task_id: str, data: Why = Why()) -> Response[dict[str, Any]]:  # noqa: B008 - an immutable struct
    """Cancel a task; a running session is ended."""
    task = await _cancel(plane, task_id, reason=data.reason or None, actor=request.auth.actor)
    plane.pulse.nudge()
    return shown(task)


@post("/tasks/{task_id:str}/retry", guards=_WRITE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def retry_task(request: Asked, plane: OfPlane, task_id: str, data: Why = Why()) -> Response[dict[str, Any]]:  # noqa: B008 - an immutable struct
    """Do it again: a blocked task goes back in line (200); an ended one becomes a new task (201)."""
    task = await plane.store.write(
        lambda conn: life.retry(
            conn,
            task_id=task_id,
            dispatch=plane.control.dispatch,
            reason=data.reason or None,
            actor=request.auth.actor,
            now_us=plane.clock.now_us(),
        )
    )
    plane.pulse.nudge()
    return shown(task, status_code=200 if task.id == task_id else 201)


@post("/tasks/{task_id:str}/unblock", guards=_WRITE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def unblock_task(request: Asked, plane: OfPlane, task_id: str, data: Why = Why()) -> Response[dict[str, Any]]:  # noqa: B008 - an immutable struct
    """Put a blocked task back in line."""
    task = await plane.store.write(
        lambda conn: life.unblock(
            conn,
            task_id=task_id,
            reason=data.reason or None,
            actor=request.auth.actor,
            now_us=plane.clock.now_us(),
        )
    )
    plane.pulse.nudge()
    return shown(task)


@get("/tasks/{task_id:str}/events", guards=_READ)
async def task_events(plane: OfPlane, task_id: str, limit: Limit, cursor: Cursor = None) -> dict[str, Any]:
    """What happened to a task, oldest first."""
    after = sequence(cursor)
    events = await plane.store.read(lambda conn: life.events_of(conn, task_id=task_id, after_seq=0))
    rest = [event for event in events if event.seq > after]
    some = rest[:limit]
    next_cursor = str(some[-1].seq) if len(rest) > limit else None
    return asking.page([event_json(one) for one in some], limit=limit, total=len(events), next_cursor=next_cursor)


def event_json(event: Event) -> dict[str, Any]:
    """An event as the API shows it."""
    return {
        "seq": event.seq,
        "at": to_rfc3339(event.at_us),
        "kind": event.kind,
        "actor": event.actor,
        "task": event.task,
        "attempt": event.attempt,
        "orchestrator": event.orchestrator,
        "machine": event.machine,
        "generation": event.generation,
        "charter_version": event.charter_version,
        "route": event.route,
        "data": event.data,
    }


def sequence(cursor: str | None) -> int:
    """A cursor that is a sequence number; raises Invalid on another."""
    if cursor is None:
        return 0
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):  # noqa: PLR2004 - fits 64 bits
        raise Invalid([("cursor", "it is not a cursor of this list; take `next_cursor` of the page before")])
    return int(cursor)


async def _cancel(plane: Plane, task_id: str, *, reason: str | None, actor: str) -> TaskRow:
    changed = await plane.store.write(
        lambda conn: life.cancel(conn, task_id=task_id, reason=reason, actor=actor, now_us=plane.clock.now_us())
    )
    return changed.task


def _check_known(plane: Plane, orchestrator: str) -> None:
    if orchestrator not in plane.control.orchestrators:
        raise Invalid([("orchestrator", f"there is no orchestrator {orchestrator}")])


def _is_persons(key: KnownKey, plane: Plane) -> bool:
    return key.owner not in plane.control.orchestrators or key.allows("admin")


def _new_task(data: CreateTask) -> NewTask:
    return NewTask(
        title=data.title,
        description=data.description,
        priority=data.priority,
        orchestrator=data.orchestrator,
        discipline=data.discipline,
        tags=tuple(data.tags),
        due_at_us=asking.instant(data.due_at),
        available_at_us=asking.instant(data.available_at),
        estimate_s=data.estimate_s,
        depends_on=tuple(data.depends_on),
        metadata=data.metadata,
        max_attempts=data.max_attempts,
    )


def _fields(data: EditTask) -> dict[str, Any]:
    """What `update_task` changes: the given fields but those that have a way of their own."""
    given = {name: getattr(data, name) for name in data.__struct_fields__ if getattr(data, name) is not UNSET}
    fields = {name: value for name, value in given.items() if name not in ("status", "orchestrator")}
    return {
        _TIMES.get(name, name): asking.instant(value) if name in _TIMES else value for name, value in fields.items()
    }


ROUTES = [
    list_tasks,
    create_task,
    get_task,
    edit_task,
    delete_task,
    assign_tasks,
    cancel_task,
    retry_task,
    unblock_task,
    task_events,
]
