"""The door by itself: what a check costs, who is told to wait, and when a long answer ends."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ControlPlane

from orchestrator_fleet import keys
from orchestrator_fleet.api.control import current_generation, load
from orchestrator_fleet.api.door import Door, network_of
from orchestrator_fleet.api.history import History
from orchestrator_fleet.api.plane import FAILURE_BURST, FAILURE_PER_S, REQUEST_BURST, REQUESTS_PER_S, Plane
from orchestrator_fleet.clock import SECOND_US, FrozenClock
from orchestrator_fleet.orchestrators import keyring
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.store.database import open_store

Answer = tuple[int, dict[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> ControlPlane:
    """A fleet whose keys are published; nobody serves it."""
    one = ControlPlane(tmp_path_factory.mktemp("door") / "home")
    one.declare("expired", owner="person:me", scopes=["admin"], expires="2025-01-01T00:00:00Z")
    one.declare("revoked", owner="person:me", scopes=["admin"], revoked="2025-01-01T00:00:00Z")
    one.declare("revoked-in-store", owner="person:me", scopes=["admin"])
    one.declare("ends-soon", owner="person:me", scopes=["admin"], expires="2026-01-01T00:00:02Z")
    one.write()
    one.publish()
    return one


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock()


@pytest.fixture
def plane(home: ControlPlane, clock: FrozenClock, tmp_path: Path) -> Iterator[Plane]:
    """A real one, whose time stands."""
    state, store = State(home.home / "fleet.yaml"), open_store(f"sqlite:///{tmp_path}/store.sqlite")
    generation = current_generation(state.control_root)
    assert generation is not None
    yield Plane(
        store=store,
        control=load(state.control_root, generation),
        control_root=state.control_root,
        fleet_file=state.fleet_file,
        clock=clock,
        history=History(store_url=store.url, path=tmp_path / "history.duckdb"),
        machines=state.machine_root,
    )
    store.close()


async def fine(scope: Any, receive: Any, send: Any) -> None:
    """Another's app, that says who asks."""
    del receive
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"key": scope["auth"].id}).encode()})


async def knock(door: Door, text: str | None, *, address: str = "192.0.2.1") -> Answer:
    """One request with this key."""
    headers = [] if text is None else [(b"authorization", f"Bearer {text}".encode())]
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": headers, "client": (address, 1)}
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await door(scope, receive, send)
    start, body = sent
    told = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], told, json.loads(body["body"])


def unknown() -> str:
    return keys.mint().text


def wrong_secret(of: str) -> str:
    """A well-formed key with the id of another and a secret of its own."""
    key_id, _ = keys.parse(of) or ("", "")
    _, secret = keys.parse(keys.mint().text) or ("", "")
    head = f"fleet_{key_id}_{secret}"
    return f"{head}_{zlib.crc32(head.encode()):08x}"


