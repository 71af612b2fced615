"""The process: one of its kind, gone when told, following what is applied."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from peer import connected, dialled
from serving import DEADLINE_S, SERVE, ControlPlane, until
from websockets.exceptions import InvalidStatus


def test_it_says_where_it_is_while_it_runs_and_ends_clean(control_plane: ControlPlane) -> None:
    """serve.json names the pid and the URL, and is gone after SIGTERM, with exit code 0 and history up to date."""
    control_plane.start()
    assert control_plane.process is not None
    told = json.loads((control_plane.state / "serve.json").read_text())
    assert (told["pid"], told["url"]) == (control_plane.process.pid, control_plane.url)
    assert told["started"].endswith("Z")
    control_plane.add("last words")
    assert control_plane.stop(signal.SIGTERM) == 0
    assert not (control_plane.state / "serve.json").exists()
    assert "Traceback" not in control_plane.log
    control_plane.start()
    assert control_plane.stop(signal.SIGINT) == 0


def test_whoever_waits_is_let_go_at_the_end(control_plane: ControlPlane) -> None:
    """A long poll gets its empty answer, a log stream ends, a daemon is told to come again."""
    control_plane.start()
    task = control_plane.add(orchestrator="vp-b")
    headers = {"Authorization": f"Bearer {control_plane.keys['admin']}"}
    path = f"{control_plane.url}/api/tasks/{task['id']}/log?follow=true"

    async def story() -> None:
        async with (
            connected(control_plane, "vp-b") as (peer, _),
            httpx.AsyncClient(timeout=DEADLINE_S) as client,
            client.stream("GET", path, headers=headers) as stream,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", control_plane.port)
            writer.write(
                b"GET /api/tasks/poll?orchestrator=vp-a&wait=60 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Authorization: %s\r\n\r\n" % headers["Authorization"].encode()
            )
            await writer.drain()
            # What is asked later is answered later: once this is, the poll waits.
            await client.get(f"{control_plane.url}/readyz")
            assert control_plane.process is not None
            os.kill(control_plane.process.pid, signal.SIGTERM)
            assert (await peer.closed())[0] in (1001, 1012)
            assert b"event:" not in await stream.aread()
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert answer.endswith(b'{"data":[],"reason":"the control plane is closing"}')
            writer.close()

    asyncio.run(story())
    assert control_plane.process is not None
    assert control_plane.process.wait(DEADLINE_S) == 0


def test_a_second_one_is_refused_and_told_who_serves(control_plane: ControlPlane) -> None:
    """The first goes on; a killed one leaves no lock behind."""
    control_plane.start()
    assert control_plane.process is not None
    first = control_plane.process.pid
    second = control_plane.popen()
    assert second.wait(DEADLINE_S) != 0
    assert f"another `fleet serve` runs here, pid {first} at {control_plane.url}" in control_plane.log
    assert control_plane.ask("GET", "/readyz").status_code == 200
    control_plane.stop(signal.SIGKILL)
    control_plane.start()
    assert json.loads((control_plane.state / "serve.json").read_text())["pid"] != first


def test_a_port_that_is_taken_is_an_error_that_names_it(control_plane: ControlPlane) -> None:
    """With what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", control_plane.port))
        taken.listen()
        process = control_plane.popen()
        assert process.wait(DEADLINE_S) != 0
    assert f"cannot listen on 127.0.0.1:{control_plane.port}: Address already in use" in control_plane.log
    assert not (control_plane.state / "serve.json").exists()


