"""What orchestrators say and are told: status updates, messages to each other and to people, and their inbox."""

from __future__ import annotations

import re
from typing import Annotated, Any

from litestar import get, post
from litestar.params import QueryParameter
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once, sse, vp_routes
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, acts, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.vp_routes import PATHS, check_there
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.orchestrators import conversation, notices, updates
from orchestrator_fleet.wire.http import MAX_QUERY_CHARS, NO_NUL
from orchestrator_fleet.wire.vps import Converse, PostStatus, Seen

OWN = "tasks:work"
_READS, _READS_OWN, _SAYS = [needs("fleet:read")], [acts("fleet:read", own=OWN)], [acts("tasks:write", own=OWN)]
_CONVERSATION = re.compile(r"cnv-[0-9a-z]{26}")
With = Annotated[
    str | None,
    QueryParameter(name="with", max_length=MAX_QUERY_CHARS, pattern=NO_NUL, description="Only those with this one."),
]


@post(
    [f"{path}/{{vp:str}}/conversations/initiate" for path in PATHS],
    guards=_SAYS,
    dto=JsonBody[Converse],
    return_dto=None,
    status_code=201,
)
async def say(request: Asked, plane: OfPlane, vp: str, data: Converse, idempotency_key: once.Key = None) -> Any:
    """Say something to an orchestrator, a person or a channel; in a new conversation, or with `thread` in that one.

    An orchestrator that is not there gets it when it comes. The same between the same two within a minute is 409
    `duplicate_message`.
    """
    check_there(plane, vp)
    to, actor, now_us = conversation.recipient(data.to), request.auth.actor, plane.clock.now_us()
    _check_recipient(plane, vp, to)

    def write(conn: Connection) -> Reply:
        talk, message = conversation.say(
            conn,
            sender=vp,
            to=to,
            content=data.content,
            task=data.task,
            thread=data.thread,
            actor=actor,
            now_us=now_us,
        )
        content = {
            "conversation": conversation.to_json(talk),
            "message": conversation.message_json(message, now_us=now_us),
        }
        return Reply(content=content, status=201, headers={"Location": f"/api{PATHS[0]}/{vp}/conversations/{talk.id}"})

    return await once.write(request, plane, idempotency_key, write)


@get([f"{path}/{{vp:str}}/conversations" for path in PATHS], guards=_READS_OWN)
async def list_conversations(
    *, plane: OfPlane, vp: str, limit: Limit, other: With = None, cursor: Cursor = None
) -> dict[str, Any]:
    """An orchestrator's conversations, the newest first."""
    check_there(plane, vp)
    if cursor is not None and not _CONVERSATION.fullmatch(cursor):
        raise Invalid([("cursor", "it is not a cursor of this list; take `next_cursor` of the page before")])
    with_ = None if other is None else conversation.recipient(other)
    found, total = await plane.store.read(
        lambda conn: conversation.of_orchestrator(conn, vp, other=with_, before=cursor, limit=limit + 1)
    )
    some = found[:limit]
    next_cursor = some[-1].id if len(found) > limit else None
    return asking.page([conversation.to_json(talk) for talk in some], limit=limit, total=total, next_cursor=next_cursor)


@get([f"{path}/{{vp:str}}/conversations/{{conversation_id:str}}" for path in PATHS], guards=_READS_OWN)
async def get_conversation(
    *, plane: OfPlane, vp: str, conversation_id: str, limit: Limit, cursor: Cursor = None
) -> dict[str, Any]:
    """One conversation, and what was said in it, the newest last. 404 unless the orchestrator takes part."""
    check_there(plane, vp)
    after, now_us = sse.sequence(cursor), plane.clock.now_us()

    def look(conn: Connection) -> tuple[conversation.Conversation, tuple[Any, int]]:
        talk = conversation.find_of(conn, vp, conversation_id)
        return talk, conversation.messages_of(conn, talk.id, after=after, limit=limit + 1)

    talk, (found, total) = await plane.store.read(look)
    some = found[:limit]
    shown = [conversation.message_json(message, now_us=now_us) for message in some]
    next_cursor = str(some[-1].seq) if len(found) > limit else None
    page = asking.page(shown, limit=limit, total=total, next_cursor=next_cursor)
    return {"conversation": conversation.to_json(talk), **page}


