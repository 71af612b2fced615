"""What waits for an orchestrator reaches its daemon, or whoever asks over HTTP: in order, and nothing is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from peer import Peer, connected
from postgres_server import PostgresServer
from serving import SERVE, ControlPlane, until
from test_tasks import problem

from orchestrator_fleet.orchestrators import notices
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.wire import link as wire

TIMEOUT_S = 60.0
IMPATIENT = f"from orchestrator_fleet.api import delivery; delivery.AGAIN_S = 0.3\n{SERVE}"


def run(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await story

    asyncio.run(bounded())


def say(plane: ControlPlane, content: str, *, to: str = "vp-a", sender: str = "vp-b", **fields: Any) -> dict[str, Any]:
    """A message is the plainest notice."""
    path = f"/api/vps/{sender}/conversations/initiate"
    message: dict[str, Any] = plane.json("POST", path, code=201, json={"to": to, "content": content, **fields})[
        "message"
    ]
    return message


def inbox(plane: ControlPlane, vp: str = "vp-a", **asked: Any) -> dict[str, Any]:
    page: dict[str, Any] = plane.json("GET", f"/api/vps/{vp}/inbox", params={"limit": 100, **asked})
    return page


def empty(plane: ControlPlane, vp: str = "vp-a") -> bool:
    return inbox(plane, vp)["pagination"]["total"] == 0


def tell_many(plane: ControlPlane, number: int) -> list[str]:
    """Many notices in one transaction, as if another control plane wrote them."""
    store = open_store(plane.store)

    def write(conn: Any) -> list[str]:
        now_us = 4_000_000_000_000_000
        return [
            notices.tell(conn, orchestrator="vp-a", kind="k", data={"n": n}, actor="k-1", now_us=now_us)
            for n in range(number)
        ]

    told = store.write_sync(write)
    store.close()
    return told


async def quiet(peer: Peer) -> None:
    """Nothing is on its way: what was sent before the answer to a beat is here with it."""
    await peer.beat()
    assert peer.notices == []


@pytest.fixture
def plane(shared: ControlPlane) -> Iterator[ControlPlane]:
    """The shared control plane; what nobody took is taken."""
    yield shared
    while left := [one["id"] for one in inbox(shared)["data"]]:
        shared.json("POST", "/api/vps/vp-a/inbox/seen", json={"ids": left})


def test_what_waited_is_told_on_arrival_and_the_rest_at_once(plane: ControlPlane) -> None:
    """In order; what is noticed comes no more, and an event says who has it."""

    async def story() -> None:
        first = await asyncio.to_thread(say, plane, "while you were away")
        second = await asyncio.to_thread(say, plane, "and another")
        async with connected(plane) as (peer, _):
            told = [await peer.told(), await peer.told()]
            assert [one.notice for one in told] == [first["id"], second["id"]]
            assert (told[0].kind, told[0].data["content"]) == ("message", "while you were away")
            assert (told[0].data["from"], told[0].data["conversation"]) == ("vp-b", first["conversation"])
            await quiet(peer)
            await peer.noticed(*told)
            await asyncio.to_thread(until, lambda: empty(plane), "both are delivered")
            third = await asyncio.to_thread(say, plane, "now")
            now = await peer.told()
            assert now.notice == third["id"]
            await peer.noticed(now)
            await asyncio.to_thread(until, lambda: empty(plane), "the third is delivered")
        async with connected(plane, epoch="e2") as (peer, _):
            await quiet(peer)

    run(story())
    store = open_store(plane.store)
    found = store.read_sync(lambda c: outbox.read_after(c, 0))
    store.close()
    delivered = [one for one in found if one.kind == "notice_delivered" and one.actor == "daemon:vp-a@m01"]
    assert [one.orchestrator for one in delivered] == ["vp-a"] * 3
    assert delivered[0].data["notice_kind"] == "message"


def test_what_was_not_noticed_comes_again(plane: ControlPlane) -> None:
    """On the next connection, all of it, in its order."""

    async def story() -> None:
        told = [(await asyncio.to_thread(say, plane, f"again {n}"))["id"] for n in range(3)]
        async with connected(plane) as (peer, _):
            got = [await peer.told() for _ in told]
            await peer.noticed(got[1])
            await asyncio.to_thread(
                until, lambda: [one["id"] for one in inbox(plane)["data"]] == [told[0], told[2]], "one is delivered"
            )
        async with connected(plane, epoch="e2") as (peer, _):
            got = [await peer.told() for _ in range(2)]
            assert [one.notice for one in got] == [told[0], told[2]]
            await peer.noticed(*got)
            await asyncio.to_thread(until, lambda: empty(plane), "the others are delivered")

    run(story())


def test_one_batch_is_on_its_way_at_a_time(plane: ControlPlane) -> None:
    """Whoever is slow to write gets no more meanwhile, and everything else goes on."""
    told = tell_many(plane, 120)

    async def story() -> None:
        async with connected(plane) as (peer, _):
            got: list[wire.Notice] = []
            for size in (50, 50, 20):
                batch = [await peer.told() for _ in range(size)]
                assert (await asyncio.to_thread(plane.add, "work"))["orchestrator"] == "vp-a"
                (grant,) = await peer.claim()
                assert await peer.finish(grant) == "DONE"
                await quiet(peer)
                await peer.noticed(*batch[:-1])
                await quiet(peer)
                await peer.noticed(batch[-1])
                got += batch
            assert [one.notice for one in got] == told
            assert [one.data["n"] for one in got] == list(range(120))
            await asyncio.to_thread(until, lambda: empty(plane), "all are delivered")

    run(story())


def test_nobody_notices_what_is_not_his(plane: ControlPlane) -> None:
    """Unknown ids, others' ids and no text at all change nothing; too many end the link."""

    async def story() -> None:
        theirs = await asyncio.to_thread(say, plane, "for b", to="vp-b", sender="vp-a")
        mine = await asyncio.to_thread(say, plane, "for a")
        async with connected(plane) as (peer, _):
            told = await peer.told()
            await peer.send(wire.Noticed(notices=("", "\0", "ntc-none", theirs["id"], "x" * 10_000)))
            await peer.send(wire.Noticed(notices=()))
            await quiet(peer)
            assert [one["id"] for one in (await asyncio.to_thread(inbox, plane))["data"]] == [mine["id"]]
            assert [one["id"] for one in (await asyncio.to_thread(inbox, plane, "vp-b"))["data"]] == [theirs["id"]]
            await peer.noticed(told)
            await peer.noticed(told)
            await asyncio.to_thread(until, lambda: empty(plane), "it is delivered")
            await peer.send(wire.Noticed(notices=("x",) * 1_001))
            assert (await peer.closed())[0] == 1009
        await asyncio.to_thread(plane.json, "POST", "/api/vps/vp-b/inbox/seen", json={"ids": [theirs["id"]]})

    run(story())
    assert "Traceback" not in plane.log


