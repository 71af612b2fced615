"""SQLite: one writer thread that commits many callers' work at once, and a few readers.

    caller ─┐                    ┌ BEGIN IMMEDIATE
    caller ─┼──▶ bounded queue ──▶ SAVEPOINT work RELEASE   (each; ROLLBACK TO for the one that raised)
    caller ─┘                    └ COMMIT, one fsync ──▶ every caller gets its answer

While one commit waits for the disk the next round gathers, so a lone caller waits for nobody and a thousand share an
fsync. Callers of `write_batched` with the same function share its statements as well: they are one piece of work.
A round of one piece needs no savepoint.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, event
from sqlalchemy.pool import NullPool

from orchestrator_fleet.errors import StoreDamaged, StoreError, StoreFull
from orchestrator_fleet.store import jobs, migrate, outbox
from orchestrator_fleet.store.database import Batch, Item
from orchestrator_fleet.store.jobs import Job, Piece

T = TypeVar("T")

MAX_WAITING = 10_000
MAX_ROUND = 512
MAX_ROUND_S = 0.05
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
    # Pages are written to the file once in so many, and most were written again meanwhile: 32 MiB of log.
    "PRAGMA wal_autocheckpoint = 8192",
    "PRAGMA temp_store = MEMORY",
)
# A start reads every page of a file up to this size, which takes a second on a warm disk; `fleet store check` any.
MAX_CHECKED_BYTES = 256 << 20
FULL_BELOW_BYTES = 1 << 20

_DAMAGED = "put back a backup with `fleet store restore`, or move it away to start anew without it"
_CURES: tuple[tuple[tuple[str, ...], type[StoreError], str], ...] = (
    (("not a database",), StoreDamaged, f"it is not a SQLite database, or its head is damaged; {_DAMAGED}"),
    (("malformed", "corrupt"), StoreDamaged, f"it is damaged; {_DAMAGED}"),
    (("disk is full",), StoreFull, "the disk is full; make room, nothing that was answered is lost"),
    (("readonly", "read-only"), StoreError, "it can't be written; check the owner and mode of the file and its folder"),
    (("unable to open",), StoreError, "it can't be opened; check that the folder exists and is yours"),
    (("locked", "busy"), StoreError, f"another process has kept it locked for {BUSY_TIMEOUT_S} s; end that one"),
    (("disk i/o error",), StoreError, "the disk gives errors; check it (dmesg), then start again"),
)


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
            _check(self._connection, self.path)
        except (sa.exc.DBAPIError, sqlite3.Error, OSError) as error:
            raise store_error(self.path, error) from error
        self._file = _identity(self.path)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
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
        self._put(Job(outbox.as_called(fn), waiter, loop))
        return await waiter

    def write_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction; answers after the commit."""
        waiter: Future[T] = Future()
        self._put(Job(fn, waiter, None))
        return waiter.result()

    async def write_batched(self, fn: Batch[Item, T], item: Item) -> T:
        """Run `fn` over this item and whichever others wait for it; answers after the commit."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        self._put(Job(fn, waiter, loop, batched=True, item=item))
        return await waiter

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return await asyncio.wrap_future(self._submit_read(fn))

    async def read_rows(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot, here and now: a few rows take 20 µs, the way to another thread and back 100."""
        if self._closed:
            raise StoreError("store: it is closed")
        return self._read_here(fn)

    def version(self) -> int | None:
        """What SQLite counts for this thread's connection: commits of all others, our writer's among them."""
        self._check_file()
        found: int = _raw(self._reader_of_this_thread()).execute("PRAGMA data_version").fetchone()[0]
        return found

    def read_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return self._submit_read(fn).result()

    def listen(self, heard: Callable[[], None]) -> None:
        """Nobody tells: a file of SQLite's has one control plane."""

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

    def _put(self, job: Job) -> None:
        if self._jobs.qsize() >= MAX_WAITING:
            raise StoreError(f"store: {MAX_WAITING} writes are waiting already; try again in a moment")
        with self._gate:
            if self._closed:
                raise StoreError("store: it is closed")
            self._jobs.put(job)

    def _write_forever(self) -> None:
        raw = _raw(self._connection)
        while (job := self._jobs.get()) is not None:
            gathered = self._gather(job)
            pieces = jobs.pieces([one for one in gathered if not one.waiter.cancelled()])
            while pieces:
                pieces = self._commit_some(raw, pieces)
            jobs.answer(gathered)
        self._connection.close()

    def _gather(self, first: Job) -> list[Job]:
        """The first job and those that wait behind it. The mark of the end goes back: it is the last."""
        gathered = [first]
        while len(gathered) < MAX_ROUND:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            gathered.append(job)
        return gathered

    def _commit_some(self, raw: sqlite3.Connection, pieces: list[Piece]) -> list[Piece]:
        """One transaction with as many of the pieces as fit in MAX_ROUND_S; answers those that are left.

        No error leaves: a caller's own goes to that caller, the database's to all whose work it undid. A piece of many
        that raised is left as many pieces of one, so that only the culprits hear of it.
        """
        until = time.monotonic() + MAX_ROUND_S
        done = 0
        again: list[Piece] = []
        try:
            self._check_file()
            raw.execute("BEGIN IMMEDIATE")
            while done < len(pieces) and (done == 0 or time.monotonic() < until):
                done += 1
                again += _run(self._connection, raw, pieces[done - 1], path=self.path, alone=len(pieces) == 1)
            if raw.in_transaction:
                raw.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 (the writer must outlive whatever the database says; its callers get it)
            undone = pieces[: done or len(pieces)]
            for job in (job for piece in undone for job in piece):
                job.error = error if isinstance(error, StoreError) else store_error(self.path, error)
            if raw.in_transaction:
                raw.rollback()
            return pieces[len(undone) :]
        return [*pieces[done:], *again]

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
    heard = "disk is full" if "disk i/o error" in said.lower() and _is_full(path) else said.lower()
    for words, kind, cure in _CURES:
        if any(word in heard for word in words):
            return kind(f"store {path}: {said}; {cure}")
    return StoreError(f"store {path}: {said}; see what it says")


