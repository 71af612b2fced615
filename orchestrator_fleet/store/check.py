"""Whether a store holds what it should: the database's own checks, then the rules that no CHECK constraint can say.

Reads alone, and opens the database without migrating it, so that a damaged or an old one can be looked at too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store import migrate
from orchestrator_fleet.store.schema import REVISION, metadata

MAX_FOUND = 20
CONNECT_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with what, and what to do about it."""

    rule: str
    subject: str
    problem: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.subject}: {self.problem}"


@contextmanager
def looking(url: str) -> Iterator[Connection]:
    """One snapshot of the database at `url`, as it is. StoreError when it is not there, or can't be read."""
    parsed = sa.make_url(url)
    shown = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite":
        if not Path(parsed.database or "").is_file():
            raise StoreError(f"store {parsed.database}: it is not there; `fleet serve` makes it")
        engine = sa.create_engine(parsed, poolclass=sa.NullPool)
    else:
        try:
            engine = sa.create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                poolclass=sa.NullPool,
                isolation_level="REPEATABLE READ",
                connect_args={"connect_timeout": CONNECT_TIMEOUT_S, "client_encoding": "utf8"},
            )
        except ImportError:
            raise StoreError(
                "store: PostgreSQL needs its driver; pip install 'orchestrator-fleet[postgresql]'"
            ) from None
    try:
        with engine.connect() as conn:
            if parsed.get_backend_name() == "sqlite":
                conn.exec_driver_sql("PRAGMA query_only = ON")
            else:
                conn.exec_driver_sql("SET TRANSACTION READ ONLY")
            yield conn
    except sa.exc.DBAPIError as error:
        raise StoreError(f"store {shown}: {str(error.orig).strip()}; see `fleet store check`") from error
    finally:
        engine.dispose()


def examine(conn: Connection) -> list[Finding]:
    """Everything found wrong, at most MAX_FOUND of each rule."""
    found = _sound(conn)
    if found:
        return found  # what can't be trusted is not asked further
    revision = migrate.revision(conn)
    if revision != REVISION:
        what = "has no schema of ours" if revision is None else f"is at revision {revision}"
        return [
            Finding(rule="schema", subject="store", problem=f"{what}, wanted {REVISION}; run `fleet store migrate`")
        ]
    for rule in _RULES:
        found += rule(conn)
    for name, subject, text, problem in _QUERIES:
        rows = conn.exec_driver_sql(f"{text} LIMIT {MAX_FOUND}").all()
        found += [Finding(rule=name, subject=f"{subject} {' '.join(map(str, row))}", problem=problem) for row in rows]
    return found


def _sound(conn: Connection) -> list[Finding]:
    """What the database itself knows of its state."""
    if conn.dialect.name == "sqlite":
        try:
            told = conn.exec_driver_sql(f"PRAGMA integrity_check({MAX_FOUND})").scalars().all()
            lost = conn.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(MAX_FOUND)
        except sa.exc.DatabaseError as error:
            told, lost = [str(error.orig)], []
        found = [Finding(rule="integrity", subject="file", problem=f"{one}; {_CURE}") for one in told if one != "ok"]
        for table, _, parent, _ in lost:
            found.append(Finding(rule="reference", subject=table, problem=f"has a row without its {parent}; {_CURE}"))
        return found
    broken = conn.exec_driver_sql(_BROKEN_INDEXES).scalars().all()
    found = [Finding(rule="integrity", subject=name, problem="the index is not valid; REINDEX it") for name in broken]
    if failures := conn.exec_driver_sql(_CHECKSUM_FAILURES).scalar():
        found.append(Finding(rule="integrity", subject="database", problem=f"{failures} pages were damaged; {_CURE}"))
    present = set(sa.inspect(conn).get_table_names())
    for table in metadata.sorted_tables:
        if table.name in present:
            conn.execute(sa.select(sa.func.count()).select_from(table))  # reads every page; raises on a damaged one
    return found


_CURE = "put back a backup with `fleet store restore`"
_BROKEN_INDEXES = (
    "SELECT indexrelid::regclass::text FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid"
    " WHERE relnamespace = 'public'::regnamespace AND NOT (indisvalid AND indisready)"
)
_CHECKSUM_FAILURES = "SELECT checksum_failures FROM pg_stat_database WHERE datname = current_database()"

