"""Server-sent events: of a task, of its output, of everything; resumed, ended, and taken from who does not read."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from peer import connected
from serving import ControlPlane, until
from test_tasks import NO_TASK, drain, fields, problem

from orchestrator_fleet.api import feed as feeds
from orchestrator_fleet.api.feed import Feed, tell
from orchestrator_fleet.store.outbox import Event


@dataclass
class Stream:
    """What has come so far, read beside the test."""

    answer: httpx.Response
    blocks: list[dict[str, str]] = field(default_factory=list)
    ended: bool = False

    @property
    def kinds(self) -> list[str]:
        return [block["event"] for block in self.blocks if "event" in block]

    @property
    def ids(self) -> list[int]:
        return [int(block["id"]) for block in self.blocks if "event" in block]

    @property
    def last_id(self) -> str:
        """What a client sends back: of an event, or of a block without one."""
        return [block["id"] for block in self.blocks if "id" in block][-1]

    def data(self, number: int) -> Any:
        return json.loads([block["data"] for block in self.blocks if "event" in block][number])

    def read(self) -> None:
        block: dict[str, str] = {}
        try:
            for line in self.answer.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    block[name] = value.strip()
                elif block:
                    self.blocks.append(block)
                    block = {}
        except (httpx.StreamClosed, httpx.ReadError):
            return
        self.ended = True


@contextmanager
def streamed(plane: ControlPlane, path: str, *, key: str = "admin", last_id: str = "") -> Iterator[Stream]:
    """Follow a stream until the end of the block."""
    headers = {"Authorization": f"Bearer {plane.keys[key]}", "Accept": "text/event-stream"}
    if last_id:
        headers["Last-Event-ID"] = last_id
    timeout = httpx.Timeout(20, read=60)
    with httpx.Client(timeout=timeout) as client, client.stream("GET", plane.url + path, headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        stream = Stream(answer)
        reader = threading.Thread(target=stream.read, daemon=True)
        reader.start()
        until(lambda: stream.blocks, "the stream is open")
        yield stream


def test_a_task_is_followed_to_its_end(shared: ControlPlane) -> None:
    """What was, what comes, and `end` with the status; then the server closes."""
    task = shared.add("followed", orchestrator="vp-b")
    path = f"/api/tasks/{task['id']}/events"
    with streamed(shared, path) as stream:
        until(lambda: stream.kinds == ["task_created"], "what was")
        (grant,) = shared.poll("vp-b")
        until(lambda: stream.kinds == ["task_created", "task_claimed"], "what comes")
        shared.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})
        until(lambda: stream.ended, "the end")
    assert stream.kinds == ["task_created", "task_claimed", "task_done", "end"]
    assert stream.data(-1) == {"status": "DONE"}
    page = shared.json("GET", path)["data"]
    assert [stream.data(number) for number in range(3)] == page
    with streamed(shared, f"{path}?follow=true", last_id=str(page[1]["seq"])) as later:
        until(lambda: later.ended, "the end")
    assert later.kinds == ["task_done", "end"]
    with streamed(shared, f"{path}?cursor={page[0]['seq']}") as by_cursor:
        until(lambda: by_cursor.ended, "the end")
    assert by_cursor.kinds == ["task_claimed", "task_done", "end"]


def test_a_page_stays_a_page(shared: ControlPlane) -> None:
    """Unless a stream is asked for; a wrong id is 422, an unknown task 404."""
    task = shared.add("paged", orchestrator="vp-b")
    path = f"/api/tasks/{task['id']}/events"
    assert shared.ask("GET", path).headers["content-type"] == "application/json"
    for wrong in ("x", "-1", "9" * 19):
        refused = shared.ask("GET", f"{path}?follow=true", headers={"Last-Event-ID": wrong})
        assert fields(refused) == {"Last-Event-ID"}
    assert problem(shared.ask("GET", f"/api/tasks/{NO_TASK}/events?follow=true")) == (404, "not_found")
    drain(shared, "vp-b")


def test_a_task_that_is_purged_ends_its_stream(shared: ControlPlane) -> None:
    """Nothing more can come, and the stream says so instead of breaking."""
    task = shared.add("purged", orchestrator="vp-b")
    with streamed(shared, f"/api/tasks/{task['id']}/log") as stream:
        shared.ask("DELETE", f"/api/tasks/{task['id']}")
        until(lambda: stream.ended, "the end")
    assert stream.kinds == ["end"]


def test_output_is_resumed_where_it_broke(shared: ControlPlane) -> None:
    """By the id of the last piece that came; no piece twice."""

    async def scenario() -> None:
        async with connected(shared, "vp-b") as (peer, _):
            task = await asyncio.to_thread(shared.add, "logs", orchestrator="vp-b")
            (grant,) = await peer.claim()
            await peer.log(grant, "one\n")
            await asyncio.to_thread(follow, task, ["one\n"], "")
            await peer.log(grant, "two\n", offset=4)
            await peer.finish(grant)
            await asyncio.to_thread(follow, task, ["two\n"], self_ids[-1])

    self_ids: list[str] = []

    def follow(task: dict[str, Any], texts: list[str], last_id: str) -> None:
        with streamed(shared, f"/api/tasks/{task['id']}/log", last_id=last_id) as stream:
            until(lambda: len([kind for kind in stream.kinds if kind == "log"]) == len(texts), "the pieces")
            assert [stream.data(n)["text"] for n in range(len(texts))] == texts
            self_ids.append(str(stream.ids[len(texts) - 1]))

    asyncio.run(scenario())


def test_everything_is_followed_from_now_on_and_resumed(control_plane: ControlPlane) -> None:
    """By the id of the last block, also when no event came; across a restart of the control plane."""
    plane = control_plane.start()
    plane.add("before")
    with streamed(plane, "/api/events") as stream:
        task = plane.add("seen")
        until(lambda: stream.kinds, "the event")
        assert (stream.kinds, stream.data(0)["task"]) == (["task_created"], task["id"])
    with streamed(plane, "/api/events") as quiet:
        last_id = quiet.last_id
    assert int(last_id) == stream.ids[-1]
    plane.json("POST", f"/api/tasks/{task['id']}/cancel")
    plane.stop()
    plane.start()
    with streamed(plane, "/api/events", last_id=last_id) as resumed:
        plane.add("after")
        until(lambda: len(resumed.kinds) == 2, "what was missed, and what is new")
        assert resumed.kinds == ["task_cancelled", "task_created"]
        plane.stop()
        until(lambda: resumed.ended, "a control plane that closes ends its streams")


def test_topics_choose_kinds(shared: ControlPlane) -> None:
    """By their beginning; repeated or by commas."""
    with streamed(shared, "/api/events?topics=task_c*,task_d&topics=orchestrator") as stream:
        task = shared.add("topical", orchestrator="vp-b")
        shared.json("PUT", f"/api/tasks/{task['id']}", json={"title": "new"})
        drain(shared, "vp-b")
        shared.json("POST", "/api/vps/vp-b/deactivate")
        shared.json("POST", "/api/vps/vp-b/activate")
        until(lambda: len(stream.kinds) == 5, "the events")
    assert stream.kinds == ["task_created", "task_claimed", "task_done", "orchestrator_paused", "orchestrator_resumed"]


def test_a_key_sees_what_it_may(shared: ControlPlane) -> None:
    """Tasks with tasks:read, orchestrators with fleet:read, nothing with neither."""
    with (
        streamed(shared, "/api/events", key="tasks:read") as of_tasks,
        streamed(shared, "/api/events", key="fleet:read") as of_fleet,
    ):
        shared.json("POST", "/api/vps/vp-b/deactivate")
        shared.add("seen by one", orchestrator="vp-b")
        shared.json("POST", "/api/vps/vp-b/activate")
        until(lambda: of_tasks.kinds and len(of_fleet.kinds) == 4, "the events")
    assert of_tasks.kinds == ["task_created"]
    assert of_fleet.kinds == ["orchestrator_paused", "action_ended", "orchestrator_resumed", "action_ended"]
    assert problem(shared.ask("GET", "/api/events", key="tasks:work")) == (403, "missing_scope")
    drain(shared, "vp-b")


def test_an_id_of_the_future_goes_on_from_now(shared: ControlPlane) -> None:
    """The store may have been put back from a backup."""
    with streamed(shared, "/api/events", last_id="9" * 18) as stream:
        shared.add("now", orchestrator="vp-b")
        until(lambda: stream.kinds == ["task_created"], "the event")
    drain(shared, "vp-b")


def test_everyone_who_follows_sees_all_in_order(shared: ControlPlane) -> None:
    """However fast it happens."""
    with streamed(shared, "/api/events?topics=task_created") as one, streamed(shared, "/api/events") as two:
        ids = [shared.add(f"n{n}", orchestrator="vp-b")["id"] for n in range(60)]
        until(lambda: len(one.kinds) == 60 and two.kinds.count("task_created") == 60, "all events")
    assert [one.data(n)["task"] for n in range(60)] == ids
    assert two.ids == sorted(set(two.ids))
    drain(shared, "vp-b")


def test_a_client_that_does_not_read_is_dropped(control_plane: ControlPlane) -> None:
    """Its connection ends and the others go on; asking again with its last id, it misses nothing."""
    plane = control_plane
    script = (
        "import sys\nfrom pathlib import Path\nfrom orchestrator_fleet.api import sse\nsse.SLOW_CLIENT_S = 0.5\n"
        "from orchestrator_fleet.api.serve import serve\nserve(Path(sys.argv[1]), None, None)\n"
    )
    plane.process = plane.popen(script)
    until(plane._ready, "the control plane is ready")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        slow.connect(("127.0.0.1", plane.port))
        slow.sendall(
            f"GET /api/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {plane.keys['admin']}\r\n\r\n".encode()
        )
        text = "x" * 90_000
        until(lambda: slow.recv(64), "the stream is open")

        def dropped() -> bool:
            plane.add("big", description=text)
            return "did not read its stream" in plane.log

        until(dropped, "the slow client is dropped")
    assert "Traceback" not in plane.log
    with streamed(plane, "/api/events", last_id="0") as stream:
        until(lambda: stream.kinds.count("task_created") == len(set(stream.ids)) > 3, "all of it")


def _event(seq: int, data: str = "") -> Event:
    return Event(at_us=0, kind="task_created", actor="k", task="t", data={"text": data}, seq=seq)


def test_a_feed_keeps_the_newest_while_somebody_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not have is asked of the outbox: it answers None then, and never a part."""
    monkeypatch.setattr(feeds, "MAX_KEPT", 3)
    feed = Feed()
    feed.push(_event(1), after=0)
    assert feed.after(0) is None
    with feed.following():
        for seq in (5, 6, 8, 9):
            feed.push(_event(seq), after=4)
        assert [told.seq for told in feed.after(6) or ()] == [8, 9]
        assert [told.seq for told in feed.after(5) or ()] == [6, 8, 9]
        assert feed.after(4) is None
        assert feed.after(9) == []
    assert feed.after(6) is None


def test_a_feed_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large results don't fill the memory."""
    monkeypatch.setattr(feeds, "MAX_KEPT_BYTES", 3 * len(tell(_event(1, "x" * 1_000)).text))
    feed = Feed()
    with feed.following():
        for seq in range(1, 10):
            feed.push(_event(seq, "x" * 1_000), after=seq - 1)
        assert [told.seq for told in feed.after(6) or ()] == [7, 8, 9]
        assert feed.after(5) is None
