"""`/api/tasks`: what people and services do with tasks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from litestar import Response, delete, get, post, put
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import Parameter
from msgspec import UNSET
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Text, Time, Words, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import Forbidden, MissingScope
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict, Invalid, TaskError
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import life, view
from orchestrator_fleet.tasks.queries import Filters, Sort
from orchestrator_fleet.tasks.task import PRIORITIES, STATUSES, NewTask, TaskRow
from orchestrator_fleet.wire.http import AssignTasks, CreateTask, EditTask, Why

Order = Literal["asc", "desc"]
PURGE_SCOPE = "admin"

_READ, _WRITE = [needs("tasks:read")], [needs("tasks:write")]
_TIMES = {"due_at": "due_at_us", "available_at": "available_at_us"}


def _also(description: str) -> ResponseSpec:
    """Another good answer, for the OpenAPI document."""
    return ResponseSpec(data_container=dict[str, Any], generate_examples=False, description=description)


def shown(task: TaskRow) -> Reply:
    """One task with its ETag."""
    return Reply(content=view.to_json(task), headers={"ETag": f'"{task.version}"'})


def created(task: TaskRow) -> Reply:
    """A new task, and where it is."""
    headers = {"Location": f"/api/tasks/{task.id}", "ETag": f'"{task.version}"'}
    return Reply(content=view.to_json(task), status=201, headers=headers)


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
        due_before_us=asking.instant("due_before", due_before),
        due_after_us=asking.instant("due_after", due_after),
        created_after_us=asking.instant("created_after", created_after),
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
    request: Asked, plane: OfPlane, data: CreateTask, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Make a task; it is routed at once."""
    new, dispatch = _new_task(data), plane.control.dispatch
    actor, now_us = request.auth.actor, plane.clock.now_us()
    return await once.write(
        request,
        plane,
        idempotency_key,
        lambda conn: created(life.create_task(conn, new=new, dispatch=dispatch, actor=actor, now_us=now_us)),
    )


@get("/tasks/{task_id:str}", guards=_READ)
async def get_task(plane: OfPlane, task_id: str) -> Response[dict[str, Any]]:
    """One task."""
    task = await plane.store.read(lambda conn: life.get_task(conn, task_id))
    return Response(view.to_json(task), headers={"ETag": f'"{task.version}"'})


