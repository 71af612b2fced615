"""The daemons' WebSocket, spoken by a client that is no daemon."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
from peer import Peer, connected, dialled, hello
from serving import ControlPlane, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from orchestrator_fleet.wire import link as wire

TIMEOUT_S = 60.0


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await story

    asyncio.run(bounded())


async def to(plane: ControlPlane, verb: str, grant: wire.Grant) -> None:
    await asyncio.to_thread(plane.json, "POST", f"/api/tasks/{grant.task['id']}/{verb}")


def status(plane: ControlPlane, orchestrator: str = "vp-a") -> str:
    shown: str = plane.json("GET", f"/api/vps/{orchestrator}")["status"]
    return shown


def clear(plane: ControlPlane) -> None:
    """Cancel what other tests left."""
    for task in plane.json("GET", "/api/tasks?status=TODO,IN_PROGRESS,BLOCKED&limit=100")["data"]:
        plane.json("POST", f"/api/tasks/{task['id']}/cancel")


@pytest.fixture
def plane(shared: ControlPlane) -> ControlPlane:
    """The shared control plane with nothing to do."""
    clear(shared)
    return shared


def test_a_daemon_claims_works_and_finishes(plane: ControlPlane) -> None:
    """The claim waits for the task; the attempt records generation, charter and machine."""

    async def story() -> None:
        async with connected(plane) as (peer, welcome):
            assert (welcome.beat_s, welcome.lease_s, welcome.lost) == (5.0, 30.0, ())
            claim = asyncio.create_task(peer.claim())
            task = await asyncio.to_thread(plane.add, "live", metadata={"a": 1})
            (grant,) = await claim
            assert (grant.task["id"], grant.task["metadata"], grant.attempt) == (task["id"], {"a": 1}, 1)
            await peer.log(grant, "hel")
            await peer.log(grant, "hello", offset=0)
            assert await peer.beat(grant) == ()
            usage = wire.Usage(input_tokens=1, output_tokens=2, usd=0.25)
            assert await peer.finish(grant, result={"x": [1]}, exit_code=0, usage=usage) == "DONE"
            assert await peer.finish(grant, result={"x": [1]}) == "DONE"

    run(story())
    task = plane.json("GET", "/api/tasks?q=live&status=DONE")["data"][0]
    assert (task["result"], task["generation"], task["charter_version"]) == ({"x": [1]}, "g1", "c1")
    log = plane.json("GET", f"/api/tasks/{task['id']}/log")
    assert "".join(piece["text"] for piece in log["data"]) == "hello"
    assert log["pagination"] == {"limit": 20, "total": 2, "next_cursor": None}
    assert plane.json("GET", f"/api/tasks/{task['id']}/log?attempt=2")["pagination"]["total"] == 0
    done = plane.json("GET", f"/api/tasks/{task['id']}/events")["data"][-1]
    assert (done["kind"], done["actor"], done["machine"]) == ("task_done", "daemon:vp-a@m01", "m01")
    assert done["data"]["usage"]["usd"] == 0.25


def test_status_is_what_the_link_shows(plane: ControlPlane) -> None:
    """OFFLINE, ONLINE, BUSY with every slot taken, and OFFLINE again; both events are written."""

    async def story() -> None:
        assert await asyncio.to_thread(status, plane) == "OFFLINE"
        async with connected(plane, sessions_max=1) as (peer, _):
            assert await asyncio.to_thread(status, plane) == "ONLINE"
            await asyncio.to_thread(plane.add, "busy")
            (grant,) = await peer.claim()
            shown = await asyncio.to_thread(plane.json, "GET", "/api/vps/vp-a")
            assert shown["status"] == "BUSY"
            assert shown["status_reason"] == "1 of 1 sessions are taken"
            assert [session["task"] for session in shown["sessions"]] == [grant.task["id"]]
            assert shown["backlog"] == {"open": 1, "in_progress": 1, "blocked": 0, "overdue": 0}
            assert (shown["machine"], shown["observed_generation"]) == ("m01", "g1")
            assert shown["conditions"][0]["status"] == "True"
            await peer.finish(grant)
            assert await asyncio.to_thread(status, plane) == "ONLINE"

    run(story())
    until(lambda: status(plane) == "OFFLINE", "the control plane saw it go")
    rows = plane.json(
        "POST",
        "/api/sql",
        json={"query": "select kind, actor from events where kind like 'orchestrator_%' order by seq desc limit 2"},
    )["rows"]
    assert rows == [["orchestrator_offline", "daemon:vp-a@m01"], ["orchestrator_online", "daemon:vp-a@m01"]]


def test_a_key_that_is_not_good_does_not_get_in(plane: ControlPlane) -> None:
    """401 without a valid key, 403 from a browser or without the scope."""

    async def story() -> None:
        good = plane.daemon_key("vp-a")
        for key, headers, expected in (
            ("nonsense", {}, 401),
            (good, {"Origin": "http://evil.test"}, 403),
            (plane.keys["tasks:read"], {}, 403),
        ):
            with pytest.raises(InvalidStatus) as refused:
                async with dialled(plane, key, headers):
                    pass
            assert refused.value.response.status_code == expected

    run(story())


def test_a_daemon_speaks_for_its_own_orchestrator_and_machine_alone(plane: ControlPlane) -> None:
    """Closed with 1008 and the reason."""

    async def story() -> None:
        key = plane.daemon_key("vp-a")
        for said, reason in (
            (hello("vp-b"), "the key is of vp-a"),
            (wire.Hello(**{**_fields(hello()), "machine": "m02"}), "the key is of machine m01"),
        ):
            async with dialled(plane, key) as peer:
                await peer.send(said)
                code, told = await peer.closed()
                assert code == 1008
                assert reason in told

    run(story())


def _fields(message: wire.Hello) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


def test_a_cancelled_task_reaches_its_daemon(plane: ControlPlane) -> None:
    """Pushed with the attempt's token; what the daemon reports afterwards is refused."""

    async def story() -> None:
        async with connected(plane) as (peer, _):
            await asyncio.to_thread(plane.add)
            (grant,) = await peer.claim()
            await to(plane, "cancel", grant)
            cancel = await peer.cancelled()
            assert (cancel.task, cancel.token) == (grant.task["id"], grant.token)
            refused = await peer.ask(
                wire.Finish(task=grant.task["id"], token=grant.token, outcome="done"), wire.Problem
            )
            assert refused.code == "lease_lost"
            assert await peer.beat(grant) == (grant.task["id"],)

    run(story())


