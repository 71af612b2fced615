"""The deciding parts of the door, by themselves: keys, presence, rates, waiters, bodies and log lines."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from dataclasses import replace
from typing import Any

import pytest

from orchestrator_fleet import errors, keys, log
from orchestrator_fleet.api import problems
from orchestrator_fleet.api.bodies import decode
from orchestrator_fleet.api.rate import Rate
from orchestrator_fleet.api.waiters import Waiters
from orchestrator_fleet.clock import SECOND_US, FrozenClock
from orchestrator_fleet.orchestrators import presence
from orchestrator_fleet.orchestrators.access import Denied, KnownKey, Shown, check, declared
from orchestrator_fleet.orchestrators.presence import Seen
from orchestrator_fleet.wire.http import BulkTasks, CompleteTask, CreateTask

NOW_US = 1_767_225_600 * SECOND_US
HERE = Seen(connected=True, last_seen_us=NOW_US, sessions_max=2, sessions=1, generation="g", since_us=NOW_US)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (None, "OFFLINE"),
        (HERE, "ONLINE"),
        (replace(HERE, sessions=2), "BUSY"),
        (replace(HERE, sessions=3), "BUSY"),
        (replace(HERE, sessions_max=0, sessions=0), "BUSY"),
        (replace(HERE, connected=False), "OFFLINE"),
        (replace(HERE, last_seen_us=NOW_US - 15 * SECOND_US), "ONLINE"),
        (replace(HERE, last_seen_us=NOW_US - 15 * SECOND_US - 1), "OFFLINE"),
    ],
)
def test_status_is_observed(seen: Seen | None, expected: str) -> None:
    """By the link, the free slots and the last beat, each with its reason."""
    status, reason = presence.status(seen, now_us=NOW_US)
    assert status == expected
    assert reason


def test_a_daemon_under_another_generation_is_not_ready() -> None:
    """And the condition says which one is wanted."""
    (condition,) = presence.conditions(HERE, status="ONLINE", reason="", generation="g2")
    assert (condition["status"], condition["reason"]) == ("False", "Behind")
    assert condition["message"] == "runs generation g, g2 is wanted"
    (condition,) = presence.conditions(HERE, status="ONLINE", reason="fine", generation="g")
    assert (condition["status"], condition["reason"], condition["message"]) == ("True", "Online", "fine")


def test_a_key_is_good_until_the_moment_it_expires() -> None:
    """Revocation counts before expiry; a wrong secret is as unknown as a wrong id."""
    minted, other = keys.mint(), keys.mint()
    ring = declared(
        {
            minted.id: {
                "owner": "person:me",
                "sha256": minted.sha256,
                "scopes": ["tasks:read"],
                "expires": "2026-01-01T00:00:10Z",
                "revoked": "2026-01-01T00:00:20+00:00",
            }
        }
    )

    def at(seconds: int, text: str = minted.text) -> KnownKey | Denied:
        shown = Shown.of(text)
        return check(shown, shown.among((ring, {})), now_us=NOW_US + seconds * SECOND_US)

    assert at(9) == ring[minted.id]
    assert at(10) == Denied("expired")
    assert at(20) == Denied("revoked")
    assert at(0, other.text) == Denied("unknown")
    assert at(0, minted.text[:-1]) == Denied("malformed")
    stolen = replace(ring[minted.id], sha256=other.sha256)
    assert check(Shown.of(minted.text), stolen, now_us=NOW_US) == Denied("unknown")
    assert check(Shown.of(minted.text), ring[minted.id], now_us=NOW_US, revoked={minted.id}) == Denied("revoked")


def test_a_rate_admits_a_burst_and_then_its_pace() -> None:
    """Each caller for himself."""
    clock = FrozenClock()
    rate = Rate(burst=3, per_s=2.0, now_us=clock.now_us)
    assert [rate.admit("a") for _ in range(4)] == [True, True, True, False]
    assert rate.admit("b")
    clock.advance(0.5)
    assert [rate.admit("a"), rate.admit("a")] == [True, False]
    assert (rate.wait_s("a"), rate.wait_s("b"), rate.wait_s("nobody")) == (0.5, 0, 0)


def test_a_wake_between_two_looks_is_not_lost() -> None:
    """And those who left are forgotten."""

    async def story() -> None:
        waiters = Waiters()
        with waiters.waiting("vp-a") as first, waiters.waiting("vp-a") as second, waiters.waiting("vp-b") as other:
            waiters.wake(["vp-a", "nobody"])
            assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)
            waiters.wake_all()
            assert other.is_set()
        assert not waiters._events

    asyncio.run(story())


def test_nested_fields_are_named_by_their_path() -> None:
    """As a client would write them."""
    with pytest.raises(errors.Invalid) as wrong:
        decode(b'{"token": "t", "usage": {"input_tokens": -1}}', CompleteTask)
    assert wrong.value.errors == [("usage.input_tokens", "Expected int >= 0")]
    assert decode(b'{"title": "x"}', CreateTask).priority == "MEDIUM"


def _leaves(kind: type[Exception]) -> list[type[Exception]]:
    below = [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]
    return [kind, *below]


def test_a_wrong_word_is_told_with_the_right_ones() -> None:
    """Also deep inside, and in a list; and a NUL is called by its name, not by a pattern."""
    raw = b'{"action": "zap", "filter": {"status": ["TODO", "x"], "priority": "y", "q": "\\u0000"}}'
    with pytest.raises(errors.Invalid) as wrong:
        decode(raw, BulkTasks)
    assert sorted(wrong.value.errors) == [
        ("action", "got 'zap', wanted one of cancel, retry, assign, priority"),
        ("filter.priority", "got 'y', wanted one of CRITICAL, HIGH, MEDIUM, LOW"),
        ("filter.q", "got a NUL character; leave it out"),
        ("filter.status[1]", "got 'x', wanted one of TODO, IN_PROGRESS, BLOCKED, DONE, CANCELLED"),
    ]


def test_every_error_of_the_tree_has_a_status() -> None:
    """What a task's rule refuses is never a 500, and only those tell their text."""
    arguments: dict[type[Exception], tuple[Any, ...]] = {
        errors.Conflict: ("code", "text"),
        errors.Invalid: ([("field", "text")],),
    }
    for kind in _leaves(errors.TaskError):
        problem = problems.of_error(kind(*arguments.get(kind, ("text",))))
        assert 400 <= problem.status < 500, kind
        assert "text" in problem.detail
    assert problems.of_error(ValueError("secret")).detail == "the control plane failed; its log says why"
    assert problems.of_error(errors.StoreError("busy")).status == 503


def test_a_log_line_is_json_and_never_holds_a_key() -> None:
    """Also where a foreign library logs, and with a traceback."""
    minted = keys.mint()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log.JsonLines(process="serve"))
    logger = logging.getLogger("test-of-lines")
    logger.addHandler(handler)
    logger.propagate = False
    told = log.Log(logger, part="x").bind(more=1)
    logger.warning("got %s", minted.text)
    try:
        int(minted.text)
    except ValueError:
        told.exception("failed", value=object)
    told.error("long", text="x" * 100_000)
    first, second, third = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["event"] == f"got fleet_{minted.id}_***"
    assert (first["process"], first["level"]) == ("serve", "warning")
    assert (second["event"], second["part"], second["more"]) == ("failed", "x", 1)
    assert f"fleet_{minted.id}_***" in second["traceback"]
    assert third.keys() == {"at", "level", "event", "cut_chars"}