def test_each_request_is_one_json_line(control_plane: ControlPlane) -> None:
    """Method, path, status, time, key id and request id; nothing else is on stdout but JSON."""
    control_plane.start()
    answer = control_plane.ask("GET", "/api/tasks?limit=5")
    control_plane.ask("GET", "/api/tasks", key=None)
    control_plane.stop()
    lines = [json.loads(line) for line in control_plane.log.splitlines()]
    requests = [line for line in lines if line["event"] == "request" and line["path"] == "/api/tasks"]
    assert [(line["method"], line["status"]) for line in requests] == [("GET", 200), ("GET", 401)]
    (admin,) = (name for name, key in control_plane.declared.items() if key["scopes"] == ["admin"])
    assert requests[0]["key"] == admin
    assert requests[0]["request_id"] == answer.headers["x-request-id"]
    assert requests[0]["ms"] > 0
    assert requests[1]["key"] is None


def test_a_new_key_works_and_an_old_one_stops_without_a_restart(control_plane: ControlPlane) -> None:
    """As soon as the control plane's generation is another; a waiting task finds its new orchestrator."""
    control_plane.routing = "  - {name: ops, when: has(task.discipline), to: {discipline: ops}}\n"
    control_plane.write()
    control_plane.start()
    unrouted = control_plane.add("nobody's")
    assert (unrouted["orchestrator"], unrouted["status"]) == (None, "TODO")
    assert "no routing rule matches it" in unrouted["condition"]
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(control_plane.poll, "vp-b", wait=30)
        control_plane.routing += "  - {name: rest, to: {orchestrator: vp-b}}\n"
        gone = control_plane.keys["fleet:read"]
        control_plane.declared = {k: v for k, v in control_plane.declared.items() if v["scopes"] != ["fleet:read"]}
        control_plane.declare("fresh", owner="person:new", scopes=["fleet:read"])
        control_plane.write()
        control_plane.publish()
        (grant,) = polling.result(DEADLINE_S)
    assert grant["task"]["id"] == unrouted["id"]
    assert grant["task"]["route"] == "rest"
    assert control_plane.ask("GET", "/api/vps", key="fresh").status_code == 200
    assert httpx.get(f"{control_plane.url}/api/vps", headers={"Authorization": f"Bearer {gone}"}).status_code == 401


def test_what_is_of_an_orchestrator_that_is_taken_out_is_routed_anew(control_plane: ControlPlane) -> None:
    """Its tasks move, its daemon is cut off and does not get in again."""
    control_plane.start()
    waiting = control_plane.add("waits", orchestrator="vp-b")

    async def story() -> None:
        async with connected(control_plane, "vp-b", sessions_max=0) as (peer, _):
            del control_plane.orchestrators["vp-b"]
            control_plane.declared = {k: v for k, v in control_plane.declared.items() if v["owner"] != "vp-b"}
            control_plane.write()
            await asyncio.to_thread(control_plane.publish)
            code, reason = await peer.closed()
            assert code == 1008
            assert "no longer declared" in reason
        async with dialled(control_plane, control_plane.keys["daemon:vp-b"]) as peer:
            await peer.socket.send(
                '{"type":"hello","orchestrator":"vp-b","machine":"m01","boot":"b","epoch":"e","pid":1,'
                '"generation":"g","charter_version":"c","sessions_max":1}'
            )
            assert (await peer.closed())[0] == 1008

    asyncio.run(story())
    until(lambda: control_plane.task(waiting["id"])["orchestrator"] == "vp-a", "the task moved")
    assert control_plane.ask("GET", "/api/vps/vp-b").status_code == 404
    kinds = [event["kind"] for event in control_plane.json("GET", f"/api/tasks/{waiting['id']}/events")["data"]]
    assert kinds == ["task_created", "task_routed"]


def test_a_generation_that_cannot_be_read_changes_nothing(control_plane: ControlPlane) -> None:
    """It goes on by the old one, and says so."""
    control_plane.start()
    current = control_plane.state / "control/current"
    broken = control_plane.state / "control/generations" / ("0" * 64)
    broken.mkdir()
    (broken / "control.json").write_text("{")
    part = current.with_name("part")
    part.symlink_to(f"generations/{broken.name}")
    part.replace(current)
    until(lambda: "can't be used; the old one stays" in control_plane.log, "it was told")
    assert control_plane.ask("GET", "/api/vps").status_code == 200


