"""Several `fleet serve` on one PostgreSQL are one control plane to whoever asks any of them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from peer import connected
from postgres_server import PostgresServer
from serving import ControlPlane, until

pytestmark = pytest.mark.anyio

Two = tuple[ControlPlane, ControlPlane]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def _done(plane: ControlPlane, claimed: list[dict]) -> None:
    for one in claimed:
        plane.json("POST", f"/api/tasks/{one['task']['id']}/complete", json={"token": one["lease"]["token"]})


def test_who_waits_at_one_gets_what_is_made_at_the_other(two: Two) -> None:
    """Long before it would look by itself."""
    a, b = two
    with ThreadPoolExecutor() as threads:
        took = []
        for n in range(4):
            polling = threads.submit(a.poll, wait=30)
            time.sleep(0.3)
            began = time.perf_counter()
            made = b.add(f"n{n}", orchestrator="vp-a")
            claimed = polling.result(30)
            took.append(time.perf_counter() - began)
            assert [one["task"]["id"] for one in claimed] == [made["id"]]
            _done(b, claimed)
            assert a.task(made["id"])["status"] == "DONE"
    assert min(took) < 0.5, took  # it looks each second by itself


def test_a_task_is_given_to_one_alone(two: Two) -> None:
    """However many ask at both."""
    made = {two[n % 2].add(f"n{n}", orchestrator="vp-a")["id"] for n in range(40)}

    def drain(plane: ControlPlane) -> list[str]:
        got = []
        while claimed := plane.poll(limit=2):
            got += [one["task"]["id"] for one in claimed]
            _done(plane, claimed)
        return got

    with ThreadPoolExecutor() as threads:
        given = Counter(one for got in threads.map(drain, [*two] * 3) for one in got)
    assert given == Counter(made)


async def test_a_daemon_of_one_is_seen_by_the_other_and_its_start_and_end_change_nothing(two: Two) -> None:
    """Presence is what anybody hears; a control plane that comes or goes speaks for its own daemons alone."""
    a, b = two

    async def shown() -> str:
        return (await asyncio.to_thread(b.json, "GET", "/api/vps/vp-a"))["status"]

    async with connected(a, "vp-a") as (peer, _):
        for _ in range(2):
            assert await shown() == "ONLINE"
            await peer.beat()
            await asyncio.to_thread(b.stop)
            await asyncio.to_thread(b.start)
        assert await shown() == "ONLINE"
        made = await asyncio.to_thread(b.add, orchestrator="vp-a")
        (grant,) = await peer.claim()
        assert grant.task["id"] == made["id"]
        await asyncio.to_thread(b.json, "POST", f"/api/tasks/{made['id']}/cancel", json={})
        assert (await peer.cancelled()).task == made["id"]

    def told() -> list[str]:
        query = "select kind from events where kind like 'orchestrator%' order by id"
        return [kind for (kind,) in b.json("POST", "/api/sql", json={"query": query})["rows"]]

    # Who hangs up does not wait until that is written down.
    await asyncio.to_thread(until, lambda: "orchestrator_offline" in told(), "its end is told")
    assert await asyncio.to_thread(told) == ["orchestrator_online", "orchestrator_offline"]


def test_both_are_back_after_a_restart_of_postgresql(two_on_own: Two, own_server: PostgresServer) -> None:
    """Nobody starts anything by hand, and what one makes wakes the other again."""
    a, b = two_on_own
    a.add("before", orchestrator="vp-a")
    own_server.stop(signal.SIGQUIT)
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(plane.ask, "GET", "/api/tasks") for plane in two_on_own]
        time.sleep(0.5)
        own_server.start()
        assert {one.result(30).status_code for one in asked} <= {200, 503}  # they waited, but not for ever
        for plane in two_on_own:
            until(lambda plane=plane: plane.ask("GET", "/api/tasks").status_code == 200, "it reads again")
        assert [one["task"]["title"] for one in b.poll()] == ["before"]
        time.sleep(2)  # both listen again
        polling = threads.submit(a.poll, wait=30)
        time.sleep(0.3)
        began = time.perf_counter()
        b.add("after", orchestrator="vp-a")
        assert [one["task"]["title"] for one in polling.result(30)] == ["after"]
        assert time.perf_counter() - began < 1.0


def test_one_goes_on_when_the_other_is_killed(two_on_own: Two) -> None:
    """What the dead one was doing is found by the other."""
    a, b = two_on_own
    mine = a.add("held", orchestrator="vp-a")
    (held,) = a.poll(lease_s=5)
    assert a.stop(signal.SIGKILL) != 0
    _done(b, b.poll() if b.add("next", orchestrator="vp-a") else [])
    until(lambda: b.task(mine["id"])["status"] == "TODO", "the lease of who is gone ends")
    (again,) = b.poll()
    assert again["task"]["id"] == mine["id"]
    late = b.ask("POST", f"/api/tasks/{mine['id']}/complete", json={"token": held["lease"]["token"]})
    assert (late.status_code, late.json()["code"]) == (409, "lease_lost")
    _done(b, [again])


def test_a_control_plane_without_its_postgresql_says_so(two_on_own: Two, own_server: PostgresServer) -> None:
    """503 with the cause and the cure, and no more than a few seconds of waiting."""
    a, _ = two_on_own
    own_server.stop()
    answer = a.ask("POST", "/api/tasks", json={"title": "t"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "check that PostgreSQL runs there" in answer.json()["detail"]
    assert httpx.get(f"{a.url}/readyz", timeout=10).status_code == 503
    own_server.start()
    until(lambda: httpx.get(f"{a.url}/readyz", timeout=10).status_code == 200, "it is back")
    a.add("after")