def _is_full(path: Path) -> bool:
    """Whether there is no room where the file is: SQLite calls some of what follows from that an I/O error."""
    try:
        room = os.statvfs(path.parent)
    except OSError:
        return False
    return room.f_bavail * room.f_frsize < FULL_BELOW_BYTES


def _run(connection: Connection, raw: sqlite3.Connection, piece: Piece, *, path: Path, alone: bool) -> Sequence[Piece]:
    """Do one piece, undone alone when it raises; answers the pieces to be done instead, if many were in it.

    Raises only when the whole transaction is gone.
    """
    if not alone:
        raw.execute("SAVEPOINT piece")
    instead: Sequence[Piece] = ()
    try:
        jobs.do(connection, piece)
    except Exception as error:
        if not raw.in_transaction:
            raise  # SQLite undid everything by itself, as it may when the disk is full
        if len(piece) > 1:
            instead = [(job,) for job in piece]
        else:
            piece[0].error = error if _is_the_callers(error) else store_error(path, error)
        raw.execute("ROLLBACK" if alone else "ROLLBACK TO piece")
        if alone:
            return instead
    if not raw.in_transaction:
        raise sqlite3.OperationalError("the transaction ended before its commit")
    if not alone:
        raw.execute("RELEASE piece")
    return instead


def _is_the_callers(error: Exception) -> bool:
    """Whether it tells of the caller's values, and not of the database's state."""
    return not isinstance(error, sa.exc.OperationalError | sqlite3.OperationalError)


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
            raw = _raw(connection)
            with migrate.foreign_keys_off(raw), _immediate(raw):
                migrate.to_head(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: Connection, path: Path) -> None:
    """Raise StoreDamaged when the file's pages do not fit together; a damaged store must not be worked on."""
    if path.stat().st_size > MAX_CHECKED_BYTES:
        return
    (found,) = _raw(connection).execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        connection.close()
        raise StoreDamaged(f"store {path}: {' '.join(found.split())}; it is damaged; {_DAMAGED}")


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
