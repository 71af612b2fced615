"""PostgreSQL: a few lanes that commit many callers' work at once, writers for all else, readers, and an ear.

    write_batched ─▶ queue ─▶ lane, lane       each takes whatever waits: one transaction, one fsync, for all of it
    write ─────────▶ writer, writer, ...       a transaction for each caller
    read ──────────▶ reader, reader, ...       a snapshot for each caller
    commits of other processes ─▶ ear ─▶ heard

Each thread has a connection of its own, made when first needed and made anew when it was lost. What had not reached
its commit by then is done again; what had, may stand or not, and its callers are told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, event
from sqlalchemy.pool import NullPool

from orchestrator_fleet.errors import StoreDamaged, StoreError, StoreFull
from orchestrator_fleet.store import jobs, locks, migrate, outbox
from orchestrator_fleet.store.database import Batch, Item
from orchestrator_fleet.store.jobs import Job, Piece

try:
    import psycopg
except ImportError:
    raise StoreError("store: PostgreSQL needs its driver; pip install 'orchestrator-fleet[postgresql]'") from None

T = TypeVar("T")

# Two: one commits while the other gathers. More only make smaller rounds.
LANES = 2
WRITERS = 4
READERS = 3
CONNECTIONS = LANES + WRITERS + READERS + 2  # the ear; the history reads on one of its own
MAX_WAITING = 10_000
MAX_ROUND = 256
MAX_TRIES = 8
MAX_RETRY_PAUSE_S = 0.05
CLOSE_TIMEOUT_S = 30.0

CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 30
LOCK_TIMEOUT_S = 10
IDLE_TIMEOUT_S = 60  # a transaction that does nothing: its process hangs, and everybody waits for what it locked
SILENT_PEER_S = 30

# A restart of PostgreSQL takes a second or two: callers wait this long for it before they are told.
RECONNECT_S = 8.0
RECONNECT_PAUSE_S = 0.1
# Notices within this time are one.
HEARD_PAUSE_S = 0.002
LISTEN_TIMEOUT_S = 30.0
LISTEN_AGAIN_S = 1.0

OLDEST = 120_000
PREPARED_MAX = 500

_CONNECT = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "fleet",
    "client_encoding": "utf8",
    "keepalives_idle": SILENT_PEER_S,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": SILENT_PEER_S * 1000,
}
_SETTINGS = (
    f"SET statement_timeout = {STATEMENT_TIMEOUT_S * 1000}; SET lock_timeout = {LOCK_TIMEOUT_S * 1000};"
    f" SET idle_in_transaction_session_timeout = {IDLE_TIMEOUT_S * 1000}; SET jit = off"
)
# What writes goes row by row along its indexes, whatever a planner makes of tables that nobody has analyzed yet; and
# always in the same way, so it is planned once.
_WRITER_SETTINGS = (
    "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off;"
    " SET plan_cache_mode = force_generic_plan"
)

# By the start of SQLSTATE, the longest first; where there is none (a connection that was not made), by what is said.
_CURES: tuple[tuple[str, str, type[StoreError], str], ...] = (
    (
        "53100",
        "no space left",
        StoreFull,
        "the disk of PostgreSQL is full; make room, nothing that was answered is lost",
    ),
    (
        "53300",
        "too many clients",
        StoreError,
        f"all its connections are taken; raise its max_connections (a `fleet serve` takes {CONNECTIONS}) or end others",
    ),
    ("53300", "remaining connection slots", StoreError, "all its connections are taken; raise its max_connections"),
    ("53", "out of memory", StoreError, "PostgreSQL is short of resources; see its log"),
    ("25006", "read-only", StoreError, "it takes no writes (a standby?); name the primary"),
    ("28", "authentication failed", StoreError, "it does not let us in; check user and password, and its pg_hba.conf"),
    ("28", "no password supplied", StoreError, "it does not let us in; the URL lacks the password"),
    ("28", "pg_hba.conf", StoreError, "it does not let us in; check its pg_hba.conf"),
    ("28", 'role "', StoreError, "it does not know the user; make it (createuser), or name another"),
    ("3D000", 'database "', StoreError, "there is no such database; make it (createdb), or name another"),
    ("42501", "permission denied", StoreError, "the user may not do that; make it the owner of the database"),
    ("55P03", "lock timeout", StoreError, f"somebody has kept it locked for {LOCK_TIMEOUT_S} s; see pg_stat_activity"),
    ("57014", "statement timeout", StoreError, f"it took more than {STATEMENT_TIMEOUT_S} s; see pg_stat_activity"),
    ("57P", "starting up", StoreError, "PostgreSQL is starting or stopping; try again in a moment"),
    ("57P", "shutting down", StoreError, "PostgreSQL is starting or stopping; try again in a moment"),
    ("XX001", "invalid page", StoreDamaged, "it is damaged; put back a backup with `fleet store restore`"),
    (
        "XX002",
        "corrupt",
        StoreDamaged,
        "an index is damaged; REINDEX it, or put back a backup with `fleet store restore`",
    ),
    ("58", "i/o error", StoreError, "the disk of PostgreSQL gives errors; check it, then start again"),
    ("08", "refused", StoreError, "check that PostgreSQL runs there"),
    ("08", "no such file", StoreError, "check that PostgreSQL runs there"),
    ("08", "could not translate", StoreError, "check the name of its host"),
    ("08", "timeout expired", StoreError, "check that its host is up and lets us through"),
)
_UNKNOWN_CURE = "check that PostgreSQL runs and lets us in"
_SAVEPOINTS, _MARKS = "savepoints", "marks"
_AGAIN = ("40001", "40P01")  # serialization failure, deadlock: PostgreSQL says to run the transaction again
_HOPELESS = ("28", "3D000")  # no later connection gets in either


class PostgresStore:
    """A Store on one PostgreSQL database."""

    def __init__(self, url: sa.URL) -> None:
        driven = url.set(drivername="postgresql+psycopg")
        self.url = driven.render_as_string(hide_password=False)
        self._server = _Server(driven)
        _open(self._server)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        self._lanes: list[threading.Thread] = []
        self._local = threading.local()
        self._lines: list[_Line] = []
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="store-write")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-read")
        self._slots = threading.BoundedSemaphore(MAX_WAITING)
        self._ear: _Ear | None = None

    async def write(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction; answers after the commit."""
        return await asyncio.wrap_future(self._submit(self._writers, self._write_here, outbox.as_called(fn)))

    def write_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` in a transaction; answers after the commit."""
        return self._submit(self._writers, self._write_here, fn).result()

    async def write_batched(self, fn: Batch[Item, T], item: Item) -> T:
        """Run `fn` over this item and whichever others wait for it; answers after the commit."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[T] = loop.create_future()
        if self._jobs.qsize() >= MAX_WAITING:
            raise StoreError(f"store: {MAX_WAITING} writes are waiting already; try again in a moment")
        with self._gate:
            if self._closed:
                raise StoreError("store: it is closed")
            if not self._lanes:
                self._start_lanes()
            self._jobs.put(Job(fn, waiter, loop, batched=True, item=item))
        return await waiter

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return await asyncio.wrap_future(self._submit(self._readers, self._read_here, fn))

    async def read_rows(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return await self.read(fn)

    def version(self) -> int | None:
        """Not to be had for less than a read."""
        return None

    def read_sync(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on one snapshot."""
        return self._submit(self._readers, self._read_here, fn).result()

    def listen(self, heard: Callable[[], None]) -> None:
        """Call `heard` soon after another process has committed an event, and after the connection was made anew."""
        with self._gate:
            if self._closed:
                raise StoreError("store: it is closed")
            if self._ear is None:
                self._ear = _Ear(self._server, heard)

    def close(self) -> None:
        """Finish what was accepted, then close."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            for _ in self._lanes:
                self._jobs.put(None)
        if self._ear is not None:
            self._ear.close()
        for lane in self._lanes:
            lane.join(CLOSE_TIMEOUT_S)
        self._writers.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        for line in self._lines:
            line.drop()
        self._server.dispose()

    def _start_lanes(self) -> None:
        for number in range(LANES):
            lane = threading.Thread(target=self._lane, name=f"store-lane-{number}", daemon=True)
            self._lanes.append(lane)
            lane.start()

    def _lane(self) -> None:
        line = _Line(self._server)
        while (job := self._jobs.get()) is not None:
            gathered = self._gather(job)
            pieces = jobs.pieces([one for one in gathered if not one.waiter.cancelled()])
            # In one order for all lanes: one that claims and then finishes, and one that does it the other way round,
            # would wait for each other's locks in a circle.
            self._do(line, sorted(pieces, key=_name))
            jobs.answer(gathered)
        line.drop()

    def _gather(self, first: Job) -> list[Job]:
        """The first job and those that wait behind it. A mark of the end goes back: there is one for each lane."""
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

    def _do(self, line: _Line, pieces: Sequence[Piece]) -> None:
        """All pieces in one transaction; one that raises is done apart from the others, and then each job of it."""
        if not pieces:
            return

        def together(conn: Connection) -> None:
            for piece in pieces:
                for job in piece:
                    job.answer = job.error = None
                jobs.do(conn, piece)

        try:
            line.write(together)
        except Exception as error:  # noqa: BLE001 (a lane must outlive whatever is said; its callers get it)
            if isinstance(error, StoreError) or (len(pieces) == 1 and len(pieces[0]) == 1):
                for job in (job for piece in pieces for job in piece):
                    job.error = error
                return
            apart = pieces if len(pieces) > 1 else [(job,) for job in pieces[0]]
            for piece in apart:
                self._do(line, [piece])

    def _submit(
        self, threads: ThreadPoolExecutor, how: Callable[[Callable[[Connection], T]], T], fn: Callable[[Connection], T]
    ) -> Future[T]:
        if not self._slots.acquire(blocking=False):
            raise StoreError(f"store: {MAX_WAITING} callers are waiting already; try again in a moment")
        try:
            future = threads.submit(how, fn)
        except RuntimeError:
            self._slots.release()
            raise StoreError("store: it is closed") from None
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _write_here(self, fn: Callable[[Connection], T]) -> T:
        return self._line_of_this_thread(reads=False).write(fn)

    def _read_here(self, fn: Callable[[Connection], T]) -> T:
        return self._line_of_this_thread(reads=True).read(fn)

    def _line_of_this_thread(self, *, reads: bool) -> _Line:
        line: _Line | None = getattr(self._local, "line", None)
        if line is None:
            line = self._local.line = _Line(self._server, reads=reads)
            self._lines.append(line)
        return line


class _Server:
    """The PostgreSQL that is connected to: how, since when it can't be reached, and which connections are ours."""

    def __init__(self, url: sa.URL) -> None:
        self.shown = url.render_as_string(hide_password=True).replace("+psycopg", "", 1)
        self._engine = sa.create_engine(url, poolclass=NullPool, connect_args=_CONNECT)
        event.listen(self._engine, "connect", _set_up)
        event.listen(self._engine, "savepoint", _mark)
        event.listen(self._engine, "rollback_savepoint", _back_to_mark)
        self.ours: set[int] = set()
        self._down_since: float | None = None

    def connect(self, *, reads: bool = False) -> Connection:
        """A new connection; raises what the driver says."""
        try:
            conn = self._engine.connect()
        except sa.exc.DBAPIError:
            if self._down_since is None:
                self._down_since = time.monotonic()
            raise
        self._down_since = None
        if reads:
            return conn.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        raw = _raw(conn)
        raw.execute(_WRITER_SETTINGS)
        raw.commit()
        self.ours.add(raw.info.backend_pid)
        conn.info[outbox.PENDING] = []
        return conn

    def drop(self, conn: Connection) -> None:
        """Close a connection, lost or not."""
        with contextlib.suppress(Exception):
            self.ours.discard(_raw(conn).info.backend_pid)
        with contextlib.suppress(Exception):
            conn.invalidate()
        with contextlib.suppress(Exception):
            conn.close()

    def may_come_back(self) -> bool:
        """Whether a connection that was lost is worth waiting for."""
        return self._down_since is None or time.monotonic() - self._down_since < RECONNECT_S

    def error(self, error: Exception) -> Exception:
        """What the database said, with what to do about it; a caller's own error as it is."""
        said = _said(error)
        if said is None or _is_the_callers(said):
            return error
        text = " ".join(str(said).split())
        kind, cure = _cure(said.sqlstate or "", text.lower())
        return kind(f"store {self.shown}: {text}; {cure}")

    def dispose(self) -> None:
        """Let go of everything."""
        self._engine.dispose()


class _Line:
    """One thread's own connection: made when first needed, and anew after it was lost."""

    def __init__(self, server: _Server, *, reads: bool = False) -> None:
        self._server, self._reads = server, reads
        self._conn: Connection | None = None

    def write(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` and commit. Raises what `fn` raises, or StoreError."""
        return self._until_done(lambda conn: self._transaction(conn, fn))

    def read(self, fn: Callable[[Connection], T]) -> T:
        """Run `fn` on a snapshot."""

        def snapshot(conn: Connection) -> T:
            conn.begin()
            try:
                return fn(conn)
            finally:
                _undo(conn)

        return self._until_done(snapshot)

    def drop(self) -> None:
        """Close the connection; the next use makes another."""
        if self._conn is not None:
            self._server.drop(self._conn)
            self._conn = None

    def _until_done(self, once: Callable[[Connection], T]) -> T:
        tries = 0
        while True:
            tries += 1
            try:
                if self._conn is None:
                    self._conn = self._server.connect(reads=self._reads)
                return once(self._conn)
            except Exception as error:  # noqa: BLE001 (told apart below; what is nobody else's is raised again)
                self._go_on_after(error, tries)

    def _transaction(self, conn: Connection, fn: Callable[[Connection], T]) -> T:
        pending: list[outbox.Event] = conn.info[outbox.PENDING]
        pending.clear()
        conn.info.pop(_MARKS, None)
        conn.begin()  # said aloud: SQLAlchemy sees nothing of what a Statement runs
        try:
            answer = fn(conn)
            outbox.write_pending(conn)
        except BaseException:
            _undo(conn)
            raise
        try:
            conn.commit()
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            if not _is_lost(conn):
                raise
            raise StoreError(
                f"store {self._server.shown}: the connection was lost while it committed ({_said(error) or error});"
                " what was asked may stand or not: look before asking again"
            ) from error
        return answer

    def _go_on_after(self, error: Exception, tries: int) -> None:
        """Return when it is worth another try, after a pause."""
        lost = self._conn is None or _is_lost(self._conn)
        if lost:
            self.drop()
        said = _said(error)
        state = (said.sqlstate or "") if said is not None else ""
        if state in _AGAIN and tries < MAX_TRIES:
            time.sleep(random.uniform(0, MAX_RETRY_PAUSE_S))  # noqa: S311 (spreads retries, guards nothing)
            return
        if lost and said is not None and not _is_hopeless(said) and self._server.may_come_back():
            time.sleep(RECONNECT_PAUSE_S)
            return
        self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        told = self._server.error(error)
        if told is error:
            raise error
        raise told from error


class _Ear:
    """Listens for the commits of other processes on a connection of its own."""

    def __init__(self, server: _Server, heard: Callable[[], None]) -> None:
        self._server, self._heard = server, heard
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._listen_forever, name="store-ear", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        os.write(self._ended, b".")
        self._thread.join(CLOSE_TIMEOUT_S)
        os.close(self._end)
        os.close(self._ended)

    def _listen_forever(self) -> None:
        while True:
            try:
                with self._listening() as raw:
                    self._heard()  # of what happened while nobody listened
                    if self._listen(raw):
                        return
            except (sa.exc.DBAPIError, psycopg.Error, OSError):
                if self._ends_within(LISTEN_AGAIN_S):
                    return

    @contextlib.contextmanager
    def _listening(self) -> Iterator[psycopg.Connection[Any]]:
        conn = self._server.connect()
        try:
            raw = _raw(conn)
            raw.execute(f"SET application_name = '{locks.LISTENER}'")
            raw.execute(f"LISTEN {outbox.CHANNEL}")
            raw.commit()
            yield raw
        finally:
            self._server.drop(conn)

    def _listen(self, raw: psycopg.Connection[Any]) -> bool:
        """True when it is the end; raises when the connection is lost."""
        while True:
            ready, _, _ = select.select([self._end, raw.fileno()], [], [], LISTEN_TIMEOUT_S)
            if self._end in ready:
                return True
            if not ready:
                raw.execute("SELECT 1")  # is it still there?
                raw.commit()
            raw.pgconn.consume_input()
            if self._somebody_else(raw):
                self._heard()
                if self._ends_within(HEARD_PAUSE_S):
                    return True

    def _somebody_else(self, raw: psycopg.Connection[Any]) -> bool:
        others = False
        while (notice := raw.pgconn.notifies()) is not None:
            others = others or notice.be_pid not in self._server.ours
        return others

    def _ends_within(self, wait_s: float) -> bool:
        return bool(select.select([self._end], [], [], wait_s)[0])


def _name(piece: Piece) -> str:
    return piece[0].fn.__qualname__


def _open(server: _Server) -> None:
    """Make sure of the schema; StoreError when the database can't be used."""
    try:
        conn = server.connect()
    except Exception as error:
        raise server.error(error) from error
    try:
        if not migrate.is_current(conn):
            _check(conn, server.shown)
            conn.exec_driver_sql("SET LOCAL statement_timeout = 0")
            locks.hold(conn, "migrate")
            migrate.to_head(conn)
            conn.commit()
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        raise server.error(error) from error
    finally:
        server.drop(conn)


