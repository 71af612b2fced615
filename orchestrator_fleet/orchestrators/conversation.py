"""What orchestrators say to each other, to people and to channels: conversations of two, message by message.

A message to an orchestrator is delivered by a notice of the same id, so it waits for whoever is offline. One to a
person or a channel is kept with its event; whoever passes it on reads it there.

    to an orchestrator    waiting ──▶ delivered     its daemon has it, or it read it over HTTP
                             └──────▶ expired       nobody took it while its notice was kept
    to a person, channel  sent
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.errors import Conflict, Invalid, NotFound
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.orchestrators import notices
from orchestrator_fleet.store import locks, outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import conversations, messages
from orchestrator_fleet.tasks import rows
from orchestrator_fleet.tasks.task import TaskRow

SAME_AGAIN_S = 60.0
"""So long after a message, neither of the two may say the same again: two programs that answer each other would go on
for ever."""

MAX_WAITING = 1_000
"""So much may wait for an orchestrator before nobody may add a message; as much as its inbox keeps."""

HUMAN, PERSON = "human:", "person:"
State = Literal["waiting", "delivered", "expired", "sent"]

_INSERT = conversations.insert()
_INSERT_MESSAGE = messages.insert()
_ONE = sa.select(conversations).where(conversations.c.id == sa.bindparam("of"))
_TOUCH = (
    conversations.update().where(conversations.c.id == sa.bindparam("of")).values(updated_at_us=sa.bindparam("now"))
)
# The texts are compared one by one: at most what two said to each other within SAME_AGAIN_S.
_SAME = sa.select(messages.c.id, messages.c.at_us).where(
    sa.or_(
        *(
            sa.and_(
                messages.c.sender == sa.bindparam(sender),
                messages.c.target == sa.bindparam(target),
                messages.c.at_us > sa.bindparam("since"),
            )
            for sender, target in (("one", "other"), ("other", "one"))
        )
    ),
    messages.c.content == sa.bindparam("said"),
)
_MESSAGES = (
    sa.select(messages)
    .where(messages.c.conversation == sa.bindparam("of"), messages.c.seq > sa.bindparam("after"))
    .order_by(messages.c.seq)
    .limit(sa.bindparam("most"))
)
_COUNT_MESSAGES = sa.select(sa.func.count()).select_from(messages).where(messages.c.conversation == sa.bindparam("of"))
_TAKES_PART = sa.or_(conversations.c.source == sa.bindparam("of"), conversations.c.target == sa.bindparam("of"))
_OF_TWO = sa.or_(
    sa.and_(conversations.c.source == sa.bindparam("of"), conversations.c.target == sa.bindparam("other")),
    sa.and_(conversations.c.target == sa.bindparam("of"), conversations.c.source == sa.bindparam("other")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Two who talk: `source` began it. Times are microseconds since 1970; `updated_at_us` is the last message's."""

    id: str
    source: str
    target: str
    task: str | None
    created_at_us: int
    updated_at_us: int

    def other(self, one: str) -> str | None:
        """Whom `one` talks to in it; None when it takes no part."""
        return {self.source: self.target, self.target: self.source}.get(one)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one said to the other. `actor` is whose key it was, which may be a person's who speaks for the sender."""

    seq: int
    id: str
    conversation: str
    sender: str
    target: str
    content: str
    actor: str
    at_us: int
    delivered_at_us: int | None


def recipient(text: str) -> str:
    """Whom `text` means; a person has one name, `human:<name>`."""
    return f"{HUMAN}{text.removeprefix(PERSON)}" if text.startswith(PERSON) else text


def say(
    conn: Connection,
    *,
    sender: str,
    to: str,
    content: str,
    task: str | None,
    thread: str | None,
    actor: str,
    now_us: int,
) -> tuple[Conversation, Message]:
    """Say something in a conversation that goes on (`thread`), or in a new one.

    Invalid when the task or the conversation is none that fits; Conflict `duplicate_message` when the same was said
    between the two a moment ago, `inbox_full` when too much waits for the other.
    """
    one, other = sorted((sender, to))
    locks.hold(conn, f"conversation:{one}:{other}")
    about, going_on = _checked(conn, sender=sender, to=to, task=task, thread=thread)
    _refuse_the_same(conn, one=one, other=other, content=content, now_us=now_us)
    if is_name(to) and notices.count_waiting(conn, to, now_us=now_us) >= MAX_WAITING:
        raise Conflict("inbox_full", f"{to}: {MAX_WAITING} notices wait for it already; wait until it has taken some")
    talk = going_on or _begin(conn, source=sender, target=to, task=task, now_us=now_us)
    if going_on is not None:
        conn.execute(_TOUCH, {"of": talk.id, "now": now_us})
    message = _write(conn, talk, sender=sender, to=to, content=content, actor=actor, now_us=now_us)
    told = {**message_json(message, now_us=now_us), "task": talk.task}
    if about is None:
        outbox.append(
            conn,
            Event(at_us=now_us, kind="message_sent", actor=actor, orchestrator=sender, data={"message": told}),
        )
    else:
        rows.tell(conn, "message_sent", about, actor=actor, now_us=now_us, message=told)
    if is_name(to):
        notices.tell(
            conn,
            orchestrator=to,
            kind=notices.MESSAGE,
            data={
                "conversation": talk.id,
                "from": sender,
                "content": content,
                "task": talk.task,
                "thread": thread,
            },
            actor=actor,
            now_us=now_us,
            notice_id=message.id,
        )
    return replace(talk, updated_at_us=now_us), message


