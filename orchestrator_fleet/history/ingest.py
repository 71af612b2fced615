"""The outbox, moved into DuckDB: every event exactly once, whenever and however this process ends.

The rows of a batch and the cursor (`stores.last_seq`) are one DuckDB transaction. A kill before its commit leaves
neither, a kill after it both, so the next run goes on where the last commit stands.

The event at the cursor is also the witness that the live store is still the same one. When it is not there any more,
or is another, the store was deleted or put back from an older copy: what is in the history stays, a new *life* of the
store begins in `stores`, and only the events behind what both have in common are added.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import duckdb
import msgspec
import sqlalchemy as sa

from orchestrator_fleet.errors import FleetError, StoreError
from orchestrator_fleet.history import database
from orchestrator_fleet.store.schema import events as outbox

MAX_BATCH_ROWS = 10_000
MAX_BATCH_BYTES = 32 << 20
READ_ROWS = 500
CLOSE_WAIT_S, CLOSE_POLL_S = 5.0, 0.01
MAX_FLUSH_S = 600.0
# SQLite's transactions are snapshots already.
_SNAPSHOT: dict[str, dict[str, Any]] = {
    "postgresql": {"isolation_level": "REPEATABLE READ", "connect_args": {"connect_timeout": 10}}
}

_COLUMNS = (
    outbox.c.seq,
    outbox.c.at_us,
    outbox.c.kind,
    outbox.c.task,
    outbox.c.attempt,
    outbox.c.orchestrator,
    outbox.c.machine,
    outbox.c.actor,
    outbox.c.generation,
    outbox.c.charter_version,
    outbox.c.route,
    sa.type_coerce(outbox.c.data, sa.Text).label("data"),  # as it stands there: DuckDB parses it, not we
)
_FROM = sa.select(*_COLUMNS).where(outbox.c.seq >= sa.bindparam("first")).order_by(outbox.c.seq)
_NEAREST = (
    sa.select(outbox.c.seq, outbox.c.at_us, outbox.c.kind, outbox.c.task, outbox.c.actor)
    .where(outbox.c.seq <= sa.bindparam("most"))
    .order_by(outbox.c.seq.desc())
    .limit(1)
)
_ENDS = sa.select(sa.func.min(outbox.c.seq), sa.func.max(outbox.c.seq))

# name in `events`, type of the list parameter, expression
_INSERTED = (
    ("seq", "BIGINT", "seq"),
    ("happened_at", "BIGINT", "make_timestamptz(happened_at)"),
    ("kind", "VARCHAR", "kind"),
    ("task", "VARCHAR", "task"),
    ("attempt", "INTEGER", "attempt"),
    ("orchestrator", "VARCHAR", "orchestrator"),
    ("machine", "VARCHAR", "machine"),
    ("actor", "VARCHAR", "actor"),
    ("generation", "VARCHAR", "generation"),
    ("charter_version", "VARCHAR", "charter_version"),
    ("route", "VARCHAR", "route"),
    # what DuckDB does not take for JSON is kept as a text: one odd event must not stop the history
    ("data", "VARCHAR", "coalesce(TRY_CAST(data AS JSON), to_json(data))"),
    ("status", "VARCHAR", "status"),
    ("priority", "VARCHAR", "priority"),
    ("discipline", "VARCHAR", "discipline"),
    ("outcome", "VARCHAR", "outcome"),
    ("exit_code", "INTEGER", "exit_code"),
    ("run_s", "DOUBLE", "run_s"),
    ("input_tokens", "BIGINT", "input_tokens"),
    ("output_tokens", "BIGINT", "output_tokens"),
    ("cache_read_tokens", "BIGINT", "cache_read_tokens"),
    ("cache_write_tokens", "BIGINT", "cache_write_tokens"),
    ("usd", "DOUBLE", "usd"),
)
_INSERT = (
    f"INSERT INTO events (id, store, {', '.join(name for name, _, _ in _INSERTED)}) "  # noqa: S608 (made of the constants above)
    f"SELECT ? + row_number() OVER (ORDER BY seq), ?, {', '.join(made for _, _, made in _INSERTED)} "
    f"FROM (SELECT {', '.join(f'unnest(?::{kind}[]) AS {name}' for name, kind, _ in _INSERTED)})"
)


T = TypeVar("T")

_Int32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
_Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class _Task(msgspec.Struct, frozen=True):
    status: str | None = None
    priority: str | None = None
    discipline: str | None = None


class _Usage(msgspec.Struct, frozen=True):
    input_tokens: _Int64 | None = None
    output_tokens: _Int64 | None = None
    cache_read_tokens: _Int64 | None = None
    cache_write_tokens: _Int64 | None = None
    usd: float | None = None


class _WithTask(msgspec.Struct, frozen=True):
    """What the typed columns of `events` need of the task in an event's data; the rest is skipped, unread."""

    task: _Task = _Task()


