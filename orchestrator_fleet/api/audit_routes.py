"""Who changed what: every change that was asked for over HTTP, from history."""

from __future__ import annotations

from typing import Any

from litestar import get

from orchestrator_fleet.api import asking, sse
from orchestrator_fleet.api.asking import Cursor, Limit, OfPlane, Text, Time, needs
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.history import audit

_READ = [needs("fleet:read")]


@get("/audit", guards=_READ)
async def list_audit(
    *,
    plane: OfPlane,
    limit: Limit,
    key: Text = None,
    owner: Text = None,
    kind: Text = None,
    orchestrator: Text = None,
    task: Text = None,
    since: Time = None,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """What people, services and orchestrators changed with their keys, newest first.

    Each entry says by which key, whose that is, from which address, and what was there before. What daemons report of
    their own work, and what the clock does, is no audit: `/api/events` has that.
    """
    since_us = asking.instant("since", since)
    asked = audit.Asked(
        key=key,
        owner=owner,
        kind=kind,
        orchestrator=orchestrator,
        task=task,
        since=None if since_us is None else to_rfc3339(since_us),
    )
    found = await plane.history.ask(*audit.page(asked, before=sse.sequence(cursor) or None), limit=limit + 1)
    total = await plane.history.ask(*audit.count(asked), limit=1)
    entries = [audit.entry(row) for row in found.rows]
    some = entries[:limit]
    next_cursor = str(some[-1]["id"]) if len(entries) > limit else None
    return asking.page(some, limit=limit, total=total.rows[0][0], next_cursor=next_cursor)


ROUTES = [list_audit]
