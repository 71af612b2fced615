"""`/api/vps/conflicts`: what stands against what, computed; and that somebody has decided it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from litestar import Response, get, post
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Words, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.vp_routes import PATHS
from orchestrator_fleet.orchestrators import conflict_board
from orchestrator_fleet.orchestrators.conflict_board import Around, Board, Said
from orchestrator_fleet.orchestrators.conflicts import TYPES
from orchestrator_fleet.wire import cursor as cursors
from orchestrator_fleet.wire.vps import ConflictType, ResolveConflict

_READ, _WRITE = [needs("fleet:read")], [needs("fleet:write")]
_Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Key = tuple[_Int64, _Int64, str]


@get([f"{path}/conflicts" for path in PATHS], guards=_READ)
async def list_conflicts(
    *,
    plane: OfPlane,
    limit: Limit,
    type: Words = None,  # noqa: A002 - the query's own word
    resolved: bool = False,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """The conflicts that stand now, computed from one snapshot; what may do harm now comes first, then the oldest.

    Those that somebody has resolved are left out unless `resolved=true`. `truncated`: there is so much running,
    blocked, asked or due that not all of it was looked at.
    """
    query = asking.Query()
    types: tuple[ConflictType, ...] = query.words("type", type, among=TYPES) or TYPES  # type: ignore[assignment] # its words
    query.check()
    after: _Key | None = None if cursor is None else cursors.read(cursor, _Key)
    around, now_us = around_of(plane), plane.clock.now_us()

    def look(conn: Connection) -> Board:
        return conflict_board.look(conn, around, types=types, now_us=now_us)

    board = await plane.store.read(look)
    found = [one for one in board.conflicts if resolved or one.id not in board.resolved]
    rest = [one for one in found if after is None or conflict_board.key(one) > after]
    some = rest[:limit]
    shown = [conflict_board.to_json(one, board.resolved.get(one.id)) for one in some]
    next_cursor = cursors.write(conflict_board.key(some[-1])) if len(rest) > limit else None
    page = asking.page(shown, limit=limit, total=len(found), next_cursor=next_cursor)
    return {**page, "truncated": board.truncated}


@post(
    [f"{path}/conflicts/{{conflict_id:str}}/resolve" for path in PATHS],
    guards=_WRITE,
    dto=JsonBody[ResolveConflict],
    return_dto=None,
    status_code=200,
)
async def resolve_conflict(
    request: Asked,
    plane: OfPlane,
    conflict_id: str,
    data: ResolveConflict = ResolveConflict(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Keep that somebody has decided a conflict that stands now; nothing else is changed by that.

    It is left out of the list from then on. When the like comes again, of other tasks or tries, that is another one.
    """
    key = request.auth
    asking.check_for_all(key)
    around, now_us = around_of(plane), plane.clock.now_us()

    def write(conn: Connection) -> Reply:
        shown = conflict_board.resolve(conn, conflict_id, around, note=data.note, actor=key.actor, now_us=now_us)
        return Reply(content=shown)

    return await once.write(request, plane, idempotency_key, write)


def around_of(plane: Plane) -> Around:
    """What is in force, and what the daemons that are connected here say."""
    links = dict(plane.links)
    return Around(
        orchestrators=plane.control.orchestrators,
        rules=plane.control.rules,
        slots={name: link.seen.sessions_max for name, link in links.items()},
        said=[
            Said(
                orchestrator=name,
                machine=link.machine,
                at_us=link.said_at_us,
                held={held.task: held.token for held in link.said},
            )
            for name, link in links.items()
            if link.said
        ],
    )


ROUTES = [list_conflicts, resolve_conflict]