class _WithEnd(msgspec.Struct, frozen=True):
    """What they need of an attempt's end."""

    outcome: str | None = None
    exit_code: _Int32 | None = None
    run_s: float | None = None


class _WithUsage(msgspec.Struct, frozen=True):
    """What they need of what it used. Apart, so that odd figures don't hide that the attempt ended."""

    usage: _Usage | None = None


_with_task = msgspec.json.Decoder(_WithTask)
_with_end = msgspec.json.Decoder(_WithEnd)
_with_usage = msgspec.json.Decoder(_WithUsage)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cursor:
    """Where the history stands: `last_seq` of the current life of the store, and the number of events in all."""

    store: int
    last_seq: int
    events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moved:
    """A batch: how many events, and whether it was full, so that there may be more."""

    rows: int
    more: bool


class Ingester:
    """Moves events from the live store at `store_url` to the DuckDB file at `path`.

    Making one touches no disk. The file is opened by the first call, and kept open (and locked against other processes)
    until `close`. Calls from several threads take turns.
    """

    def __init__(self, store_url: str, duckdb_path: Path, *, wait_s: float = 0.0) -> None:
        """`wait_s`: how long to wait for another process that has the file open."""
        self.path = duckdb_path
        self._url, self._wait_s = _driven(sa.make_url(store_url)), wait_s
        self._engine: sa.Engine | None = None
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._file: tuple[int, int] | None = None
        self._turn = threading.Lock()

    def run_once(self) -> int:
        """Move one batch (at most MAX_BATCH_ROWS events); how many there were, 0 when nothing is new.

        Raises HistoryInUse when another process has the file open, HistoryUnusable when it can't be used, StoreError
        when the live store can't be read. Nothing is half done after any of them.
        """
        with self._turn:
            return self._move().rows

    def flush(self) -> int:
        """Move all that is committed in the live store by now; how many events that were. Errors as `run_once`."""
        total, deadline = 0, time.monotonic() + MAX_FLUSH_S
        while True:
            with self._turn:
                moved = self._move()
            total += moved.rows
            if not moved.more:
                return total
            if time.monotonic() > deadline:
                raise FleetError(
                    f"{self.path}: {total} events in {MAX_FLUSH_S:g} s, and more to come; try again, the disk is slow"
                )

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own to the open history, for one thread; close it after use."""
        with self._turn:
            return self._opened().cursor()

    def close(self) -> None:
        """Let go of both databases. Closing twice is fine; another call opens them again."""
        with self._turn:
            self._close()

    def _close(self) -> None:
        if self._connection is not None:
            _let_go(self._connection, self.path)
            self._connection = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def _opened(self) -> duckdb.DuckDBPyConnection:
        """The open file. One that was deleted or replaced meanwhile is left alone for the one that is there now."""
        if self._connection is not None and self._file != _identity(self.path):
            self._close()
        if self._connection is None:
            self._connection = database.connect(self.path, wait_s=self._wait_s)
            self._file = _identity(self.path)
        return self._connection

    def _move(self) -> _Moved:
        try:
            return self._move_into(self._opened())
        except database.HistoryUnusable as error:
            if isinstance(error.__cause__, duckdb.FatalException):
                self._close()  # as a full disk at a checkpoint: it answers nothing any more until it is opened anew
            raise

    def _move_into(self, history: duckdb.DuckDBPyConnection) -> _Moved:
        with _transaction(history, self.path), self._reading() as live:
            if live is None:
                return _Moved(rows=0, more=False)
            cursor = _continue(history, live, _cursor(history))
            rows, more = _read(live, cursor.last_seq + 1)
            if rows:
                columns = [list(column) for column in zip(*rows, strict=True)]
                history.execute(_INSERT, [cursor.events, cursor.store, *columns])
                _move_cursor(history, cursor, to_seq=rows[-1][0])
            return _Moved(rows=len(rows), more=more)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sa.Connection | None]:
        """One snapshot of the live store; None while there is no such store yet."""
        if self._url.get_backend_name() == "sqlite" and not Path(self._url.database or "").is_file():
            yield None  # connecting would make the file
            return
        try:
            if self._engine is None:
                how = _SNAPSHOT.get(self._url.get_backend_name(), {})
                self._engine = sa.create_engine(self._url, poolclass=sa.NullPool, **how)
            with self._engine.connect() as live:
                yield live if sa.inspect(live).has_table(outbox.name) else None
        except sa.exc.SQLAlchemyError as error:
            told = str(getattr(error, "orig", None) or error).splitlines()[0]
            shown = self._url.render_as_string(hide_password=True)
            raise StoreError(f"{shown}: the outbox can't be read: {told}; the history waits until it can") from error


def _let_go(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Close it. Somebody who was given up on may still be in a call: DuckDB refuses then instead of waiting."""
    deadline = time.monotonic() + CLOSE_WAIT_S
    while True:
        try:
            connection.close()
        except duckdb.ResourceInUseException as error:
            if time.monotonic() > deadline:
                raise database.HistoryUnusable(
                    f"{path}: still in use {CLOSE_WAIT_S:g} s after it was to be closed; what it lacks comes later"
                ) from error
            time.sleep(CLOSE_POLL_S)
        else:
            return