def find(conn: Connection, conversation_id: str) -> Conversation:
    """The one with this id; raises NotFound."""
    row = None if "\0" in conversation_id else conn.execute(_ONE, {"of": conversation_id}).mappings().one_or_none()
    if row is None:
        raise NotFound(f"there is no conversation {conversation_id[:100]}")
    return Conversation(**row)


def find_of(conn: Connection, orchestrator: str, conversation_id: str) -> Conversation:
    """The one with this id; raises NotFound when the orchestrator takes no part in it, too."""
    talk = find(conn, conversation_id)
    if talk.other(orchestrator) is None:
        raise NotFound(f"there is no conversation {conversation_id[:100]}")
    return talk


def of_orchestrator(
    conn: Connection, orchestrator: str, *, other: str | None, before: str | None, limit: int
) -> tuple[Sequence[Conversation], int]:
    """Its conversations (with `other` alone), newest first, from behind the one `before` on; and how many there are."""
    of = {"of": orchestrator} if other is None else {"of": orchestrator, "other": other}
    where = _TAKES_PART if other is None else _OF_TWO
    total = conn.execute(sa.select(sa.func.count()).select_from(conversations).where(where), of).scalar_one()
    page = sa.select(conversations).where(where).order_by(conversations.c.id.desc()).limit(limit)
    if before is not None:
        page = page.where(conversations.c.id < sa.bindparam("before"))
        of["before"] = before
    return [Conversation(**row) for row in conn.execute(page, of).mappings()], total


def messages_of(conn: Connection, conversation_id: str, *, after: int, limit: int) -> tuple[Sequence[Message], int]:
    """What was said in it, oldest first, from behind `after` (a seq) on; and how much in all."""
    asked = {"of": conversation_id, "after": after, "most": limit}
    total = conn.execute(_COUNT_MESSAGES, {"of": conversation_id}).scalar_one()
    return [Message(**row) for row in conn.execute(_MESSAGES, asked).mappings()], total


def state(message: Message, *, now_us: int) -> State:
    """How far a message has come. Pure."""
    if not is_name(message.target):
        return "sent"
    if message.delivered_at_us is not None:
        return "delivered"
    return "waiting" if now_us < message.at_us + round(notices.KEPT_S * SECOND_US) else "expired"


def to_json(talk: Conversation) -> dict[str, Any]:
    """As the API shows it."""
    return {
        "id": talk.id,
        "from": talk.source,
        "to": talk.target,
        "task": talk.task,
        "created_at": to_rfc3339(talk.created_at_us),
        "updated_at": to_rfc3339(talk.updated_at_us),
    }


def message_json(message: Message, *, now_us: int) -> dict[str, Any]:
    """As the API and the message's event show it."""
    delivered = None if message.delivered_at_us is None else to_rfc3339(message.delivered_at_us)
    return {
        "id": message.id,
        "conversation": message.conversation,
        "from": message.sender,
        "to": message.target,
        "content": message.content,
        "by": message.actor,
        "at": to_rfc3339(message.at_us),
        "state": state(message, now_us=now_us),
        "delivered_at": delivered,
    }


def _checked(
    conn: Connection, *, sender: str, to: str, task: str | None, thread: str | None
) -> tuple[TaskRow | None, Conversation | None]:
    """The task that it is about and the conversation that goes on; raises Invalid with all that is wrong."""
    wrong: list[tuple[str, str]] = []
    talk = about = None
    if thread is not None:
        try:
            talk = find_of(conn, sender, thread)
        except NotFound as problem:
            wrong.append(("thread", f"{problem} of {sender}; leave it out to begin one"))
    if talk is not None and talk.other(sender) != to:
        wrong.append(
            ("to", f"got {to}, but {talk.id} is with {talk.other(sender)}; leave `thread` out to begin another")
        )
    if talk is not None and task not in (None, talk.task):
        of = f"about {talk.task}" if talk.task else "about no task"
        wrong.append(("task", f"got {task}, but {talk.id} is {of}; leave `thread` out to begin another"))
    about_id = task or (talk.task if talk is not None else None)
    if about_id is not None:
        try:
            # Held, so that the event's picture of it is as new as its place among the events.
            about = rows.get_to_change(conn, about_id)
        except NotFound as problem:
            wrong.append(("task", str(problem)))
    if wrong:
        raise Invalid(wrong)
    return about, talk


def _refuse_the_same(conn: Connection, *, one: str, other: str, content: str, now_us: int) -> None:
    since_us = now_us - round(SAME_AGAIN_S * SECOND_US)
    asked = {"one": one, "other": other, "since": since_us, "said": content}
    found = conn.execute(_SAME, asked).first()
    if found is not None:
        raise Conflict(
            "duplicate_message",
            f"the same was said between {one} and {other} less than {SAME_AGAIN_S:g} s ago, in {found.id} at"
            f" {to_rfc3339(found.at_us)}; say something else, or wait",
        )


def _begin(conn: Connection, *, source: str, target: str, task: str | None, now_us: int) -> Conversation:
    talk = Conversation(
        id=ids.new_id("cnv", now_us),
        source=source,
        target=target,
        task=task,
        created_at_us=now_us,
        updated_at_us=now_us,
    )
    conn.execute(_INSERT, asdict(talk))
    return talk


def _write(
    conn: Connection, talk: Conversation, *, sender: str, to: str, content: str, actor: str, now_us: int
) -> Message:
    values: dict[str, Any] = {
        "id": ids.new_id("msg", now_us),
        "conversation": talk.id,
        "sender": sender,
        "target": to,
        "content": content,
        "actor": actor,
        "at_us": now_us,
        "delivered_at_us": None,
    }
    written = conn.execute(_INSERT_MESSAGE, values)
    (seq,) = written.inserted_primary_key or (0,)
    return Message(seq=seq, **values)