@get([f"{path}/{{vp:str}}/status" for path in PATHS], guards=_READS)
async def get_status(*, plane: OfPlane, vp: str, limit: Limit, cursor: Cursor = None) -> dict[str, Any]:
    """What an orchestrator is seen to do, and what it says of that, the newest first."""
    check_there(plane, vp)
    before = updates.NEWEST if cursor is None else sse.sequence(cursor)
    (seen,) = await vp_routes.look(plane, [vp])
    found = await plane.store.read(lambda conn: updates.newest(conn, vp, before=before, limit=limit + 1))
    some = found[:limit]
    return {
        "status": seen["status"],
        "status_reason": seen["status_reason"],
        "current": seen["sessions"],
        "updates": [updates.to_json(update) for update in some],
        "next_cursor": str(some[-1].seq) if len(found) > limit else None,
    }


@post(
    [f"{path}/{{vp:str}}/status" for path in PATHS],
    guards=_SAYS,
    dto=JsonBody[PostStatus],
    return_dto=None,
    status_code=201,
)
async def post_status(
    request: Asked, plane: OfPlane, vp: str, data: PostStatus, idempotency_key: once.Key = None
) -> Any:
    """Post a status update. It is kept and told; it changes no status."""
    check_there(plane, vp)
    actor, now_us = request.auth.actor, plane.clock.now_us()

    def write(conn: Connection) -> Reply:
        update = updates.post(
            conn,
            orchestrator=vp,
            kind=data.kind,
            message=data.message,
            task=data.task,
            channel=data.channel,
            actor=actor,
            now_us=now_us,
        )
        return Reply(content=updates.to_json(update), status=201)

    return await once.write(request, plane, idempotency_key, write)


@get([f"{path}/{{vp:str}}/inbox" for path in PATHS], guards=_READS_OWN)
async def list_inbox(*, plane: OfPlane, vp: str, limit: Limit, cursor: Cursor = None) -> dict[str, Any]:
    """What an orchestrator has not been told yet, oldest first; for those that have no daemon connected."""
    check_there(plane, vp)
    after, now_us = sse.sequence(cursor), plane.clock.now_us()
    found, total = await plane.store.read(
        lambda conn: (
            notices.waiting(conn, vp, limit=limit + 1, now_us=now_us, after=after),
            notices.count_waiting(conn, vp, now_us=now_us),
        )
    )
    some = found[:limit]
    next_cursor = str(some[-1].seq) if len(found) > limit else None
    return asking.page([notices.to_json(notice) for notice in some], limit=limit, total=total, next_cursor=next_cursor)


@post(
    [f"{path}/{{vp:str}}/inbox/seen" for path in PATHS],
    guards=_SAYS,
    dto=JsonBody[Seen],
    return_dto=None,
    status_code=200,
)
async def see(request: Asked, plane: OfPlane, vp: str, data: Seen, idempotency_key: once.Key = None) -> Any:
    """An orchestrator has these notices now; answers which of them were news."""
    check_there(plane, vp)
    actor, now_us = request.auth.actor, plane.clock.now_us()

    def write(conn: Connection) -> Reply:
        return Reply(content={"seen": notices.delivered(conn, vp, data.ids, actor=actor, now_us=now_us)})

    return await once.write(request, plane, idempotency_key, write)


def _check_recipient(plane: Plane, vp: str, to: str) -> None:
    if to == vp:
        raise Invalid([("to", f"got {to}, which is who says it; name somebody else")])
    if is_name(to) and to not in plane.control.orchestrators:
        raise Invalid([("to", f"there is no orchestrator {to}; a person is human:{to}, a channel #{to}")])


ROUTES = [say, list_conversations, get_conversation, get_status, post_status, list_inbox, see]