def _check(conn: Connection, shown: str) -> None:
    raw = _raw(conn)
    if raw.info.server_version < OLDEST:
        raise StoreError(
            f"store {shown}: PostgreSQL {raw.info.server_version // 10_000} is too old; wanted 12 or newer"
        )
    encoding = raw.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StoreError(f"store {shown}: its encoding is {encoding}, wanted UTF8; createdb -E UTF8 -T template0 NAME")


def _set_up(raw: psycopg.Connection[Any], _record: object) -> None:
    raw.prepared_max = PREPARED_MAX
    raw.execute(_SETTINGS)
    raw.commit()


def _mark(conn: Connection, _name: str | None) -> None:
    """Events appended after a savepoint go when it is rolled back to."""
    # SQLAlchemy names them sa_savepoint_1, ..._2 after this, counting on each connection.
    conn.info[_SAVEPOINTS] = number = conn.info.get(_SAVEPOINTS, 0) + 1
    conn.info.setdefault(_MARKS, {})[f"sa_savepoint_{number}"] = len(conn.info.get(outbox.PENDING, ()))


def _back_to_mark(conn: Connection, name: str, _context: object) -> None:
    pending = conn.info.get(outbox.PENDING)
    if pending is not None:
        del pending[conn.info[_MARKS][name] :]


