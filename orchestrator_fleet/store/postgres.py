"""PostgreSQL: a transaction for each caller, on a pool of connections, in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store import locks, migrate

T = TypeVar("T")

CONNECTIONS = 8
MAX_WAITING = 10_000
POOL_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10
MAX_TRIES = 5
_RETRIED = ("40001", "40P01")  # serialization failure, deadlock: PostgreSQL says to run the transaction again


class PostgresStore:
    """A Store on one PostgreSQL database."""

    def __init__(self, url: sa.URL) -> None:
        self.url = url.render_as_string(hide_password=False)
        self._shown = url.render_as_string(hide_password=True)
        try:
            self._engine = sa.create_engine(
                url.set(drivername="postgresql+psycopg"),
                pool_size=CONNECTIONS,
                max_overflow=0,
                pool_timeout=POOL_TIMEOUT_S,
                pool_pre_ping=True,
                connect_args={"connect_timeout": CONNECT_TIMEOUT_S},
            )
        except ImportError:
            raise StoreError(
                "store: PostgreSQL needs its driver; pip install 'orchestrator-fleet[postgresql]'"
            ) from None
        try:
            with self._engine.begin() as conn:
                locks.hold(conn, "migrate")
                migrate.to_head(conn)
        except sa.exc.DBAPIError as error:
            self._engine.dispose()
            raise self._error(error) from error
        self._snapshots = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="store")
        self._slots = threading.BoundedSemaphore(MAX_WAITING)

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction; answers after the commit."""
        return await asyncio.wrap_future(self._submit(self._write_here, fn))

    def write_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction; answers after the commit."""
        return self._submit(self._write_here, fn).result()

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return await asyncio.wrap_future(self._submit(self._read_here, fn))

    def read_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return self._submit(self._read_here, fn).result()

    def close(self) -> None:
        """Finish what was accepted, then close."""
        self._threads.shutdown(wait=True)
        self._engine.dispose()

    def _submit(self, how: Callable[[Callable[[Connection], T]], T], fn: Callable[[Connection], T]) -> Future[T]:
        if not self._slots.acquire(blocking=False):
            raise StoreError(f"store: {MAX_WAITING} callers are waiting already; try again in a moment")
        try:
            future = self._threads.submit(how, fn)
        except RuntimeError:
            self._slots.release()
            raise StoreError("store: it is closed") from None
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _write_here(self, fn: Callable[[Connection], T]) -> T:
        for attempt in range(1, MAX_TRIES + 1):
            try:
                with self._engine.begin() as conn:
                    return fn(conn)
            except sa.exc.OperationalError as error:
                if attempt == MAX_TRIES or getattr(error.orig, "sqlstate", None) not in _RETRIED:
                    raise self._error(error) from error
        raise AssertionError("the last try answers or raises")

    def _read_here(self, fn: Callable[[Connection], T]) -> T:
        try:
            with self._snapshots.begin() as conn:
                return fn(conn)
        except sa.exc.OperationalError as error:
            raise self._error(error) from error

    def _error(self, error: sa.exc.DBAPIError) -> StoreError:
        return StoreError(f"store {self._shown}: {str(error.orig).strip()}; check that PostgreSQL runs and lets us in")
