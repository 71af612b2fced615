"""SQLite: one writer thread that commits many callers' work at once, and a few readers.

    caller ─┐                    ┌ BEGIN IMMEDIATE
    caller ─┼──▶ bounded queue ──▶ SAVEPOINT fn RELEASE   (each; ROLLBACK TO for the one that raised)
    caller ─┘                    └ COMMIT, one fsync ──▶ every caller gets its answer

While one commit waits for the disk the next batch gathers, so a lone caller waits for nobody and a thousand share an
fsync. A batch of one needs no savepoint.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, event
from sqlalchemy.pool import NullPool

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store import migrate

T = TypeVar("T")

MAX_WAITING = 10_000
MAX_BATCH = 512
MAX_BATCH_S = 0.05
BUSY_TIMEOUT_S = 15
READERS = 3
CLOSE_TIMEOUT_S = 30.0
OLDEST_SQLITE = (3, 35, 0)

_PRAGMAS = (
    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_S * 1000}",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA cache_size = -32768",
    "PRAGMA temp_store = MEMORY",
)
_CURES = (
    (("not a database",), "it is not a SQLite database; move it away, or name another file"),
    (("malformed", "corrupt"), "it is damaged; move it away and put back a copy, or start anew without it"),
    (("disk is full", "database or disk is full"), "the disk is full; make room, nothing that was answered is lost"),
    (("readonly", "read-only"), "it can't be written; check the owner and mode of the file and its folder"),
    (("unable to open",), "it can't be opened; check that the folder exists and is yours"),
    (("locked", "busy"), f"another process has kept it locked for {BUSY_TIMEOUT_S} s; end that one"),
    (("disk i/o error",), "the disk gives errors; check it (dmesg), then start again"),
)


class _Job:
    """One caller's function, and where its answer goes."""

    __slots__ = ("answer", "error", "fn", "loop", "waiter")

    def __init__(
        self,
        fn: Callable[[Connection], Any],
        waiter: asyncio.Future[Any] | Future[Any],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.fn, self.waiter, self.loop = fn, waiter, loop
        self.answer: Any = None
        self.error: Exception | None = None


class SqliteStore:
    """A Store on one SQLite file."""

    def __init__(self, url: sa.URL) -> None:
        if not url.database or url.database == ":memory:":
            raise StoreError("store: a SQLite store is a file; wanted sqlite:///PATH")
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise StoreError(f"store: this Python has SQLite {sqlite3.sqlite_version}; wanted 3.35 or newer")
        self.url = url.render_as_string(hide_password=False)
        self.path = Path(url.database)
        self._engine = _engine(url)
        try:
            _make_file(self.path)
            self._connection = _connect(self._engine)
        except (sa.exc.DBAPIError, sqlite3.Error, OSError) as error:
            raise store_error(self.path, error) from error
        self._file = _identity(self.path)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._local = threading.local()
        self._opened: list[Connection] = []
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._reads = threading.BoundedSemaphore(MAX_WAITING)
        self._writer = threading.Thread(target=self._write_forever, name="store-write", daemon=True)
        self._writer.start()

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction; answers after the commit."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        self._put(_Job(fn, waiter, loop))
        return await waiter

    def write_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction; answers after the commit."""
        waiter: Future[T] = Future()
        self._put(_Job(fn, waiter, None))
        return waiter.result()

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return await asyncio.wrap_future(self._submit_read(fn))

    def read_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return self._submit_read(fn).result()

    def close(self) -> None:
        """Write what was accepted, then close."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._jobs.put(None)
        self._writer.join(CLOSE_TIMEOUT_S)
        self._readers.shutdown(wait=True)
        for connection in self._opened:
            connection.close()

    def _put(self, job: _Job) -> None:
        if self._jobs.qsize() >= MAX_WAITING:
            raise StoreError(f"store: {MAX_WAITING} writes are waiting already; try again in a moment")
        with self._gate:
            if self._closed:
                raise StoreError("store: it is closed")
            self._jobs.put(job)

    def _write_forever(self) -> None:
        raw = _raw(self._connection)
        while (job := self._jobs.get()) is not None:
            batch = self._gather(job)
            rest = [one for one in batch if not one.waiter.cancelled()]
            while rest:
                rest = self._commit_some(raw, rest)
            _answer(batch)
        self._connection.close()

    def _gather(self, first: _Job) -> list[_Job]:
        """The first job and those that wait behind it. The mark of the end goes back: it is the last."""
        batch = [first]
        while len(batch) < MAX_BATCH:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            batch.append(job)
        return batch

    def _commit_some(self, raw: sqlite3.Connection, jobs: list[_Job]) -> list[_Job]:
        """One transaction with as many of the jobs as fit in MAX_BATCH_S; answers the others.

        No error leaves: a caller's own goes to that caller, the database's to all whose work it undid.
        """
        until = time.monotonic() + MAX_BATCH_S
        done = 0
        try:
            self._check_file()
            raw.execute("BEGIN IMMEDIATE")
            while done < len(jobs) and (done == 0 or time.monotonic() < until):
                done += 1
                _run(self._connection, raw, jobs[done - 1], path=self.path, alone=len(jobs) == 1)
            if raw.in_transaction:
                raw.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 (the writer must outlive whatever the database says; its callers get it)
            undone = jobs[: done or len(jobs)]
            for job in undone:
                job.error = error if isinstance(error, StoreError) else store_error(self.path, error)
            if raw.in_transaction:
                raw.rollback()
            return jobs[len(undone) :]
        return jobs[done:]

    def _submit_read(self, fn: Callable[[Connection], T]) -> Future[T]:
        if not self._reads.acquire(blocking=False):
            raise StoreError(f"store: {MAX_WAITING} reads are waiting already; try again in a moment")
        try:
            future = self._readers.submit(self._read_here, fn)
        except RuntimeError:
            self._reads.release()
            raise StoreError("store: it is closed") from None
        future.add_done_callback(lambda _: self._reads.release())
        return future

    def _read_here(self, fn: Callable[[Connection], T]) -> T:
        self._check_file()
        try:
            connection = self._reader_of_this_thread()
            raw = _raw(connection)
            raw.execute("BEGIN")
            try:
                return fn(connection)
            finally:
                if raw.in_transaction:
                    raw.rollback()
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            raise store_error(self.path, error) from error

    def _check_file(self) -> None:
        """Raise StoreError when the open file is not the one of that name any more: nobody would find it again."""
        if self._file is None or _identity(self.path) != self._file:
            raise StoreError(
                f"store {self.path}: it was deleted or replaced while in use; put it back, or start again without it"
            )

    def _reader_of_this_thread(self) -> Connection:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._engine.connect()
            _raw(connection).execute("PRAGMA query_only = ON")
            self._local.connection = connection
            self._opened.append(connection)
        return connection


def store_error(path: Path, error: BaseException) -> StoreError:
    """What the database said, with what to do about it."""
    said = str(getattr(error, "orig", None) or error)
    cure = next((cure for words, cure in _CURES if any(word in said.lower() for word in words)), "see what it says")
    return StoreError(f"store {path}: {said}; {cure}")


def _run(connection: Connection, raw: sqlite3.Connection, job: _Job, *, path: Path, alone: bool) -> None:
    """One caller's function, undone alone when it raises. Raises only when the whole transaction is gone."""
    if not alone:
        raw.execute("SAVEPOINT caller")
    try:
        job.answer = job.fn(connection)
    except Exception as error:
        if not raw.in_transaction:
            raise  # SQLite undid everything by itself, as it may when the disk is full
        job.error = error if _is_the_callers(error) else store_error(path, error)
        if alone:
            raw.execute("ROLLBACK")
            return
        raw.execute("ROLLBACK TO caller")
    if not raw.in_transaction:
        raise sqlite3.OperationalError("the transaction ended before its commit")
    if not alone:
        raw.execute("RELEASE caller")


def _is_the_callers(error: Exception) -> bool:
    """Whether it tells of the caller's values, and not of the database's state."""
    return not isinstance(error, sa.exc.OperationalError | sqlite3.OperationalError)


def _answer(batch: list[_Job]) -> None:
    """Hand out the answers; one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop | None, list[_Job]] = {}
    for job in batch:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, jobs in by_loop.items():
        if loop is None:
            _deliver(jobs)
            continue
        try:
            loop.call_soon_threadsafe(_deliver, jobs)
        except RuntimeError:  # the loop is closed: nobody waits any more
            continue


def _deliver(jobs: list[_Job]) -> None:
    for job in jobs:
        if job.waiter.done():
            continue
        if job.error is not None:
            job.waiter.set_exception(job.error)
        else:
            job.waiter.set_result(job.answer)


@contextmanager
def _immediate(raw: sqlite3.Connection) -> Iterator[None]:
    raw.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        raw.rollback()
        raise
    raw.execute("COMMIT")


def _connect(engine: sa.Engine) -> Connection:
    """A connection to a database whose schema is this version's."""
    connection = engine.connect()
    try:
        if not migrate.is_current(connection):
            with _immediate(_raw(connection)):
                migrate.to_head(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _engine(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url,
        isolation_level="AUTOCOMMIT",  # BEGIN and COMMIT are written here, by the threads that own the connections
        poolclass=NullPool,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_S, "cached_statements": 512},
    )
    event.listen(engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(raw: sqlite3.Connection, _record: object) -> None:
    for pragma in _PRAGMAS:
        raw.execute(pragma).close()


def _raw(connection: Connection) -> sqlite3.Connection:
    raw = connection.connection.dbapi_connection
    assert isinstance(raw, sqlite3.Connection)  # noqa: S101 (for the type checker: the engine above makes no other)
    return raw


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_file(path: Path) -> None:
    """The folder, and a file that is its owner's alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
