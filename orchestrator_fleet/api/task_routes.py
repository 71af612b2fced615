"""`/api/tasks`: what people and services do with tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from litestar import Response, delete, get, post, put
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import Parameter
from msgspec import UNSET
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Text, Time, Words, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import MissingScope
from orchestrator_fleet.errors import Forbidden
from orchestrator_fleet.orchestrators import escalation
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.store.outbox import CALLER
from orchestrator_fleet.store.schema import BLOCKED_REASONS
from orchestrator_fleet.tasks import life, view
from orchestrator_fleet.tasks.queries import Filters, Sort
from orchestrator_fleet.tasks.task import PRIORITIES, STATUSES, NewTask, TaskRow
from orchestrator_fleet.wire.http import CreateTask, EditTask, Why

Order = Literal["asc", "desc"]
PURGE_SCOPE = "admin"

WORK_SCOPE, WRITE_SCOPE = "tasks:work", "tasks:write"


async def _decides(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
    """A guard: who writes tasks decides about them, and whom an escalation asks may answer with the key it works by."""
    key: KnownKey = connection.scope["auth"]
    if not key.allows(WRITE_SCOPE) and not (key.acts_for is not None and key.allows(WORK_SCOPE)):
        raise MissingScope(f"this needs a key with the scope {WRITE_SCOPE}")


_READ, _WRITE, _DECIDE = [needs("tasks:read")], [needs(WRITE_SCOPE)], [_decides]
_TIMES = {"due_at": "due_at_us", "available_at": "available_at_us"}


def also(description: str) -> ResponseSpec:
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
    blocked_reason: Words = None,
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
    query = asking.Query()
    filters = Filters(
        status=query.words("status", status, among=STATUSES),
        blocked_reason=query.words("blocked_reason", blocked_reason, among=BLOCKED_REASONS),
        priority=query.words("priority", priority, among=PRIORITIES),
        orchestrator=query.words("orchestrator", orchestrator),
        discipline=query.words("discipline", discipline),
        tag=query.words("tag", tag),
        q=q or "",
        due_before_us=query.instant("due_before", due_before),
        due_after_us=query.instant("due_after", due_after),
        created_after_us=query.instant("created_after", created_after),
    )
    by: Sort = query.one_of("sort", sort, among=Sort, default="claim")  # type: ignore[assignment] # one of Sort's words
    descending = query.one_of("order", order, among=Order, default="asc") == "desc"
    query.check()
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
    order = life.Order(
        new=_new_task(data),
        dispatch=plane.control.dispatch,
        actor=request.auth.actor,
        now_us=plane.clock.now_us(),
        by=CALLER.get(),
    )
    return await once.write_batched(
        request, plane, idempotency_key, fn=life.create_all, item=order, reply=created, then=plane.stands_in_line
    )


@get("/tasks/{task_id:str}", guards=_READ)
async def get_task(plane: OfPlane, task_id: str) -> Response[dict[str, Any]]:
    """One task."""
    task = await plane.store.read_rows(lambda conn: life.get_task(conn, task_id))
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
    if data.status is not UNSET and request.auth.acts_for is not None:
        raise Forbidden(f"the key of {request.auth.owner} can't set a status; poll and complete instead")
    if data.orchestrator is not UNSET:
        check_assigns(request.auth)
    version, actor = asking.version_of(if_match), request.auth.actor

    def edit(conn: Connection) -> Reply:
        _check_changes(conn, request.auth, task_id)
        return shown(_edit(conn, plane, data, task_id, version=version, actor=actor))

    return await once.write(request, plane, idempotency_key, edit)


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
    task = life.at_version(conn, task_id=task_id, version=version)
    if fields := _fields(data):
        task = life.update_task(conn, task_id=task_id, fields=fields, version=None, actor=actor, now_us=now_us)
    if data.orchestrator is not UNSET:
        asking.check_known(plane, data.orchestrator)
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
        _check_changes(conn, request.auth, task_id)
        if purge:
            life.purge(conn, task_id=task_id, actor=actor, now_us=now_us)
        else:
            life.cancel(conn, task_id=task_id, reason=None, actor=actor, now_us=now_us)
        return Reply(status=204)

    answer = await once.write(request, plane, idempotency_key, remove)
    return Response(None, status_code=answer.status_code)


async def _decided(
    decide: Callable[..., TaskRow],
    task_id: str,
    data: Why,
    *,
    request: Asked,
    plane: Plane,
    key: str | None,
    check: Callable[[Connection, KnownKey, str], None],
) -> Response[dict[str, Any]]:
    """What somebody decides about one task, with a reason, if `check` lets the key do so."""
    known = {"reason": data.reason or None, "actor": request.auth.actor, "now_us": plane.clock.now_us()}

    def write(conn: Connection) -> Reply:
        check(conn, request.auth, task_id)
        task = decide(conn, task_id=task_id, **known)
        return shown(task) if task.id == task_id else created(task)

    return await once.write(request, plane, key, write)


@post("/tasks/{task_id:str}/cancel", guards=_WRITE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def cancel_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Cancel a task; a running session is ended."""

    def cancel(conn: Connection, **known: Any) -> TaskRow:
        return life.cancel(conn, **known).task

    return await _decided(
        cancel, task_id, data, request=request, plane=plane, key=idempotency_key, check=_check_changes
    )