_RUNNING_UNHELD = """
    SELECT t.id FROM tasks t WHERE t.status = 'IN_PROGRESS' AND NOT EXISTS (
      SELECT 1 FROM attempts a
      WHERE a.task = t.id AND a.attempt = t.attempt AND a.token = t.token AND a.ended_at_us IS NULL)"""
_OPEN_UNUSED = """
    SELECT a.task, a.attempt FROM attempts a JOIN tasks t ON t.id = a.task
    WHERE a.ended_at_us IS NULL AND (t.status <> 'IN_PROGRESS' OR t.attempt <> a.attempt)"""
_UNCOUNTED = "SELECT a.task, a.attempt FROM attempts a JOIN tasks t ON t.id = a.task WHERE a.attempt > t.attempt"
_WAITS_FOR_NOTHING = """
    SELECT t.id FROM tasks t WHERE t.status = 'BLOCKED' AND t.blocked_reason = 'dependency' AND NOT EXISTS (
      SELECT 1 FROM task_dependencies d JOIN tasks o ON o.id = d.depends_on
      WHERE d.task = t.id AND o.status <> 'DONE')"""
_COUNTS_UNUSED = """
    SELECT u.task, u.attempt, u.limit_name FROM limit_uses u JOIN tasks t ON t.id = u.task
    WHERE u.ended_at_us IS NULL AND (t.status <> 'IN_PROGRESS' OR t.attempt <> u.attempt)"""
_QUERIES = (
    (
        "running",
        "task",
        _RUNNING_UNHELD,
        "is in progress without an open attempt under its token; the end of its lease puts it back in line",
    ),
    ("running", "attempt", _OPEN_UNUSED, "is open, and its task is not in progress under it"),
    ("attempts", "attempt", _UNCOUNTED, "has a greater number than its task has counted"),
    (
        "dependencies",
        "task",
        _WAITS_FOR_NOTHING,
        "waits for dependencies, and all of them are done; `fleet task unblock` it",
    ),
    ("limits", "attempt", _COUNTS_UNUSED, "counts on a limit, and does not run"),
)


def _lists_agree(conn: Connection) -> list[Finding]:
    """A task's own list of dependencies and tags is what the tables beside it say."""
    found: list[Finding] = []
    for rule, column, table, value in (
        ("dependencies", "depends_on", "task_dependencies", "depends_on"),
        ("tags", "tags", "task_tags", "tag"),
    ):
        beside: dict[str, set[str]] = {}
        for task, one in conn.exec_driver_sql(f"SELECT task, {value} FROM {table}"):  # noqa: S608 (the constants above)
            beside.setdefault(task, set()).add(one)
        listed = conn.exec_driver_sql(f"SELECT id, {column} FROM tasks WHERE {column} <> '[]'")  # noqa: S608 (as above)
        own = {task: set(msgspec.json.decode(text)) for task, text in listed}
        wrong = sorted(task for task in own.keys() | beside.keys() if own.get(task, set()) != beside.get(task, set()))
        problem = f"lists other {column} than {table} has for it"
        found += [Finding(rule=rule, subject=f"task {task}", problem=problem) for task in wrong[:MAX_FOUND]]
    return found


def _no_circles(conn: Connection) -> list[Finding]:
    """Nothing waits for itself, by however many others."""
    edges = conn.exec_driver_sql(
        "SELECT d.task, d.depends_on FROM task_dependencies d JOIN tasks t ON t.id = d.task"
        " JOIN tasks o ON o.id = d.depends_on WHERE t.status = 'BLOCKED' AND o.status = 'BLOCKED'"
    ).all()
    waits: dict[str, int] = {}
    needed_by: dict[str, list[str]] = {}
    for task, needed in edges:
        waits[task] = waits.get(task, 0) + 1
        waits.setdefault(needed, 0)
        needed_by.setdefault(needed, []).append(task)
    free = [task for task, count in waits.items() if count == 0]
    while free:
        for task in needed_by.get(free.pop(), ()):
            waits[task] -= 1
            if waits[task] == 0:
                free.append(task)
    problem = "waits for itself, by way of its dependencies; edit or cancel one of them"
    return [
        Finding(rule="dependencies", subject=f"task {task}", problem=problem)
        for task in sorted(task for task, count in waits.items() if count)[:MAX_FOUND]
    ]


_RULES: tuple[Callable[[Connection], list[Finding]], ...] = (_lists_agree, _no_circles)
