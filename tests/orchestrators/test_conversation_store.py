"""Conversations and status updates on both stores."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from desk import Desk

from orchestrator_fleet.errors import Conflict, Invalid, NotFound
from orchestrator_fleet.orchestrators import conversation, notices, updates
from orchestrator_fleet.store import outbox


def say(desk: Desk, content: str, *, sender: str = "vp-a", to: str = "vp-b", **fields: Any) -> Any:
    asked = {"task": None, "thread": None, "actor": "k-1", **fields}
    return desk.store.write_sync(
        lambda c: conversation.say(c, sender=sender, to=to, content=content, now_us=desk.now, **asked)
    )


def said(desk: Desk, talk: conversation.Conversation, **asked: Any) -> list[conversation.Message]:
    found, _ = desk.store.read_sync(
        lambda c: conversation.messages_of(c, talk.id, **{"after": 0, "limit": 100, **asked})
    )
    return list(found)


def waiting(desk: Desk, orchestrator: str) -> list[notices.Notice]:
    return list(desk.store.read_sync(lambda c: notices.waiting(c, orchestrator, limit=100, now_us=desk.now)))


def wrong(of: Invalid) -> list[str]:
    return [field for field, _ in of.errors]


def test_what_two_say_in_a_conversation_stays_in_order(desk: Desk) -> None:
    """Whoever speaks; each message is a notice of the same id to the other."""
    talk, first = say(desk, "one")
    desk.clock.advance(1)
    same, second = say(desk, "two", sender="vp-b", to="vp-a", thread=talk.id)
    _, third = say(desk, "three", thread=talk.id)
    assert (same.id, same.updated_at_us - talk.updated_at_us) == (talk.id, 1_000_000)
    assert [(one.content, one.sender) for one in said(desk, talk)] == [
        ("one", "vp-a"),
        ("two", "vp-b"),
        ("three", "vp-a"),
    ]
    assert [one.id for one in said(desk, talk, after=first.seq, limit=1)] == [second.id]
    assert [one.id for one in waiting(desk, "vp-b")] == [first.id, third.id]
    (notice,) = waiting(desk, "vp-a")
    assert notice.data == {
        "conversation": talk.id,
        "from": "vp-b",
        "content": "two",
        "task": None,
        "thread": talk.id,
    }


def test_a_message_says_how_far_it_came(desk: Desk) -> None:
    """waiting, delivered with the time of it, expired; sent to a person."""

    def state(talk: conversation.Conversation) -> str:
        (message,) = said(desk, talk)
        return conversation.state(message, now_us=desk.now)

    (talk, message), (lost, _), (human, _) = say(desk, "x"), say(desk, "y"), say(desk, "x", to="human:me")
    assert [state(one) for one in (talk, lost, human)] == ["waiting", "waiting", "sent"]
    desk.clock.advance(5)
    desk.store.write_sync(lambda c: notices.delivered(c, "vp-b", [message.id], actor="daemon:vp-b", now_us=desk.now))
    desk.clock.advance(notices.KEPT_S)
    while desk.store.write_sync(lambda c: notices.forget(c, now_us=desk.now)):
        pass
    assert [state(one) for one in (talk, lost, human)] == ["delivered", "expired", "sent"]
    (delivered,) = said(desk, talk)
    assert delivered.delivered_at_us == message.at_us + 5_000_000


def test_the_same_again_is_refused_for_a_while(desk: Desk) -> None:
    """By either of the two, in whichever conversation; to somebody else it may be said."""
    talk, first = say(desk, "ping")
    for fields in ({}, {"thread": talk.id}, {"sender": "vp-b", "to": "vp-a"}):
        with pytest.raises(Conflict, match=first.id) as refused:
            say(desk, "ping", **fields)
        assert refused.value.code == "duplicate_message"
    say(desk, "ping", to="human:vp-b")
    say(desk, "Ping")
    desk.clock.advance(conversation.SAME_AGAIN_S)
    say(desk, "ping", thread=talk.id)
    assert [one.content for one in said(desk, talk)] == ["ping", "ping"]


def test_nobody_fills_anothers_inbox_for_ever(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it has taken some; people are told all the same."""
    monkeypatch.setattr(conversation, "MAX_WAITING", 3)
    talk, _ = say(desk, "0")
    for number in (1, 2):
        say(desk, str(number), thread=talk.id)
    with pytest.raises(Conflict, match="vp-b: 3 notices wait") as refused:
        say(desk, "3", thread=talk.id)
    assert refused.value.code == "inbox_full"
    say(desk, "3", to="human:me")
    first = waiting(desk, "vp-b")[0].id
    desk.store.write_sync(lambda c: notices.delivered(c, "vp-b", [first], actor="daemon:vp-b", now_us=desk.now))
    say(desk, "3", thread=talk.id)


