"""One question to the history: read-only, bounded in time, rows and reach, its answer ready for JSON.

What keeps a query inside: the settings that `database` locks (no files, no network, no extensions), one statement of a
kind that reads, a transaction that DuckDB itself holds read-only (so that not even EXPLAIN ANALYZE INSERT writes), a
limit around it, and an interrupt when its time is over.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import msgspec

from orchestrator_fleet.errors import FleetError

MAX_ROWS = 100_000
MAX_RESULT_BYTES = 64 << 20
MAX_QUERY_CHARS = 100_000
TIMEOUT_S = 30.0
FETCH_ROWS = 1_000

_DESCRIBE, _POINTED = "DESCRIBE ", "LINE 1: "
_READING = frozenset({"SELECT", "EXPLAIN"})  # DESCRIBE, SHOW, SUMMARIZE, WITH and FROM count as SELECT
_NATIVE = frozenset({"BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT"})
_NATIVE |= {"UINTEGER", "UBIGINT", "UHUGEINT", "FLOAT", "DOUBLE", "VARCHAR", '"NULL"', "NULL"}
_NESTED = ("STRUCT(", "MAP(", "UNION(", "VARIANT")
_FORMS = (  # the first whose start a type has
    ("DECIMAL(", "{}::DOUBLE"),
    ("TIMESTAMP WITH TIME ZONE", "strftime({} AT TIME ZONE 'UTC', '%Y-%m-%dT%H:%M:%S.%fZ')"),
    ("TIMESTAMP", "strftime({}::TIMESTAMP, '%Y-%m-%dT%H:%M:%S.%f')"),
    ("BLOB", "to_base64({})"),
)
_HINTS = (
    ("Table with name", "tables and views: events, tasks, attempts, orchestrators, machines, measurements, stores"),
    ("file system operations are disabled", "a query reads the history alone, no files and no network"),
    ("read-only mode", "a query can only read"),
    ("Out of Memory", "it needs more memory than a query may take; select fewer columns or rows"),
)


class QueryInvalid(FleetError):
    """The query can't be answered as it stands; the text has DuckDB's own words."""


class QueryTooLong(FleetError):
    """The query took longer, or its answer is larger, than it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An answer. `types` are DuckDB's; values are JSON's: times as RFC 3339 text, nested ones as lists and objects.

    `truncated`: there are more rows than were asked for.
    """

    columns: list[str]
    types: list[str]
    rows: list[list[Any]]
    truncated: bool


def query(
    connection: duckdb.DuckDBPyConnection,
    sql: str,
    *,
    params: Sequence[Any] | Mapping[str, Any] = (),
    limit: int = MAX_ROWS,
    timeout_s: float = TIMEOUT_S,
) -> Result:
    """Ask; `connection` must be the caller's own (a cursor of the open history), and is free again afterwards.

    `params` fill `?` or `$1` (a sequence) or `$name` (a mapping). At most `limit` rows. Raises QueryInvalid,
    QueryTooLong.
    """
    text, explains = _one_statement(connection, sql)
    values = dict(params) if isinstance(params, Mapping) else list(params)
    with _bounded(connection, timeout_s), _errors_told(timeout_s):
        connection.execute("BEGIN TRANSACTION READ ONLY")
        if explains:
            return _plan(connection.execute(text, values).fetchall())
        described = connection.execute(f"{_DESCRIBE}{text}", values).fetchall()
        columns, types = [row[0] for row in described], [row[1] for row in described]
        shown = ", ".join(_as_json(f"#{number}", kind) for number, kind in enumerate(types, start=1))
        connection.execute(f"SELECT {shown} FROM (\n{text}\n) LIMIT {limit + 1}", values)  # noqa: S608 (running what people ask is the point)
        rows = _fetch(connection, types, limit + 1)
    return Result(columns=columns, types=types, rows=rows[:limit], truncated=len(rows) > limit)


def _one_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[str, bool]:
    """(the statement without its semicolon, whether it is EXPLAIN); QueryInvalid unless it is one that reads."""
    if len(sql) > MAX_QUERY_CHARS:
        raise QueryInvalid(f"the query has {len(sql)} characters, at most {MAX_QUERY_CHARS} are allowed")
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise QueryInvalid(_told(error)) from error
    if len(statements) != 1:
        raise QueryInvalid(f"got {len(statements)} statements, wanted one; send them one by one")
    kind = statements[0].type.name
    if kind == "MULTI":
        raise QueryInvalid("PIVOT needs its values here; write ON column IN (...)")
    if kind not in _READING:
        raise QueryInvalid(
            f"a query can only read: got {kind.replace('_', ' ')}, wanted SELECT, WITH, EXPLAIN, DESCRIBE, SHOW or "
            "SUMMARIZE"
        )
    return _without_semicolon(sql), kind == "EXPLAIN"


def _without_semicolon(sql: str) -> str:
    """Up to the semicolon that ends the only statement; what follows is blank or a comment."""
    ends = (
        position
        for position, kind in duckdb.tokenize(sql)
        if kind == duckdb.token_type.operator and sql.encode()[position : position + 1] == b";"
    )
    end = next(ends, None)
    return sql if end is None else sql.encode()[:end].decode()


def _as_json(place: str, kind: str) -> str:
    """The expression that brings a column's values to what `_value` and JSON know."""
    if kind in _NATIVE:
        return place
    if _is_nested(kind):
        return f"to_json({place})"
    form = next((form for start, form in _FORMS if kind.startswith(start)), "{}::VARCHAR")
    return form.format(place)


