"""The one door to the live database.

    store = open_store("sqlite:////path/store.sqlite")          # or postgresql://...
    task = await store.write(lambda conn: create_task(conn, ...))
    page = await store.read(lambda conn: list_tasks(conn, ...))

    task = await store.write_batched(finish_all, report)        # the same, together with whoever else finishes now

`write` answers after the commit: what it returned is on the disk. SQLite is `sqlite`, PostgreSQL is `postgres`; which
one is under it, nobody above can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import StoreError

T = TypeVar("T")
Item = TypeVar("Item")
Batch = Callable[[Connection, Sequence[Item]], Sequence[T | Exception]]
"""Does the same to many items in one transaction; one answer each, in order. What one item is refused with is its
answer and touches no other; what it raises undoes all, and each is then tried alone."""


class Store(Protocol):
    """A live database. Functions given to it run in one of its threads, and must not commit or roll back."""

    url: str

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction and answer what it returned, after the commit.

        What it raises is raised here, and undone alone. StoreError when the database can't be used.
        """

    def write_sync(self, fn: Callable[[Connection], T]) -> T:
        """The same for a caller without an event loop."""

    async def write_batched(self, fn: Batch[Item, T], item: Item) -> T:
        """Run `fn` over this item and those of all who wait for the same `fn` now; answers this item's answer.

        An answer that is an exception is raised.
        """

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot of what is committed."""

    async def read_rows(self, fn: Callable[[Connection], T]) -> T:
        """The same for what reads a few rows by their keys.

        Where that takes less time than handing it to another thread, the caller's own does it.
        """

    def version(self) -> int | None:
        """A number that is another one after any commit, by whomever; None where asking costs as much as reading."""

    def read_sync(self, fn: Callable[[Connection], T]) -> T:
        """The same for a caller without an event loop."""

    def listen(self, heard: Callable[[], None]) -> None:
        """Call `heard` (in any thread) soon after another process has committed an event; once for several is enough.

        Nothing calls it for a database that tells nobody: look now and then.
        """

    def close(self) -> None:
        """Finish what was accepted and let go of the database. Closing twice is fine."""


def open_store(url: str) -> Store:
    """Open (and, when new, make; when old, migrate) the database at `url`.

    `sqlite:///path` or `postgresql://...`. StoreError when it can't be used, with the cure.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise StoreError(
            f"store: can't read the URL {_shown(url)}; wanted sqlite:///PATH or postgresql://..."
        ) from None
    match parsed.get_backend_name():
        case "sqlite":
            from orchestrator_fleet.store.sqlite import SqliteStore  # noqa: PLC0415 (one backend is loaded, not both)

            return SqliteStore(parsed)
        case "postgresql":
            from orchestrator_fleet.store.postgres import PostgresStore  # noqa: PLC0415 (needs the driver of its extra)

            return PostgresStore(parsed)
    raise StoreError(f"store: got {parsed.get_backend_name()!r}; wanted sqlite:///PATH or postgresql://...")


def _shown(url: str) -> str:
    """Without what may be a password."""
    return repr(url.partition("://")[0] + "://...") if "://" in url else repr(url[:50])