def test_a_task_given_to_another_reaches_its_daemon_as_a_cancel(plane: ControlPlane) -> None:
    """And the other one's waiting claim gets it."""

    async def story() -> None:
        async with connected(plane) as (first, _), connected(plane, "vp-b") as (second, _):
            await asyncio.to_thread(plane.add)
            (grant,) = await first.claim()
            claim = asyncio.create_task(second.claim())
            body = {"task_ids": [grant.task["id"]], "orchestrator": "vp-b"}
            await asyncio.to_thread(plane.json, "POST", "/api/tasks/assign", json=body)
            assert (await first.cancelled()).token == grant.token
            (again,) = await claim
            assert (again.task["id"], again.attempt) == (grant.task["id"], 2)
            assert await second.finish(again) == "DONE"

    run(story())


def test_its_own_report_does_not_come_back_as_a_cancel(plane: ControlPlane) -> None:
    """Failed, released and claimed again by the same daemon, many times over."""

    async def story() -> None:
        async with connected(plane) as (peer, _):
            await asyncio.to_thread(plane.add, max_attempts=100)
            for outcome in ["released", "failed"] * 8:
                (grant,) = await peer.claim()
                await peer.finish(grant, outcome, error="x")
            (grant,) = await peer.claim()
            assert await peer.beat(grant) == ()
            assert await peer.finish(grant) == "DONE"
            assert peer.pushed == []

    run(story())


def test_a_daemon_that_reconnects_keeps_what_it_holds_and_gives_back_the_rest(plane: ControlPlane) -> None:
    """What it no longer has is claimable at once; a token that is not current is lost."""

    async def story() -> None:
        async with connected(plane) as (peer, _):
            await asyncio.to_thread(plane.add, "kept")
            await asyncio.to_thread(plane.add, "forgotten")
            grants = await peer.claim(limit=2)
            if len(grants) == 1:
                grants += await peer.claim()
        kept, forgotten = sorted(grants, key=lambda grant: str(grant.task["title"]), reverse=True)
        held = (
            wire.Held(task=kept.task["id"], token=kept.token),
            wire.Held(task=forgotten.task["id"], token="0" * 32),
        )
        async with connected(plane, held=held, epoch="e2") as (peer, welcome):
            assert welcome.lost == (forgotten.task["id"],)
            (again,) = await peer.claim()
            assert (again.task["id"], again.attempt) == (forgotten.task["id"], 2)
            assert await peer.finish(kept) == "DONE"
            assert await peer.finish(again) == "DONE"

    run(story())
    assert plane.json("GET", "/api/tasks?status=DONE&q=kept")["data"][0]["attempt"] == 1