def test_what_nobody_answers_is_sent_again(control_plane: ControlPlane) -> None:
    """After a while, with what came meanwhile."""
    plane = control_plane
    plane.process = plane.popen(IMPATIENT)
    plane.ready()

    async def story() -> None:
        async with connected(plane) as (peer, _):
            first = await asyncio.to_thread(say, plane, "first")
            assert (await peer.told()).notice == first["id"]
            assert (await peer.told()).notice == first["id"]
            second = await asyncio.to_thread(say, plane, "second")
            seen: list[wire.Notice] = []
            while second["id"] not in [one.notice for one in seen]:
                seen.append(await peer.told())
            await peer.noticed(*{one.notice: one for one in seen}.values())
            await asyncio.to_thread(until, lambda: empty(plane), "both are delivered")

    run(story())


def test_nothing_is_lost_when_the_control_plane_is_killed(control_plane: ControlPlane) -> None:
    """Between the notice and the word that it arrived."""
    plane = control_plane.start()

    async def story() -> None:
        told = [(await asyncio.to_thread(say, plane, f"n{n}"))["id"] for n in range(3)]
        async with connected(plane) as (peer, _):
            assert (await peer.told()).notice == told[0]
            await asyncio.to_thread(plane.stop, signal.SIGKILL)
        await asyncio.to_thread(plane.start)
        async with connected(plane, epoch="e2") as (peer, _):
            got = [await peer.told() for _ in told]
            assert [one.notice for one in got] == told
            await peer.noticed(*got)
            await asyncio.to_thread(until, lambda: empty(plane), "all are delivered")

    run(story())