def _is_nested(kind: str) -> bool:
    return kind == "JSON" or kind.endswith("]") or kind.startswith(_NESTED)


def _fetch(connection: duckdb.DuckDBPyConnection, types: list[str], most: int) -> list[list[Any]]:
    parsed = [_is_nested(kind) for kind in types]
    rows: list[list[Any]] = []
    size = 0
    while len(rows) < most and (chunk := connection.fetchmany(min(FETCH_ROWS, most - len(rows)))):
        for row in chunk:
            size += sum(len(value) for value in row if isinstance(value, str))
            rows.append([_value(value, json) for value, json in zip(row, parsed, strict=True)])
        if size > MAX_RESULT_BYTES:
            raise QueryTooLong(f"the answer is larger than {MAX_RESULT_BYTES >> 20} MiB; select fewer columns or rows")
    return rows


def _value(value: Any, json: bool) -> Any:  # noqa: FBT001 (one flag a column, by position)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    return msgspec.json.decode(value) if json and isinstance(value, str) else value


def _plan(rows: list[tuple[Any, ...]]) -> Result:
    return Result(
        columns=["explain_key", "explain_value"],
        types=["VARCHAR", "VARCHAR"],
        rows=[list(row) for row in rows],
        truncated=False,
    )


@contextlib.contextmanager
def _bounded(connection: duckdb.DuckDBPyConnection, timeout_s: float) -> Iterator[None]:
    """End what runs inside after `timeout_s`; the transaction is over when this ends, however it ends."""
    timer = threading.Timer(timeout_s, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # so that it can't interrupt whatever comes next
        with contextlib.suppress(duckdb.Error):
            connection.execute("ROLLBACK")


@contextlib.contextmanager
def _errors_told(timeout_s: float) -> Iterator[None]:
    try:
        yield
    except duckdb.InterruptException as error:
        raise QueryTooLong(
            f"the query ran longer than {timeout_s:g} s and was ended; narrow it, by time for one"
        ) from error
    except duckdb.Error as error:
        raise QueryInvalid(_told(error)) from error


def _told(error: duckdb.Error) -> str:
    """DuckDB's message, its line as people wrote it, and what to do where we know it."""
    told = str(error).strip().split("\n")
    for number, line in enumerate(told[:-1]):
        if line.startswith(_POINTED + _DESCRIBE):  # and the caret below it
            told[number : number + 2] = (
                _POINTED + line.removeprefix(_POINTED + _DESCRIBE),
                told[number + 1][len(_DESCRIBE) :],
            )
    text = "\n".join(told)
    hint = next((advice for mark, advice in _HINTS if mark in text), "")
    return f"{text}\n{hint}" if hint else text