def _driven(url: sa.URL) -> sa.URL:
    """PostgreSQL by the driver that we bring."""
    return url.set(drivername="postgresql+psycopg") if url.get_backend_name() == "postgresql" else url


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _cursor(history: duckdb.DuckDBPyConnection) -> _Cursor:
    found = history.execute("SELECT store, last_seq FROM stores ORDER BY store DESC LIMIT 1").fetchone()
    store, last_seq = found or (0, 0)
    counted = history.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()
    return _Cursor(store=store, last_seq=last_seq, events=counted[0] if counted else 0)


def _continue(history: duckdb.DuckDBPyConnection, live: sa.Connection, cursor: _Cursor) -> _Cursor:
    """The cursor to go on from: the same one, or that of a new life of the store."""
    if cursor.store == 0:
        return _Cursor(store=1, last_seq=0, events=0)
    if _is_witness(history, live, cursor.last_seq):
        return cursor
    first, last = live.execute(_ENDS).one()
    if first is not None and first > cursor.last_seq:
        return cursor  # the outbox was trimmed up to here, and goes on
    return _Cursor(
        store=cursor.store + 1,
        last_seq=_in_common(history, live, min(last or 0, cursor.last_seq)),
        events=cursor.events,
    )


def _is_witness(history: duckdb.DuckDBPyConnection, live: sa.Connection, seq: int) -> bool:
    """Whether the live store's event at (or, in a gap, before) `seq` is the one that the history has of that number."""
    there = live.execute(_NEAREST, {"most": seq}).one_or_none()
    if there is None:
        return seq == 0
    here = history.execute(
        "SELECT epoch_us(happened_at), kind, task, actor FROM events WHERE seq = ? ORDER BY id DESC LIMIT 1",
        [there.seq],
    ).fetchone()
    return here == (there.at_us, there.kind, there.task, there.actor)


def _in_common(history: duckdb.DuckDBPyConnection, live: sa.Connection, most: int) -> int:
    """The greatest seq, up to `most`, until which the live store and the history tell the same."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if _is_witness(history, live, middle):
            low = middle
        else:
            high = middle - 1
    return low


def _read(live: sa.Connection, first: int) -> tuple[list[Sequence[Any]], bool]:
    """A batch of rows of `_INSERTED`'s columns from `first` on, and whether it is full, by rows or by bytes."""
    rows: list[Sequence[Any]] = []
    size = 0
    with live.execution_options(stream_results=True, yield_per=READ_ROWS).execute(_FROM, {"first": first}) as found:
        for row in found:
            rows.append((*row, *_typed(row.data)))
            size += len(row.data)
            if len(rows) >= MAX_BATCH_ROWS or size >= MAX_BATCH_BYTES:
                return rows, True
    return rows, False


def _typed(data: str) -> tuple[Any, ...]:
    """The typed columns behind `data`; NULL where it has another shape."""
    task = _decoded(_with_task, data, _WithTask()).task
    end = _decoded(_with_end, data, _WithEnd())
    usage = _decoded(_with_usage, data, _WithUsage()).usage or _Usage()
    return (
        task.status,
        task.priority,
        task.discipline,
        end.outcome,
        end.exit_code,
        end.run_s,
        usage.input_tokens,
        usage.output_tokens,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.usd,
    )


def _decoded(decoder: msgspec.json.Decoder[T], data: str, otherwise: T) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return otherwise


def _move_cursor(history: duckdb.DuckDBPyConnection, cursor: _Cursor, *, to_seq: int) -> None:
    """In the transaction of the rows. Two ingesters in one process meet here, and the later one is refused."""
    moved = history.execute("UPDATE stores SET last_seq = ? WHERE store = ? RETURNING store", [to_seq, cursor.store])
    if moved.fetchone() is None:
        history.execute("INSERT INTO stores VALUES (?, now(), ?, ?)", [cursor.store, cursor.last_seq, to_seq])


@contextlib.contextmanager
def _transaction(history: duckdb.DuckDBPyConnection, path: Path) -> Iterator[None]:
    try:
        history.execute("BEGIN")
        yield
        history.execute("COMMIT")
    except BaseException as error:
        with contextlib.suppress(duckdb.Error):
            history.execute("ROLLBACK")
        if not isinstance(error, duckdb.Error):
            raise
        told = str(error).strip().splitlines()[0]
        raise database.HistoryUnusable(
            f"{path}: the history can't be written: {told}; this batch is in it whole or not at all"
        ) from error
