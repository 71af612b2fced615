"""What the store knows of keys: revocations that last, and last uses that only grow."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.orchestrators import keyring
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.orchestrators.keyring import Use
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import Store, open_store

NOW_US = 1_767_225_600 * SECOND_US


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """An empty one of either kind."""
    opened = open_store(store_url)
    yield opened
    opened.close()


def key(name: str, owner: str = "vp-a") -> KnownKey:
    return KnownKey(id=name, owner=owner, sha256="0" * 64, scopes=("tasks:work",))


def revoke(store: Store, *found: KnownKey, at_us: int = NOW_US) -> list[str]:
    new = store.write_sync(lambda conn: keyring.revoke(conn, found, reason="leaked", actor="k-00000001", now_us=at_us))
    return [one.id for one in new]


def test_a_revocation_is_written_once_with_its_event(store: Store) -> None:
    """Twice it is what it was; the event says whose key, by whom and why."""
    assert revoke(store, key("k-0000000a"), key("k-0000000b", "person:me")) == ["k-0000000a", "k-0000000b"]
    assert revoke(store, key("k-0000000a"), key("k-0000000c"), at_us=NOW_US + 1) == ["k-0000000c"]
    assert store.read_sync(keyring.revoked) == {
        "k-0000000a": NOW_US,
        "k-0000000b": NOW_US,
        "k-0000000c": NOW_US + 1,
    }
    events = store.read_sync(lambda conn: outbox.read_after(conn, 0))
    assert [(one.kind, one.actor, one.orchestrator, one.data["key"]) for one in events] == [
        ("key_revoked", "k-00000001", "vp-a", "k-0000000a"),
        ("key_revoked", "k-00000001", None, "k-0000000b"),
        ("key_revoked", "k-00000001", "vp-a", "k-0000000c"),
    ]
    assert events[0].data["reason"] == "leaked"
    assert events[0].data["before"] == {"revoked": None}
    assert events[0].data["after"] == {"revoked": "2026-01-01T00:00:00.000000Z"}


def test_revoked_by_many_at_once_it_is_revoked_once(store: Store) -> None:
    """One of them is told that it did it."""
    with ThreadPoolExecutor(8) as pool:
        done = [one for new in pool.map(lambda _: revoke(store, key("k-0000000a")), range(16)) for one in new]
    assert done == ["k-0000000a"]
    assert len(store.read_sync(lambda conn: outbox.read_after(conn, 0))) == 1


def test_the_newest_use_counts(store: Store) -> None:
    """Whoever writes it down, and in whatever order."""

    def use(**found: Use) -> None:
        store.write_sync(lambda conn: keyring.use(conn, found))

    use()
    use(a=Use(at_us=5, address="10.0.0.1"), b=Use(at_us=5, address=None))
    use(a=Use(at_us=4, address="10.0.0.2"), b=Use(at_us=6, address="::1"), c=Use(at_us=1, address=None))
    assert store.read_sync(keyring.uses) == {
        "a": Use(at_us=5, address="10.0.0.1"),
        "b": Use(at_us=6, address="::1"),
        "c": Use(at_us=1, address=None),
    }


def test_uses_written_by_many_at_once_lose_none(store: Store) -> None:
    """Of a thousand keys, each by several."""
    found = {f"k-{n:08x}": n for n in range(1_000)}

    def write(late: int) -> None:
        uses = {name: Use(at_us=n + late, address=str(late)) for name, n in found.items()}
        store.write_sync(lambda conn: keyring.use(conn, uses))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert store.read_sync(keyring.uses) == {name: Use(at_us=n + 3, address="3") for name, n in found.items()}
