"""`/api/vps/{id}/backlog`: an orchestrator's tasks, and their numbers, of one moment."""

from __future__ import annotations

from typing import Any

from litestar import get
from sqlalchemy import Connection

from orchestrator_fleet.api import asking
from orchestrator_fleet.api.asking import Cursor, Limit, OfPlane, Text, Words, needs
from orchestrator_fleet.api.task_routes import Order
from orchestrator_fleet.api.vp_routes import PATHS, check_there
from orchestrator_fleet.tasks import backlog, life, view
from orchestrator_fleet.tasks.queries import Filters, Page, Sort
from orchestrator_fleet.tasks.task import PRIORITIES, STATUSES

_READ = [needs("tasks:read")]


@get([f"{path}/{{vp:str}}/backlog" for path in PATHS], guards=_READ)
async def vp_backlog(
    *,
    plane: OfPlane,
    vp: str,
    limit: Limit,
    status: Words = None,
    priority: Words = None,
    tag: Words = None,
    q: Text = None,
    sort: Text = None,
    order: Text = None,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """What an orchestrator has to do, in the order it will claim it; and its numbers, of the same moment.

    Without `status` these are its open tasks. `metrics` are of all its tasks, whatever the list is filtered by:
    `total`, `by_status` and `completion_rate` of every task it ever got, the others of what is open.
    """
    check_there(plane, vp)
    query = asking.Query()
    filters = Filters(
        orchestrator=(vp,),
        status=query.words("status", status, among=STATUSES) or backlog.OPEN,
        priority=query.words("priority", priority, among=PRIORITIES),
        tag=query.words("tag", tag),
        q=q or "",
    )
    by: Sort = query.one_of("sort", sort, among=Sort, default="claim")  # type: ignore[assignment] # one of Sort's words
    descending = query.one_of("order", order, among=Order, default="asc") == "desc"
    query.check()
    now_us = plane.clock.now_us()

    def look(conn: Connection) -> tuple[Page, dict[str, Any]]:
        page = life.list_tasks(
            conn, filters=filters, now_us=now_us, sort=by, descending=descending, cursor=cursor, limit=limit
        )
        return page, backlog.metrics(conn, vp, now_us=now_us)

    page, metrics = await plane.store.read(look)
    shown = [view.to_json(task) for task in page.rows]
    return {**asking.page(shown, limit=limit, total=page.total, next_cursor=page.next_cursor), "metrics": metrics}


ROUTES = [vp_backlog]