@post(
    "/tasks/{task_id:str}/retry",
    guards=_WRITE,
    dto=JsonBody[Why],
    return_dto=None,
    status_code=200,
    responses={201: also("An ended task became a new one.")},
)
async def retry_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Do it again: a blocked task goes back in line (200); an ended one becomes a new task (201)."""
    retry = partial(life.retry, dispatch=plane.control.dispatch)
    return await _decided(retry, task_id, data, request=request, plane=plane, key=idempotency_key, check=_check_decides)


@post("/tasks/{task_id:str}/unblock", guards=_DECIDE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def unblock_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Put a blocked task back in line."""
    return await _decided(
        life.unblock, task_id, data, request=request, plane=plane, key=idempotency_key, check=_check_decides
    )


@post("/tasks/{task_id:str}/approve", guards=_DECIDE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def approve_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Say yes to a task that waits for an approval, an escalation or, past it, for a spent budget."""
    return await _decided(
        life.approve, task_id, data, request=request, plane=plane, key=idempotency_key, check=_check_decides
    )


@post("/tasks/{task_id:str}/reject", guards=_DECIDE, dto=JsonBody[Why], return_dto=None, status_code=200)
async def reject_task(
    request: Asked,
    plane: OfPlane,
    task_id: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Say no to it: it is cancelled, and the reason kept."""
    return await _decided(
        life.reject, task_id, data, request=request, plane=plane, key=idempotency_key, check=_check_decides
    )


def check_assigns(key: KnownKey) -> None:
    """Raise Forbidden for an orchestrator's own key: it delegates, which has limits and an answer."""
    if key.acts_for is not None:
        raise Forbidden(f"the key of {key.owner} can't assign tasks; delegate or hand them off instead")


def _check_changes(conn: Connection, key: KnownKey, task_id: str) -> None:
    """Raise Forbidden unless the key may change the task: an orchestrator's its own, and those that it made."""
    life.refuse_others(conn, task_id=task_id, acts_for=key.acts_for, actor=key.actor)


def _check_decides(conn: Connection, key: KnownKey, task_id: str) -> None:
    """Raise Forbidden unless the key may decide about the task.

    An orchestrator decides about its own, but gives no yes to itself; and about another's that was escalated to it.
    """
    if key.acts_for is None or escalation.may_decide(conn, task_id, key.acts_for):
        return
    if not key.allows(WRITE_SCOPE):
        raise MissingScope(f"this needs a key with the scope {WRITE_SCOPE}, as {key.acts_for} is not asked")
    _check_changes(conn, key, task_id)
    life.refuse_own_yes(conn, task_id=task_id, acts_for=key.acts_for)


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
    cancel_task,
    retry_task,
    unblock_task,
    approve_task,
    reject_task,
]
