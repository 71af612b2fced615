"""Clients that inject, dawdle, hang up, and die in the middle: each harms at most itself."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from living_fleet import until
from peer import connected
from serving import ControlPlane

IDLE_POLLS = 200
LEASE_S = 5
SOON_S = 2.0
EVIL = "x\r\nX-Evil: 1\r\nSet-Cookie: a=b"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running control plane; each test brings its own orchestrator's work to an end."""
    one = ControlPlane(tmp_path_factory.mktemp("rude") / "home", orchestrators={f"vp-{n}": n for n in "abcdefgh"})
    one.start()
    yield one
    one.close()


def raw(plane: ControlPlane, *, timeout_s: float = 10.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", plane.port), timeout=timeout_s)


def make(plane: ControlPlane, *orchestrators: str) -> list[str]:
    """A task for each of them, over one connection; their ids."""
    made = []
    with raw(plane) as connection:
        for name in orchestrators:
            connection.sendall(request(plane, "POST", "/api/tasks", {"title": "t", "orchestrator": name}))
            status, _, text = answer(connection)
            assert status == 201, text
            made.append(json.loads(text)["id"])
    return made


def request(plane: ControlPlane, method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """A request as bytes."""
    text = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {plane.keys['admin']}"]
    lines += [f"Content-Length: {len(text)}", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + text


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers: dict[str, str] = {}
    while line := file.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, file.read(int(headers.get("content-length", 0)))


def reset(connection: socket.socket) -> None:
    """Close as a killed process's kernel does with unread bytes: by RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def grants(connection: socket.socket) -> list[str]:
    """The ids that a poll got."""
    status, _, body = answer(connection)
    assert status == 200, body
    return [one["task"]["id"] for one in json.loads(body)["data"]]


@pytest.mark.parametrize("field", ["title", "description", "tags", "metadata"])
def test_line_breaks_in_what_a_task_says_reach_no_header(plane: ControlPlane, field: str) -> None:
    """They are kept as they are, in the body alone."""
    value: Any = {"tags": [EVIL], "metadata": {EVIL: EVIL}}.get(field, EVIL)
    body = {"title": "t", field: value, "available_at": "2100-01-01T00:00:00Z", "orchestrator": "vp-a"}
    with raw(plane) as connection:
        connection.sendall(request(plane, "POST", "/api/tasks", body, Idempotency_Key=f"injected-{field}"))
        status, headers, text = answer(connection)
        assert status == 201, text
        assert not {"x-evil", "set-cookie"} & headers.keys()
        made = json.loads(text)
        assert made[field] == value
        # Again, from what was kept for the key.
        connection.sendall(request(plane, "POST", "/api/tasks", body, Idempotency_Key=f"injected-{field}"))
        status, headers, text = answer(connection)
        assert (status, json.loads(text)) == (201, made)
        assert not {"x-evil", "set-cookie"} & headers.keys()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/tasks/%0d%0aX-Evil:%201", None),
        ("GET", "/api/tasks?q=%0d%0aX-Evil:%201&sort=%0d%0aX-Evil:%201", None),
        ("GET", "/api/tasks?cursor=%0d%0aX-Evil:%201", None),
        ("POST", "/api/tasks", {"title": "t", "orchestrator": EVIL}),
        ("POST", "/api/tasks", {"title": "t", "discipline": EVIL}),
        ("POST", "/api/tasks", {"title": "t", "depends_on": [EVIL]}),
        ("POST", "/api/tasks/poll", {"orchestrator": EVIL}),
        ("POST", "/api/tasks/task-0/complete", {"token": EVIL}),
    ],
)
def test_line_breaks_in_names_are_refused_and_reach_no_header(
    plane: ControlPlane, method: str, path: str, body: Any
) -> None:
    """4xx, and the answer's headers are the server's own."""
    with raw(plane) as connection:
        connection.sendall(request(plane, method, path, body))
        status, headers, text = answer(connection)
    assert 400 <= status < 500, text
    assert not {"x-evil", "set-cookie"} & headers.keys()


def test_requests_cut_anywhere_change_nothing_and_harm_nobody(plane: ControlPlane) -> None:
    """A creation cut after each eleventh byte, politely and by reset: no task, no error of ours, all others served."""
    before = plane.json("GET", "/api/tasks?limit=1")["pagination"]["total"]
    whole = request(plane, "POST", "/api/tasks", {"title": "cut", "orchestrator": "vp-b"})
    for length in range(1, len(whole), 11):
        for end in (reset, socket.socket.close):
            connection = raw(plane)
            connection.sendall(whole[:length])
            end(connection)
    assert plane.json("GET", "/api/tasks?limit=1")["pagination"]["total"] == before
    assert '"status":500' not in plane.log
    assert "Traceback" not in plane.log


def test_a_body_that_never_comes_keeps_nobody_else_waiting(plane: ControlPlane) -> None:
    """A hundred half requests stay open; the next whole one is answered at once."""
    half = request(plane, "POST", "/api/tasks", {"title": "half", "orchestrator": "vp-b"})[:-3]
    waiting = [raw(plane) for _ in range(100)]
    try:
        for connection in waiting:
            connection.sendall(half)
        began = time.monotonic()
        plane.json("GET", "/api/tasks?limit=1")
        assert time.monotonic() - began < SOON_S
    finally:
        for connection in waiting:
            connection.close()


def test_two_hundred_idle_polls_cost_nothing_and_get_one_task_each(plane: ControlPlane) -> None:
    """Nothing turns while they wait; one task goes to one of them, 199 more to the others."""
    waiting = [raw(plane, timeout_s=60) for _ in range(IDLE_POLLS)]
    names = ["vp-b", "vp-c"] * (IDLE_POLLS // 2)
    try:
        for name, connection in zip(names, waiting, strict=True):
            ask = {"orchestrator": name, "wait": 50, "lease_s": 60}
            connection.sendall(request(plane, "POST", "/api/tasks/poll", ask))
        time.sleep(1.5)
        before = _cpu_s(plane)
        time.sleep(2.0)
        assert _cpu_s(plane) - before < 0.5, "200 waiting polls keep the control plane busy"
        made = make(plane, names[0])
        until(lambda: plane.task(made[0])["status"] == "IN_PROGRESS", "one of them has it", SOON_S)
        made += make(plane, *names[1:])
        got = Counter(task for connection in waiting for task in grants(connection))
        assert got == Counter(made)
    finally:
        for connection in waiting:
            connection.close()


def test_two_polls_with_one_key_at_once_never_share_a_task(plane: ControlPlane) -> None:
    """Two threads, one key, a hundred tasks: each is given once."""
    made = make(plane, *["vp-d"] * 100)
    got: list[list[str]] = [[], []]
    together = threading.Barrier(2)

    def drain(mine: list[str]) -> None:
        with raw(plane) as connection:
            together.wait()
            while True:
                connection.sendall(request(plane, "POST", "/api/tasks/poll", {"orchestrator": "vp-d", "limit": 3}))
                found = grants(connection)
                if not found:
                    return
                mine += found

    threads = [threading.Thread(target=drain, args=(mine,)) for mine in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(got[0] + got[1]) == sorted(made)
    assert all(got), "both took part"


@pytest.mark.parametrize("end", [reset, socket.socket.close], ids=["reset", "closed"])
def test_a_poller_that_hung_up_while_it_waited_gets_no_task(plane: ControlPlane, end: Any) -> None:
    """The task goes to the next poller at once, without a try lost."""
    connection = raw(plane)
    connection.sendall(request(plane, "POST", "/api/tasks/poll", {"orchestrator": "vp-e", "wait": 60}))
    time.sleep(0.3)
    end(connection)
    time.sleep(0.1)
    task = plane.add("t", orchestrator="vp-e")["id"]
    (grant,) = plane.poll("vp-e", wait=SOON_S)
    assert grant["task"]["id"] == task
    assert "lease_expired" not in [one["kind"] for one in plane.json("GET", f"/api/tasks/{task}/events")["data"]]
    plane.json("POST", f"/api/tasks/{task}/complete", json={"token": grant["lease"]["token"]})


def test_a_poller_that_dies_with_its_answer_unread_costs_a_lease_at_most(plane: ControlPlane) -> None:
    """Given, never read: after `lease_s` it is somebody else's, and its old token is worth nothing."""
    task = plane.add("t", orchestrator="vp-f")["id"]
    connection = raw(plane)
    connection.sendall(request(plane, "POST", "/api/tasks/poll", {"orchestrator": "vp-f", "lease_s": LEASE_S}))
    until(lambda: plane.task(task)["status"] == "IN_PROGRESS", "it is given", SOON_S)
    began = time.monotonic()
    reset(connection)
    (grant,) = plane.poll("vp-f", wait=LEASE_S + 3 * SOON_S)
    assert grant["task"]["id"] == task
    assert time.monotonic() - began < LEASE_S + SOON_S
    plane.json("POST", f"/api/tasks/{task}/complete", json={"token": grant["lease"]["token"]})


def test_a_poller_killed_at_the_very_moment_of_its_grant_loses_nothing(plane: ControlPlane) -> None:
    """Polls that hang up while tasks are being made, fifty times over: in the end every task is done once."""
    made: list[str] = []
    for number in range(50):
        connection = raw(plane)
        ask = {"orchestrator": "vp-g", "wait": 5, "lease_s": LEASE_S}
        connection.sendall(request(plane, "POST", "/api/tasks/poll", ask))
        time.sleep(0.005 * (number % 4))
        maker = threading.Thread(target=lambda: made.extend(make(plane, "vp-g")))
        maker.start()
        time.sleep(0.002 * (number % 5))
        reset(connection)
        maker.join()
    done: list[str] = []
    end = time.monotonic() + 4 * LEASE_S
    while len(done) < len(made) and time.monotonic() < end:
        for grant in plane.poll("vp-g", wait=1, limit=10):
            done.append(grant["task"]["id"])
            plane.json("POST", f"/api/tasks/{done[-1]}/complete", json={"token": grant["lease"]["token"]})
    assert sorted(done) == sorted(made)


def test_a_reader_of_one_byte_a_second_stops_nobody_and_fills_no_memory(plane: ControlPlane) -> None:
    """It follows logs and events; others are served meanwhile, the control plane does not keep the log for it."""
    task = plane.add("t", orchestrator="vp-h")["id"]
    chunk, chunks = "x" * 60_000, 200

    async def fill() -> None:
        async with connected(plane, "vp-h") as (peer, _):
            (grant,) = await peer.claim()
            for number in range(chunks):
                await peer.log(grant, chunk, offset=number * len(chunk))
            await peer.finish(grant)

    slow = [raw(plane) for _ in range(9)]
    try:
        streams = [f"/api/tasks/{task}/log?follow=true", f"/api/tasks/{task}/events?follow=true", "/api/events"]
        for connection, path in zip(slow, itertools.cycle(streams), strict=False):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request(plane, "GET", path))
        before = _rss_mb(plane)
        asyncio.run(fill())
        slowest = 0.0
        for _ in range(3):
            for connection in slow:
                connection.recv(1)
            began = time.monotonic()
            plane.json("GET", f"/api/tasks/{task}")
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(1)
        assert slowest < SOON_S
        assert _rss_mb(plane) - before < 60, "what slow readers don't take is kept in memory"
        assert plane.task(task)["status"] == "DONE"
    finally:
        for connection in slow:
            connection.close()


def test_slow_readers_and_long_polls_do_not_keep_it_from_closing(tmp_path: Path) -> None:
    """SIGTERM with fifty polls waiting and a stream unread: exit code 0 within seconds."""
    plane = ControlPlane(tmp_path / "home").start()
    try:
        task = plane.add("t", orchestrator="vp-b", available_at="2100-01-01T00:00:00Z")["id"]
        asks = [request(plane, "POST", "/api/tasks/poll", {"orchestrator": "vp-a", "wait": 60})] * 50
        asks.append(request(plane, "GET", f"/api/tasks/{task}/log?follow=true"))
        waiting = [raw(plane) for _ in asks]
        for connection, ask in zip(waiting, asks, strict=True):
            connection.sendall(ask)
        time.sleep(0.5)
        began = time.monotonic()
        assert plane.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 8
        for connection in waiting:
            connection.close()
    finally:
        plane.close()


def _cpu_s(plane: ControlPlane) -> float:
    assert plane.process is not None
    fields = Path(f"/proc/{plane.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mb(plane: ControlPlane) -> float:
    assert plane.process is not None
    status = Path(f"/proc/{plane.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