def _undo(conn: Connection) -> None:
    """Roll back; a connection that is gone has done it already."""
    with contextlib.suppress(sa.exc.SQLAlchemyError, psycopg.Error):
        conn.rollback()


def _raw(conn: Connection) -> psycopg.Connection[Any]:
    raw = conn.connection.dbapi_connection
    assert isinstance(raw, psycopg.Connection)  # noqa: S101 (for the type checker: the engine above makes no other)
    return raw


def _is_lost(conn: Connection) -> bool:
    return conn.closed or conn.invalidated or _raw(conn).closed


def _said(error: BaseException) -> psycopg.Error | None:
    """The driver's own error; None when it is another's."""
    origin = getattr(error, "orig", None) or error
    return origin if isinstance(origin, psycopg.Error) else None


def _is_the_callers(said: psycopg.Error) -> bool:
    """Whether it tells of the caller's values or statement, and not of the database's state."""
    if said.sqlstate and _matching(said.sqlstate, "") is not None:
        return False
    return not isinstance(said, psycopg.OperationalError | psycopg.InterfaceError)


def _is_hopeless(said: psycopg.Error) -> bool:
    kind = _matching(said.sqlstate or "", str(said).lower())
    return kind is not None and kind[0].startswith(_HOPELESS)


def _cure(state: str, text: str) -> tuple[type[StoreError], str]:
    found = _matching(state, text)
    return (StoreError, _UNKNOWN_CURE) if found is None else (found[2], found[3])


def _matching(state: str, text: str) -> tuple[str, str, type[StoreError], str] | None:
    if state:
        return next((cure for cure in _CURES if state.startswith(cure[0])), None)
    return next((cure for cure in _CURES if cure[1] in text), None)