def test_every_refusal_costs_one_digest_and_one_comparison(
    home: ControlPlane, plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whyever it is refused; so does a good key, and none of them looks elsewhere for longer than another."""
    counted: list[str] = []

    def count(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            counted.append(name)
            return real(*args, **kwargs)

        return counting

    monkeypatch.setattr(hashlib, "sha256", count("digest", hashlib.sha256))
    monkeypatch.setattr(hmac, "compare_digest", count("compare", hmac.compare_digest))
    good = home.keys["admin"]
    shown = {
        "good": good,
        "malformed": good[:-1] + ("0" if good[-1] != "0" else "1"),
        "malformed and long": "x" * 10_000,
        "malformed and empty": "",
        "unknown": unknown(),
        "unknown secret": wrong_secret(good),
        "unknown secret of a revoked key": wrong_secret(home.keys["revoked"]),
        "revoked": home.keys["revoked"],
        "revoked in the store": home.keys["revoked-in-store"],
        "expired": home.keys["expired"],
    }
    parsed = keys.parse(home.keys["revoked-in-store"])
    assert parsed is not None
    plane.know_revoked({parsed[0]: plane.clock.now_us()})

    async def look() -> None:
        for what, text in shown.items():
            counted.clear()
            found = await plane.authenticate(text)
            assert counted == ["digest", "compare"], what
            reason = found.id if isinstance(found, KnownKey) else found.reason
            assert isinstance(found, KnownKey) if what == "good" else reason == what.split()[0], what

    asyncio.run(look())


def test_who_guesses_is_told_to_wait_and_hinders_nobody(home: ControlPlane, plane: Plane, clock: FrozenClock) -> None:
    """By address; a good key from there is let through, and so is a wrong one after a while."""

    async def story() -> None:
        door = Door(fine, plane=plane)
        for n in range(FAILURE_BURST):
            status, headers, body = await knock(door, "x" if n % 10 else unknown())
            assert (status, headers["www-authenticate"], body["code"]) == (401, "Bearer", "unauthorized")
        status, headers, body = await knock(door, "x")
        assert (status, headers["retry-after"], body["code"]) == (429, "1", "too_many_requests")
        assert (await knock(door, home.keys["admin"]))[0] == 200
        assert (await knock(door, None))[0] == 401
        assert (await knock(door, "x", address="192.0.2.2"))[0] == 401
        clock.advance(1)
        statuses = [(await knock(door, "x"))[0] for _ in range(round(FAILURE_PER_S) + 1)]
        assert statuses == [401] * round(FAILURE_PER_S) + [429]

    asyncio.run(story())


def test_one_key_leaves_something_to_the_others(home: ControlPlane, plane: Plane, clock: FrozenClock) -> None:
    """Far above what a client needs, it is told to wait."""

    async def story() -> None:
        door = Door(fine, plane=plane)
        for _ in range(REQUEST_BURST):
            assert (await knock(door, home.keys["admin"]))[0] == 200
        status, headers, body = await knock(door, home.keys["admin"])
        assert (status, headers["retry-after"], body["code"]) == (429, "1", "too_many_requests")
        assert (await knock(door, home.keys["vp-a"]))[0] == 200
        clock.advance(10 / REQUESTS_PER_S)
        assert [(await knock(door, home.keys["admin"]))[0] for _ in range(11)] == [200] * 10 + [429]

    asyncio.run(story())


@pytest.mark.parametrize(
    ("address", "network"),
    [
        (None, ""),
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("/run/fleet.sock", "/run/fleet.sock"),
    ],
)
def test_a_caller_is_an_address_or_an_ipv6_network(address: str | None, network: str) -> None:
    """Who has a network has as many addresses as guesses."""
    assert network_of(address) == network


@pytest.mark.parametrize("how", ["revoked", "expired", "hung up", "closed by the app"])
def test_a_stream_ends_with_its_key(home: ControlPlane, plane: Plane, clock: FrozenClock, how: str) -> None:
    """The app hears that its client hung up, and the answer is ended as an answer has to be."""
    name = "ends-soon" if how == "expired" else "admin"
    key_id, _ = keys.parse(home.keys[name]) or ("", "")

    async def story() -> None:
        began, hang_up, sent = asyncio.Event(), asyncio.Event(), list[dict[str, Any]]()

        async def streaming(scope: Any, receive: Any, send: Any) -> None:
            del scope
            assert (await receive())["type"] == "http.request"
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"1", "more_body": True})
            began.set()
            if how == "closed by the app":
                await send({"type": "http.response.body", "body": b"2", "more_body": False})
                return
            assert (await receive())["type"] == "http.disconnect"

        async def receive() -> dict[str, Any]:
            if not began.is_set():
                return {"type": "http.request", "body": b"", "more_body": False}
            await hang_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {home.keys[name]}".encode())]
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": headers, "client": None}
        serving = asyncio.create_task(Door(streaming, plane=plane)(scope, receive, send))
        await began.wait()
        if how == "revoked":
            plane.know_revoked({key_id: clock.now_us()})
        elif how == "expired":
            clock.advance(3)
            plane.end_links()
        elif how == "hung up":
            hang_up.set()
        async with asyncio.timeout(2):
            await serving
        last = {"type": "http.response.body", "body": b"", "more_body": False}
        assert (sent[-1] == last) == (how in ("revoked", "expired"))

    asyncio.run(story())


def test_uses_are_noted_and_kept_for_when_they_can_be_written(home: ControlPlane, plane: Plane) -> None:
    """The newest of each key; what could not be written is not lost, nor does it come before what is newer."""

    async def story() -> None:
        door = Door(fine, plane=plane)
        await knock(door, home.keys["admin"], address="192.0.2.9")
        await knock(door, unknown())

    asyncio.run(story())
    key_id, _ = keys.parse(home.keys["admin"]) or ("", "")
    first = plane.uses.take()
    assert first == {key_id: keyring.Use(at_us=plane.clock.now_us(), address="192.0.2.9")}
    assert plane.uses.take() == {}
    plane.uses.note(key_id, address="192.0.2.10", now_us=plane.clock.now_us() + SECOND_US)
    plane.uses.give_back({**first, "k-other": keyring.Use(at_us=1, address=None)})
    newest = plane.uses.newest({"k-third": keyring.Use(at_us=2, address=None)})
    assert {name: use.address for name, use in newest.items()} == {
        key_id: "192.0.2.10",
        "k-other": None,
        "k-third": None,
    }