def test_a_newer_connection_takes_over(plane: ControlPlane) -> None:
    """The older one is closed, its orchestrator stays ONLINE, its waiting claim takes nothing."""

    async def story() -> None:
        async with connected(plane) as (older, _):
            claim = asyncio.create_task(older.claim())
            async with connected(plane, epoch="e2") as (newer, _):
                assert (await older.closed())[0] == 1008
                with pytest.raises(ConnectionClosed):
                    await claim
                assert await asyncio.to_thread(status, plane) == "ONLINE"
                await asyncio.to_thread(plane.add)
                (grant,) = await newer.claim()
                assert grant.attempt == 1
                await newer.finish(grant)

    run(story())


def test_a_daemon_that_vanishes_while_it_waits_takes_no_task(plane: ControlPlane) -> None:
    """The task that comes next goes to the next connection, at its first attempt."""

    async def story() -> None:
        async with connected(plane) as (peer, _):
            await peer.send(wire.Claim(limit=1, wait_s=30, generation="g1", charter_version="c1"))
            peer.socket.transport.abort()
        await asyncio.to_thread(until, lambda: status(plane) == "OFFLINE", "the control plane saw it go")
        await asyncio.to_thread(plane.add)
        async with connected(plane, epoch="e2") as (peer, _):
            (grant,) = await peer.claim()
            assert grant.attempt == 1
            await peer.finish(grant)

    run(story())


def test_a_session_limit_is_kept(plane: ControlPlane) -> None:
    """More are not granted than the daemon has slots; a free one is filled at once."""

    async def story() -> None:
        for n in range(3):
            await asyncio.to_thread(plane.add, f"t{n}")
        async with connected(plane, sessions_max=2) as (peer, _):
            grants = await peer.claim(limit=10)
            assert len(grants) == 2
            assert await peer.claim(wait_s=0) == ()
            await peer.finish(grants[0])
            (last,) = await peer.claim(limit=10)
            await peer.finish(grants[1])
            await peer.finish(last)

    run(story())


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("not json", 1003),
        ("{}", 1003),
        ('{"type": "explode"}', 1003),
        ('{"type": "beat"}', 1003),
        ('{"type": "claim", "limit": "many"}', 1003),
        ("[" * 50_000, 1003),
        (b"\x00\xff", 1003),
        ('{"type": "log", "x": "' + "y" * wire.MAX_FRAME_BYTES + '"}', 1009),
        (hello(), 1008),
    ],
    ids=["text", "empty", "unknown", "fields", "types", "nested", "binary", "huge", "hello twice"],
)
def test_garbage_ends_its_own_connection_alone(plane: ControlPlane, frame: Any, code: int) -> None:
    """Before and after hello; everybody else goes on."""

    async def story() -> None:
        async with connected(plane, "vp-b") as (bystander, _):
            async with connected(plane) as (peer, _):
                await _throw(peer, frame)
                assert (await peer.closed())[0] == code
            if not isinstance(frame, wire.Hello):
                async with dialled(plane, plane.keys["daemon:vp-a"]) as peer:
                    await _throw(peer, frame)
                    assert (await peer.closed())[0] == code
            assert await bystander.beat() == ()

    run(story())
    assert "Traceback" not in plane.log


async def _throw(peer: Peer, frame: Any) -> None:
    if isinstance(frame, wire.Hello):
        await peer.send(frame)
        return
    try:
        await peer.socket.send(frame)
    except ConnectionClosed:
        return  # it was refused while it was still being sent