def test_whoever_has_the_link_delivers(postgres_server: PostgresServer, tmp_path: Path) -> None:
    """What is said at one control plane reaches a daemon that is connected to another."""
    with postgres_server.lent() as url:
        a, b = ControlPlane(tmp_path / "a", store=url), ControlPlane(tmp_path / "b", store=url)
        try:
            a.start()
            b.start()

            async def story() -> None:
                async with connected(a) as (peer, _):
                    said = await asyncio.to_thread(say, b, "over there")
                    told = await peer.told()
                    assert told.notice == said["id"]
                    await peer.noticed(told)
                    await asyncio.to_thread(until, lambda: empty(b), "it is delivered")

            run(story())
        finally:
            a.close()
            b.close()


def test_what_is_old_is_forgotten(control_plane: ControlPlane) -> None:
    """The control plane looks as it starts, and now and then."""
    plane = control_plane.start()
    plane.stop()
    store = open_store(plane.store)
    store.write_sync(lambda c: notices.tell(c, orchestrator="vp-a", kind="k", data={}, actor="k-1", now_us=1_000_000))
    plane.start()

    def kinds() -> list[str]:
        return [one.kind for one in store.read_sync(lambda c: outbox.read_after(c, 0))]

    until(lambda: "notice_expired" in kinds(), "the old one is forgotten")
    store.close()


def test_a_poller_reads_its_inbox_over_http(plane: ControlPlane) -> None:
    """With its own key: in pages, oldest first; what it has seen is gone, and seeing it twice is fine."""
    told = [say(plane, f"poll {n}")["id"] for n in range(3)]
    first = plane.json("GET", "/api/orchestrators/vp-a/inbox?limit=2", key="vp-a")
    assert [one["id"] for one in first["data"]] == told[:2]
    assert (first["pagination"]["total"], first["data"][0]["kind"]) == (3, "message")
    cursor = first["pagination"]["next_cursor"]
    rest = plane.json("GET", f"/api/vps/vp-a/inbox?cursor={cursor}", key="vp-a")
    assert ([one["id"] for one in rest["data"]], rest["pagination"]["next_cursor"]) == ([told[2]], None)
    seen = {"ids": [told[2], told[0], "ntc-none"]}
    assert plane.json("POST", "/api/vps/vp-a/inbox/seen", key="vp-a", json=seen) == {"seen": [told[0], told[2]]}
    assert plane.json("POST", "/api/vps/vp-a/inbox/seen", key="vp-a", json=seen) == {"seen": []}
    assert [one["id"] for one in inbox(plane)["data"]] == [told[1]]


def test_an_inbox_is_its_owners(plane: ControlPlane) -> None:
    """Another orchestrator's key is refused before anything says who is there; people's keys need the scope."""
    for path in ("/api/vps/vp-b/inbox", "/api/vps/vp-none/inbox"):
        assert problem(plane.ask("GET", path, key="vp-a")) == (403, "missing_scope")
        assert problem(plane.ask("POST", f"{path}/seen", key="vp-a", json={"ids": ["x"]})) == (403, "missing_scope")
    assert problem(plane.ask("GET", "/api/vps/vp-none/inbox")) == (404, "not_found")
    assert problem(plane.ask("POST", "/api/vps/vp-none/inbox/seen", json={"ids": ["x"]})) == (404, "not_found")
    assert plane.ask("GET", "/api/vps/vp-a/inbox", key="fleet:read").status_code == 200
    assert problem(plane.ask("GET", "/api/vps/vp-a/inbox", key="tasks:read")) == (403, "missing_scope")
    assert problem(plane.ask("GET", "/api/vps/vp-a/inbox?cursor=x")) == (422, "invalid")
    for ids in ([], ["\0"], ["x"] * 101, "x"):
        assert problem(plane.ask("POST", "/api/vps/vp-a/inbox/seen", json={"ids": ids})) == (422, "invalid")