def test_a_key_that_is_revoked_drops_its_link(control_plane: ControlPlane) -> None:
    """Daemons of one's own making use a declared key; it ends at once."""
    control_plane.start()
    key = control_plane.keys["vp-a"]

    async def story() -> None:
        control_plane.keys["daemon:vp-a"] = key
        async with connected(control_plane, "vp-a") as (peer, _):
            control_plane.declared = {k: v for k, v in control_plane.declared.items() if v["owner"] != "vp-a"}
            control_plane.write()
            await asyncio.to_thread(control_plane.publish)
            assert await peer.closed() == (1008, "its key is unknown")
        with pytest.raises(InvalidStatus) as refused:
            async with dialled(control_plane, key):
                pass
        assert refused.value.response.status_code == 401

    asyncio.run(story())


def test_the_fleet_is_shown_as_declared(control_plane: ControlPlane) -> None:
    """Filtered, sorted and paged; an unknown one is 404."""
    control_plane.orchestrators |= {f"vp-{n:02}": "many" for n in range(6)}
    control_plane.write()
    control_plane.start()
    control_plane.add(orchestrator="vp-01", due_at="2020-01-01T00:00:00Z")

    def names(query: str) -> list[str]:
        return [vp["id"] for vp in control_plane.json("GET", f"/api/vps?{query}")["data"]]

    assert names("discipline=eng,ops") == ["vp-a", "vp-b"]
    assert names("label=trade%3Dops") == ["vp-b"]
    assert names("status=ONLINE") == []
    assert names("machine=m01&q=VP-0&limit=2") == ["vp-00", "vp-01"]
    assert names("sort=name&order=desc&limit=1") == ["vp-b"]
    seen: list[str] = []
    cursor = ""
    while True:
        page = control_plane.json("GET", f"/api/orchestrators?limit=4&sort=discipline{cursor}")
        seen += [vp["id"] for vp in page["data"]]
        assert page["pagination"]["total"] == 8
        if page["pagination"]["next_cursor"] is None:
            break
        cursor = f"&cursor={page['pagination']['next_cursor']}"
    assert seen == ["vp-a", *(f"vp-{n:02}" for n in range(6)), "vp-b"]
    one = control_plane.ask("GET", "/api/orchestrators/vp-01")
    shown = one.json()
    assert one.headers["etag"] == f'"{shown["version"]}"'
    assert shown["spec"]["charter"] == "charters/vp.md"
    assert shown["spec"]["runner"]["command"] == ["python3", "-V"]
    assert shown["backlog"] == {"open": 1, "in_progress": 0, "blocked": 0, "overdue": 1}
    assert (shown["status"], shown["last_seen_at"], shown["sessions"]) == ("OFFLINE", None, [])
    assert control_plane.ask("GET", "/api/vps/vp-nobody").status_code == 404
    for query in ("limit=0", "sort=backlog", "status=DEAD", "cursor=x", "lable=x"):
        assert control_plane.ask("GET", f"/api/vps?{query}").status_code == 422
    fleet = control_plane.json("GET", "/api/fleet")
    assert fleet["orchestrators"] == {"total": 8, "by_status": {"OFFLINE": 8}}
    assert fleet["tasks"] == {"total": 1, "by_status": {"TODO": 1}}
    assert len(fleet["machines"]["m01"]["orchestrators"]) == 8


def test_another_port_may_be_given(control_plane: ControlPlane) -> None:
    """The one of control_plane.url is only the default; 0 takes any free one."""
    control_plane.process = control_plane.popen(SERVE.replace("None, None", "None, 0"))
    url = until(lambda: _url(control_plane), "it says where it is")
    assert url != control_plane.url
    assert httpx.get(f"{url}/healthz").json()["status"] == "ok"


def _url(plane: ControlPlane) -> str | None:
    try:
        url: str = json.loads((plane.state / "serve.json").read_text())["url"]
    except OSError:
        return None
    return url
