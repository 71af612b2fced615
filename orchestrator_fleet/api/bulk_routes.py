"""`/api/tasks/assign` and `/api/tasks/bulk`: the same for many tasks, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar import Response, post
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once
from orchestrator_fleet.api.asking import Asked, OfPlane, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.task_routes import also, check_assigns
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.tasks import bulk, queries
from orchestrator_fleet.tasks.bulk import Chosen, Order, Result
from orchestrator_fleet.tasks.queries import Filters
from orchestrator_fleet.wire.http import MAX_BULK, AssignTasks, BulkTasks, TaskFilter

_WRITE = [needs("tasks:write")]
# What only one action takes.
_OF_ACTION = {"assign": "orchestrator", "priority": "priority"}


@post(
    "/tasks/assign",
    guards=_WRITE,
    dto=JsonBody[AssignTasks],
    return_dto=None,
    status_code=200,
    responses={207: also("Some tasks could not be given; the results say which and why.")},
)
async def assign_tasks(
    request: Asked, plane: OfPlane, data: AssignTasks, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Give tasks to an orchestrator; 207 when some could not be given, which leaves the others given."""
    check_assigns(request.auth)
    asking.check_known(plane, data.orchestrator)
    order = Order(action="assign", orchestrator=data.orchestrator, reason=data.reason or None)
    actor, dispatch, now_us = request.auth.actor, plane.control.dispatch, plane.clock.now_us()

    def assign(conn: Connection) -> Reply:
        done = bulk.do(conn, data.task_ids, order, dispatch=dispatch, actor=actor, now_us=now_us)
        return Reply(content={"results": [_outcome(one) for one in done]}, status=_status(done))

    return await once.write(request, plane, idempotency_key, assign)


@post(
    "/tasks/bulk",
    guards=_WRITE,
    dto=JsonBody[BulkTasks],
    return_dto=None,
    status_code=200,
    responses={207: also("Some tasks were refused; the results say which and why.")},
)
async def do_to_tasks(
    request: Asked, plane: OfPlane, data: BulkTasks, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Cancel, retry, assign or give a priority to many tasks: those named, or those that match a filter.

    A filter without `status` means open tasks, and for retry the BLOCKED ones. A call does at most 500 tasks;
    `left` says how many more match, and `next_cursor`, sent as `cursor`, does those. 207 when some were refused, which
    leaves the others done. `dry_run` answers the same and changes nothing.
    """
    if data.action == "assign":
        check_assigns(request.auth)
    order = _order(plane, data, acts_for=request.auth.acts_for)
    actor, dispatch, now_us = request.auth.actor, plane.control.dispatch, plane.clock.now_us()
    filters = None if data.filter is None else bulk.meant(_filters(data.filter), data.action)
    if filters is None:
        named = tuple(dict.fromkeys(data.task_ids or ()))
        chosen = Chosen(ids=named, matched=len(named), next_cursor=None)
    else:
        chosen = await plane.store.read(lambda conn: bulk.choose(conn, filters=filters, cursor=data.cursor or ""))

    def do(conn: Connection) -> Reply:
        ids = chosen.ids if filters is None else queries.still_match(conn, chosen.ids, filters=filters)
        done = bulk.do(conn, ids, order, dispatch=dispatch, actor=actor, now_us=now_us, dry_run=data.dry_run)
        return Reply(content=_told(data, chosen, done), status=_status(done))

    return await once.write(request, plane, idempotency_key, do)


def _order(plane: Plane, data: BulkTasks, *, acts_for: str | None) -> Order:
    """What is asked; Invalid with all that is missing or too much."""
    wrong = []
    if (data.filter is None) == (data.task_ids is None):
        wrong.append(("filter", "give either filter or task_ids"))
    elif data.filter == TaskFilter():
        wrong.append(("filter", "it names nothing and so means every task; name at least a status"))
    if data.cursor is not None and data.filter is None:
        wrong.append(("cursor", "it goes with filter"))
    for action, field in _OF_ACTION.items():
        given = getattr(data, field) is not None
        if data.action == action and not given:
            wrong.append((field, f"is required for {action}"))
        elif data.action != action and given:
            wrong.append((field, f"is only for {action}"))
    if wrong:
        raise Invalid(wrong)
    if data.orchestrator is not None:
        asking.check_known(plane, data.orchestrator)
    return Order(
        action=data.action,
        reason=data.reason or None,
        orchestrator=data.orchestrator,
        priority=data.priority,
        acts_for=acts_for,
    )


def _filters(asked: TaskFilter) -> Filters:
    return Filters(
        status=_words("status", asked.status),
        blocked_reason=_words("blocked_reason", asked.blocked_reason),
        priority=_words("priority", asked.priority),
        orchestrator=_words("orchestrator", asked.orchestrator),
        discipline=_words("discipline", asked.discipline),
        tag=_words("tag", asked.tag),
        q=asked.q,
        due_before_us=asking.instant("filter.due_before", asked.due_before),
        due_after_us=asking.instant("filter.due_after", asked.due_after),
        created_after_us=asking.instant("filter.created_after", asked.created_after),
    )


def _words(field: str, given: str | Sequence[str]) -> tuple[str, ...]:
    words = (given,) if isinstance(given, str) else tuple(given)
    if any("\0" in word for word in words):
        raise Invalid([(f"filter.{field}", "got a NUL character; leave it out")])
    return words


def _status(done: Sequence[Result]) -> int:
    return 207 if any(one.error for one in done) else 200


def _outcome(one: Result) -> dict[str, Any]:
    if one.error is not None:
        return {"id": one.id, "ok": False, "error": {"code": one.error.code, "message": str(one.error)}}
    return {"id": one.id, "ok": True}


def _told(data: BulkTasks, chosen: Chosen, done: Sequence[Result]) -> dict[str, Any]:
    """Counts, then each task: where it is now, and, of a retry that made one, the new task's id."""
    results = []
    for one in done:
        outcome = _outcome(one)
        if one.task is not None:
            outcome |= {"status": one.task.status, "changed": one.changed}
            if one.task.id != one.id and not data.dry_run:
                outcome["task"] = one.task.id
        results.append(outcome)
    return {
        "action": data.action,
        "dry_run": data.dry_run,
        "matched": chosen.matched,
        "changed": sum(one.changed for one in done),
        "failed": sum(one.error is not None for one in done),
        "left": chosen.matched - len(chosen.ids),
        "limit": MAX_BULK,
        "next_cursor": chosen.next_cursor,
        "results": results,
    }


ROUTES = [assign_tasks, do_to_tasks]