def test_the_same_at_once_is_said_once(desk: Desk) -> None:
    """However many ask, in both directions."""

    def attempt(number: int) -> str:
        sender, to = ("vp-a", "vp-b") if number % 2 else ("vp-b", "vp-a")
        try:
            say(desk, "now", sender=sender, to=to)
        except Conflict as problem:
            return problem.code
        return "said"

    with ThreadPoolExecutor(8) as threads:
        assert Counter(threads.map(attempt, range(16))) == {"said": 1, "duplicate_message": 15}


def test_everything_that_is_wrong_is_told_at_once(desk: Desk) -> None:
    """And nothing is kept."""
    talk, _ = say(desk, "one")
    task = desk.make()
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"thread": "cnv-none", "task": "task-none"}, ["thread", "task"]),
        ({"thread": talk.id, "to": "vp-c"}, ["to"]),
        ({"thread": talk.id, "sender": "vp-c", "to": "vp-a"}, ["thread"]),
        ({"thread": talk.id, "task": task.id}, ["task"]),
        ({"task": "task-none"}, ["task"]),
    ]
    for fields, named in cases:
        with pytest.raises(Invalid) as refused:
            say(desk, "two", **fields)
        assert wrong(refused.value) == named
    assert len(said(desk, talk)) == 1


def test_what_is_about_a_task_is_an_event_of_the_task(desk: Desk) -> None:
    """With the task as it is; in a thread too, until the task is gone."""
    task = desk.make("look")
    talk, _ = say(desk, "what is this", task=task.id)
    say(desk, "work", sender="vp-b", to="vp-a", thread=talk.id, task=task.id)
    say(desk, "ah", thread=talk.id)
    told = [one for one in desk.events(task) if one.kind == "message_sent"]
    assert [one.data["message"]["content"] for one in told] == ["what is this", "work", "ah"]
    assert {one.data["message"]["task"] for one in told} == {task.id}
    assert told[-1].data["task"]["title"] == "look"
    found = desk.store.read_sync(lambda c: outbox.read_after(c, 0))
    assert [one.orchestrator for one in found if one.kind == "notice_kept"] == ["vp-b", "vp-a", "vp-b"]


def test_conversations_are_listed_newest_first(desk: Desk) -> None:
    """In pages that nobody's talking shifts; only those with one when asked so."""
    talks = []
    for number in range(5):
        desk.clock.advance(1)
        to = "vp-b" if number % 2 else "human:me"
        talks.append(say(desk, f"n{number}", to=to)[0].id)
    desk.clock.advance(1)
    theirs = say(desk, "hello", sender="vp-b", to="vp-a")[0].id
    say(desk, "not yours", sender="vp-b", to="human:me")

    def page(other: str | None = None, before: str | None = None, limit: int = 100) -> tuple[list[str], int]:
        found, total = desk.store.read_sync(
            lambda c: conversation.of_orchestrator(c, "vp-a", other=other, before=before, limit=limit)
        )
        return [one.id for one in found], total

    assert page() == ([theirs, *talks[::-1]], 6)
    first, _ = page(limit=2)
    say(desk, "more", thread=talks[0], to="human:me")
    assert page(before=first[-1]) == (talks[::-1][1:], 6)
    assert page("vp-b") == ([theirs, talks[3], talks[1]], 3)
    assert page("vp-none") == ([], 0)
    with pytest.raises(NotFound):
        desk.store.read_sync(lambda c: conversation.find_of(c, "vp-c", theirs))


def test_updates_are_kept_and_told(desk: Desk) -> None:
    """Newest first; of a task of its own alone."""
    mine, other, nobodys = desk.make("mine"), desk.make(orchestrator="vp-b"), desk.make(orchestrator=None)

    def post(message: str, task: str | None = None, kind: str = "info") -> updates.Update:
        return desk.store.write_sync(
            lambda c: updates.post(
                c,
                orchestrator="vp-a",
                kind=kind,
                message=message,
                task=task,
                channel="#ops",
                actor="k-1",
                now_us=desk.now,
            )
        )

    posted = [post("a"), post("b", mine.id, "progress"), post("c")]
    for task, said_of in ((other, "it is vp-b's"), (nobodys, "it is nobody's")):
        with pytest.raises(Invalid, match=said_of):
            post("d", task.id)
    with pytest.raises(Invalid, match="there is no task"):
        post("d", "task-none")

    def newest(**asked: Any) -> list[str]:
        return [one.id for one in desk.store.read_sync(lambda c: updates.newest(c, "vp-a", **{"limit": 100, **asked}))]

    assert newest() == [one.id for one in posted[::-1]]
    assert newest(before=posted[1].seq) == [posted[0].id]
    found = [one for one in desk.store.read_sync(lambda c: outbox.read_after(c, 0)) if one.kind == "status_posted"]
    assert [(one.task, one.orchestrator, one.data["update"]["message"]) for one in found] == [
        (None, "vp-a", "a"),
        (mine.id, "vp-a", "b"),
        (None, "vp-a", "c"),
    ]
    assert found[1].data["task"]["title"] == "mine"