def test_messages_that_are_wrong_in_themselves_are_answered(plane: ControlPlane) -> None:
    """A Problem with the code of the HTTP API; the connection stays."""

    async def story() -> None:
        async with connected(plane) as (peer, _):
            await asyncio.to_thread(plane.add)
            (grant,) = await peer.claim()
            for finish, code in (
                (wire.Finish(task="task-none", token="x", outcome="done"), "not_found"),
                (wire.Finish(task=grant.task["id"], token="x", outcome="done"), "lease_lost"),
                (wire.Finish(task=grant.task["id"], token=grant.token, outcome="perhaps"), "invalid"),
            ):
                assert (await peer.ask(finish, wire.Problem)).code == code
            await peer.log(wire.Grant(task={"id": "task-none"}, attempt=1, token="x"), "nobody's")
            assert await peer.beat(grant) == ()
            assert await peer.finish(grant) == "DONE"

    run(story())


def test_a_log_is_followed_live_until_the_task_ends(plane: ControlPlane) -> None:
    """As server-sent events: what was, what comes, and the end."""

    async def story() -> None:
        async with connected(plane) as (peer, _):
            await asyncio.to_thread(plane.add)
            (grant,) = await peer.claim()
            await peer.log(grant, "one\n")
            headers = {"Authorization": f"Bearer {plane.keys['tasks:read']}"}
            path = f"{plane.url}/api/tasks/{grant.task['id']}/log?follow=true"
            async with httpx.AsyncClient(timeout=15) as client, client.stream("GET", path, headers=headers) as stream:
                assert stream.headers["content-type"].startswith("text/event-stream")
                lines = stream.aiter_lines()
                assert await _event(lines) == ("log", "one\n")
                await peer.log(grant, "two\n", offset=4)
                assert await _event(lines) == ("log", "two\n")
                await peer.finish(grant)
                assert await _event(lines) == ("end", "DONE")

    run(story())


async def _event(lines: Any) -> tuple[str, str]:
    """The next event's name and its text or status."""
    kind = ""
    async for line in lines:
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            data = json.loads(line[6:])
            return kind, data.get("text") or data["status"]
    raise AssertionError("the stream ended")


def test_a_lease_that_runs_out_sends_the_task_back(control_plane: ControlPlane) -> None:
    """A poller that fell silent loses it; its late word is refused."""
    control_plane.start()
    task = control_plane.add()
    (grant,) = control_plane.poll("vp-a", lease_s=5)
    (again,) = control_plane.poll("vp-a", wait=15)
    assert (again["task"]["id"], again["lease"]["attempt"]) == (task["id"], 2)
    late = control_plane.ask("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})
    assert (late.status_code, late.json()["code"]) == (409, "lease_lost")
    kinds = [event["kind"] for event in control_plane.json("GET", f"/api/tasks/{task['id']}/events")["data"]]
    assert "lease_expired" in kinds


def test_killed_in_mid_work_nothing_is_lost_or_doubled(control_plane: ControlPlane) -> None:
    """What a daemon holds stays its own over the restart; a grant that never arrived is given anew."""

    async def story() -> None:
        async with connected(control_plane) as (peer, _):
            await asyncio.to_thread(control_plane.add, "held")
            (held,) = await peer.claim()
            await peer.send(wire.Claim(limit=1, wait_s=30, generation="g1", charter_version="c1"))
            added = asyncio.create_task(asyncio.to_thread(_add_or_not, control_plane))
            await asyncio.to_thread(control_plane.stop, signal.SIGKILL)
            await added
        await asyncio.to_thread(control_plane.start)
        told = (wire.Held(task=held.task["id"], token=held.token),)
        async with connected(control_plane, held=told, epoch="e2") as (peer, welcome):
            assert welcome.lost == ()
            assert await peer.finish(held, result=1) == "DONE"
            await asyncio.to_thread(control_plane.add, "after")
            open_tasks = await asyncio.to_thread(control_plane.json, "GET", "/api/tasks?status=TODO,IN_PROGRESS")
            for _ in range(open_tasks["pagination"]["total"]):
                (grant,) = await peer.claim()
                assert await peer.finish(grant) == "DONE"

    control_plane.start()
    run(story())
    tasks = control_plane.json("GET", "/api/tasks")["data"]
    assert {task["status"] for task in tasks} == {"DONE"}
    ended = control_plane.json(
        "POST", "/api/sql", json={"query": "select task, count(*) from events where kind = 'task_done' group by 1"}
    )["rows"]
    assert sorted(ended) == sorted([task["id"], 1] for task in tasks)


def _add_or_not(plane: ControlPlane) -> None:
    """Create a task while the control plane dies: it is there or it is not."""
    try:
        plane.add("in flight")
    except httpx.TransportError:
        return