@put("/tasks/{task_id:str}", guards=_WRITE, dto=JsonBody[EditTask], return_dto=None)
async def edit_task(
    *,
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: EditTask,
    if_match: Annotated[str | None, Parameter(header="If-Match")] = None,
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Change some fields; with `If-Match` only if nobody changed the task since."""
    if data.status is not UNSET and not _is_persons(request.auth, plane):
        raise Forbidden(f"the key of {request.auth.owner} can't set a status; poll and complete instead")
    version, actor = asking.version_of(if_match), request.auth.actor
    return await once.write(
        request,
        plane,
        idempotency_key,
        lambda conn: shown(_edit(conn, plane, data, task_id, version=version, actor=actor)),
    )


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
async def delete_task(
    *,
    request: Asked,
    plane: OfPlane,
    task_id: str,
    purge: bool = False,
    idempotency_key: once.Key = None,
) -> Response[None]:
    """Cancel a task; with `purge`, remove one that has ended."""
    if purge and not request.auth.allows(PURGE_SCOPE):
        raise MissingScope(f"purging needs a key with the scope {PURGE_SCOPE}")
    actor, now_us = request.auth.actor, plane.clock.now_us()

    def remove(conn: Connection) -> Reply:
        if purge:
            life.purge(conn, task_id=task_id, actor=actor, now_us=now_us)
        else:
            life.cancel(conn, task_id=task_id, reason=None, actor=actor, now_us=now_us)
        return Reply(status=204)

    answer = await once.write(request, plane, idempotency_key, remove)
    return Response(None, status_code=answer.status_code)


@post(
    "/tasks/assign",
    guards=_WRITE,
    dto=JsonBody[AssignTasks],
    return_dto=None,
    status_code=200,
    responses={207: _also("Some tasks could not be given; the results say which and why.")},
)
async def assign_tasks(
    request: Asked, plane: OfPlane, data: AssignTasks, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Give tasks to an orchestrator; 207 when some could not be given, which leaves the others given."""
    _check_known(plane, data.orchestrator)
    actor, now_us = request.auth.actor, plane.clock.now_us()

    def assign(conn: Connection) -> Reply:
        results = [_assign_one(conn, data, task_id, actor=actor, now_us=now_us) for task_id in _distinct(data.task_ids)]
        return Reply(content={"results": results}, status=200 if all(one["ok"] for one in results) else 207)

    return await once.write(request, plane, idempotency_key, assign)


def _assign_one(conn: Connection, data: AssignTasks, task_id: str, *, actor: str, now_us: int) -> dict[str, Any]:
    """One task's result. A task that is refused is refused before anything of it is written."""
    reason = data.reason or None
    try:
        life.assign(conn, task_id=task_id, orchestrator=data.orchestrator, reason=reason, actor=actor, now_us=now_us)
    except TaskError as problem:
        return {"id": task_id, "ok": False, "error": {"code": problem.code, "message": str(problem)}}
    return {"id": task_id, "ok": True}


def _distinct(words: list[str]) -> list[str]:
    return list(dict.fromkeys(words))


@post("/tasks/{task_id:str}/cancel", guards=_WRITE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def cancel_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Cancel a task; a running session is ended."""
    reason, actor, now_us = data.reason or None, request.auth.actor, plane.clock.now_us()
    return await once.write(
        request,
        plane,
        idempotency_key,
        lambda conn: shown(life.cancel(conn, task_id=task_id, reason=reason, actor=actor, now_us=now_us).task),
    )


@post(
    "/tasks/{task_id:str}/retry",
    guards=_WRITE,
    dto=JsonBody[Why],
    return_dto=None,
    status_code=200,
    responses={201: _also("An ended task became a new one.")},
)
async def retry_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Do it again: a blocked task goes back in line (200); an ended one becomes a new task (201)."""
    reason, actor, now_us = data.reason or None, request.auth.actor, plane.clock.now_us()
    dispatch = plane.control.dispatch

    def retry(conn: Connection) -> Reply:
        task = life.retry(conn, task_id=task_id, dispatch=dispatch, reason=reason, actor=actor, now_us=now_us)
        return shown(task) if task.id == task_id else created(task)

    return await once.write(request, plane, idempotency_key, retry)


@post("/tasks/{task_id:str}/unblock", guards=_WRITE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def unblock_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Put a blocked task back in line."""
    reason, actor, now_us = data.reason or None, request.auth.actor, plane.clock.now_us()
    return await once.write(
        request,
        plane,
        idempotency_key,
        lambda conn: shown(life.unblock(conn, task_id=task_id, reason=reason, actor=actor, now_us=now_us)),
    )


@get("/tasks/{task_id:str}/events", guards=_READ)
async def task_events(plane: OfPlane, task_id: str, limit: Limit, cursor: Cursor = None) -> dict[str, Any]:
    """What happened to a task, oldest first."""
    after = sequence(cursor)
    events, total = await plane.store.read(
        lambda conn: (
            life.events_of(conn, task_id=task_id, after_seq=after, limit=limit + 1),
            life.count_events(conn, task_id),
        )
    )
    some = events[:limit]
    next_cursor = str(some[-1].seq) if len(events) > limit else None
    return asking.page([event_json(one) for one in some], limit=limit, total=total, next_cursor=next_cursor)


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
        due_at_us=asking.instant("due_at", data.due_at),
        available_at_us=asking.instant("available_at", data.available_at),
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
        _TIMES.get(name, name): asking.instant(name, value) if name in _TIMES else value
        for name, value in fields.items()
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
