"""A key that is revoked at one control plane is good at none, whatever their files say."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from peer import dialled, hello
from postgres_server import PostgresServer
from serving import ControlPlane, until

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import key_revocations
from orchestrator_fleet.wire import link as wire

SOON_S = 1.0


@pytest.fixture
def pair(postgres_server: PostgresServer, tmp_path: Path) -> Iterator[tuple[ControlPlane, ControlPlane]]:
    """Two on one store, each with a clone of the same files; neither is under git."""
    with postgres_server.lent() as url:
        a, b = (ControlPlane(tmp_path / name, store=url) for name in ("a", "b"))
        a.declare("vp-b:second", owner="vp-b", scopes=["tasks:work", "tasks:read"])
        b.keys, b.declared = a.keys, a.declared
        try:
            for plane in (a, b):
                plane.write()
                plane.process = plane.popen()
            for plane in (a, b):
                plane.ready()
            yield a, b
        finally:
            a.close()
            b.close()


def test_the_other_refuses_it_within_a_second(pair: tuple[ControlPlane, ControlPlane]) -> None:
    """Its next request, the daemon's link and the long poll that it has there; after a restart, too."""
    a, b = pair

    async def linked() -> tuple[tuple[int, str], float]:
        async with dialled(b, b.keys["vp-a"]) as peer:
            await peer.ask(hello("vp-a"), wire.Welcome)
            headers = {"Authorization": f"Bearer {b.keys['vp-b']}"}
            async with httpx.AsyncClient(base_url=b.url, headers=headers, timeout=40) as client:
                polling = asyncio.create_task(client.post("/api/tasks/poll", json={"wait": 30}))
                await asyncio.sleep(0.3)  # it waits there
                for vp in ("vp-a", "vp-b"):
                    told = await asyncio.to_thread(a.json, "DELETE", f"/api/vps/{vp}/api-key")
                    assert told["committed"] is False
                began = time.monotonic()
                assert (await polling).status_code == 401
                return await peer.closed(), time.monotonic() - began

    closed, took_s = asyncio.run(linked())
    assert closed == (1008, "its key is revoked")
    assert took_s < SOON_S
    for plane in (a, b):
        for key in ("vp-a", "vp-b", "vp-b:second"):
            assert plane.ask("GET", "/api/tasks", key=key).status_code == 401
    b.stop(signal.SIGKILL)
    b.start()
    assert b.ask("GET", "/api/tasks", key="vp-a").status_code == 401


def test_one_whose_event_was_not_heard_is_known_all_the_same(pair: tuple[ControlPlane, ControlPlane]) -> None:
    """A store that was put back from a backup tells no events."""
    _, b = pair
    assert b.ask("GET", "/api/tasks", key="vp-a").status_code == 200
    (key_id,) = (name for name, key in b.declared.items() if key["owner"] == "vp-a")
    row = {"key_id": key_id, "owner": "vp-a", "revoked_at_us": SECOND_US, "actor": "test", "reason": None}
    store = open_store(b.store)
    store.write_sync(lambda conn: conn.execute(key_revocations.insert(), row))
    store.close()
    until(lambda: b.ask("GET", "/api/tasks", key="vp-a").status_code == 401, "it is read")


def test_a_use_at_either_is_the_last_use(pair: tuple[ControlPlane, ControlPlane]) -> None:
    """Each writes down what it saw; the newest counts."""
    a, b = pair
    a.ask("GET", "/api/tasks", key="vp-a")
    b.ask("GET", "/api/tasks", key="vp-a")
    b.stop()

    def shown() -> str | None:
        (one,) = a.json("GET", "/api/keys?owner=vp-a")["data"]
        at: str | None = one["last_used_at"]
        return at

    by_b = shown()
    a.ask("GET", "/api/tasks", key="vp-a")
    assert by_b is not None
    assert (shown() or "") > by_b
