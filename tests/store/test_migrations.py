"""A fresh schema and a migrated one are the same; a migration keeps every row; a stranger's database is left alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store import migrate
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import REVISION, metadata

MANY = 300


@pytest.fixture
def fresh_url(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> str:
    """Where nothing is yet."""
    if backend == "sqlite":
        return f"sqlite:///{tmp_path}/fresh.sqlite"
    return request.getfixturevalue("postgres_server").empty()


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> str:
    """A database made by the migrations alone."""
    url = f"sqlite:///{tmp_path}/migrated.sqlite"
    if backend == "postgresql":
        url = request.getfixturevalue("postgres_server").empty()
    _in(url, lambda conn: migrate.upgrade(conn, None))
    return url


def _in(url: str, do: Callable[[sa.Connection], Any]) -> Any:
    """Do it in a transaction of its own, without the store."""
    driven = sa.make_url(url)
    if driven.get_backend_name() == "postgresql":
        driven = driven.set(drivername="postgresql+psycopg")
    engine = sa.create_engine(driven, poolclass=sa.NullPool)
    with engine.begin() as conn:
        return do(conn)


SCHEMA = {
    "sqlite": """SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL""",
    "postgresql": """
        SELECT 'constraint', conrelid::regclass || ' ' || conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'index', indexrelid::regclass::text, pg_get_indexdef(indexrelid)
        FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE relnamespace = 'public'::regnamespace
        UNION ALL
        SELECT 'column', table_name || ' ' || column_name, concat_ws(' ', data_type, is_nullable, column_default)
        FROM information_schema.columns WHERE table_schema = 'public'""",
}


def _schema(conn: sa.Connection) -> set[tuple[str, str, str]]:
    """Everything that stands in the schema; spacing, quotes and the order of constraints aside."""
    found = conn.exec_driver_sql(SCHEMA[conn.dialect.name]).all()
    return {(kind, name, " ".join(sorted(sql.replace(",", " ").replace('"', "").split()))) for kind, name, sql in found}


def test_a_fresh_schema_equals_the_migrated_one(fresh_url: str, migrated_url: str) -> None:
    """Column for column, constraint for constraint, index for index."""
    open_store(fresh_url).close()
    fresh = _in(fresh_url, _schema)
    assert len(fresh) > 20
    assert fresh == _in(migrated_url, _schema)


def test_alembic_finds_nothing_to_add(migrated_url: str) -> None:
    """The declared metadata is what the migrations make."""

    def compare(conn: sa.Connection) -> list[Any]:
        ours = MigrationContext.configure(
            conn, opts={"include_object": lambda _o, name, _t, _r, _c: name != "alembic_version"}
        )
        return compare_metadata(ours, metadata)

    assert _in(migrated_url, compare) == []


def test_the_stamped_revision_is_the_newest_script() -> None:
    """A new migration raises REVISION too."""
    assert ScriptDirectory(str(migrate.MIGRATIONS)).get_current_head() == REVISION


def test_a_migrated_store_opens_and_works(migrated_url: str) -> None:
    """As a fresh one does."""
    with closing(open_store(migrated_url)) as store:
        assert store.read_sync(lambda c: c.execute(sa.text("SELECT count(*) FROM tasks")).scalar()) == 0


@pytest.mark.parametrize("old", ["0001"])
def test_a_migration_keeps_every_row_and_every_reference(fresh_url: str, old: str) -> None:
    """A store of an older version, full: what stood there stands there afterwards, and what is new has its default."""
    _in(fresh_url, lambda conn: migrate.upgrade(conn, None, to=old))
    _in(fresh_url, _fill)
    before = _in(fresh_url, _contents)
    assert sum(map(len, before.values())) > MANY * 5
    with closing(open_store(fresh_url)) as store:
        after = store.read_sync(_contents)
        assert store.read_sync(migrate.revision) == REVISION
        for table, rows in before.items():
            assert [{name: row[name] for name in rows[0]} for row in after[table]] == rows, table
        assert {(t["parked_by"], t["counts_on"], bool(t["over_budget"])) for t in after["tasks"]} == {
            (None, None, False)
        }
        # The references hold as before: a purged task takes its own along, and only those.
        store.write_sync(lambda c: c.exec_driver_sql("DELETE FROM tasks WHERE id = 'task-1'"))
        left = store.read_sync(_contents)
        for table in ("attempts", "attempt_log", "task_tags"):
            assert len(left[table]) == len(before[table]) - 1, table
        with pytest.raises(sa.exc.IntegrityError):
            store.write_sync(lambda c: c.exec_driver_sql("INSERT INTO task_tags (tag, task) VALUES ('x', 'none')"))


def _fill(conn: sa.Connection) -> None:
    """Rows of every kind that revision 0001 had."""
    task = (
        "INSERT INTO tasks (id, title, description, priority, status, blocked_reason, orchestrator, tags, depends_on,"
        " metadata, attempt, failures, max_attempts, created_by, created_at_us, updated_at_us, started_at_us,"
        " completed_at_us, version, token, lease_until_us, rank, due_key_us, waiting_since_us, ripens_at_us)"
        " VALUES (:id, 'title', 'text', 'LOW', :status, :why, 'vp', '[]', '[]', '{}', :attempt, 0, 3, 'k', :n, 1,"
        " :started, :done, 1, :token, :lease, 3, 1, 1, :ripens)"
    )
    empty = dict.fromkeys(("why", "started", "done", "token", "lease", "ripens"))
    kinds = [
        {**empty, "status": "TODO", "attempt": 1, "ripens": 5},
        {**empty, "status": "IN_PROGRESS", "attempt": 1, "started": 2, "token": "x", "lease": 9},
        {**empty, "status": "BLOCKED", "attempt": 1, "why": "dependency"},
        {**empty, "status": "DONE", "attempt": 1, "started": 2, "done": 3},
    ]
    conn.execute(sa.text(task), [{**kinds[n % 4], "id": f"task-{n}", "n": n} for n in range(MANY)])
    ended = "'x', 'vp', 'm', 'h', NULL, NULL, 1, 2, 'done', NULL, 0, NULL, NULL, 1, 2, 3"
    for table, values in (
        ("attempts", f":task, 1, {ended}"),
        ("attempt_log (task, attempt, at_us, stream, byte_offset, text)", ":task, 1, 1, 'stdout', 0, 'text'"),
        ("task_tags (tag, task)", "'tag', :task"),
        ("events (at_us, kind, actor, task, data)", "1, 'task_created', 'k', :task, '{}'"),
    ):
        text = f"INSERT INTO {table} VALUES ({values})"  # noqa: S608 (of the constants above)
        conn.execute(sa.text(text), [{"task": f"task-{n}"} for n in range(MANY)])
    edge = "INSERT INTO task_dependencies (task, depends_on) VALUES (:task, :on)"
    conn.execute(sa.text(edge), [{"task": f"task-{n}", "on": f"task-{n + 1}"} for n in range(2, MANY - 1)])
    conn.execute(sa.text("INSERT INTO counters (name, value) VALUES ('round', 7)"))
    conn.execute(sa.text("INSERT INTO idempotency VALUES ('k', 'key', 'f', 201, '{}', '{}', 1)"))


def _contents(conn: sa.Connection) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, in an order of its own; the schema's revision aside."""
    found = {}
    for table in sorted(set(sa.inspect(conn).get_table_names()) - {"alembic_version"}):
        rows = [dict(row) for row in conn.exec_driver_sql(f"SELECT * FROM {table}").mappings()]  # noqa: S608 (our own)
        if rows:
            found[table] = sorted(
                rows, key=lambda row: repr([row[name] for name in sorted(row) if name != "over_budget"])
            )
    return found


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_migration_that_finds_lost_references_changes_nothing(fresh_url: str, tmp_path: Path) -> None:
    """Rows without their task can't be carried over; the file is as it was."""
    _in(fresh_url, lambda conn: migrate.upgrade(conn, None, to="0001"))
    path = tmp_path / "fresh.sqlite"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("INSERT INTO task_tags (tag, task) VALUES ('x', 'none')")
        raw.commit()
    with pytest.raises(StoreError, match=r"refer to rows that are not there.*fleet store restore"):
        open_store(fresh_url)
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
        assert raw.execute("SELECT count(*) FROM task_tags").fetchone() == (1,)


def test_a_newer_schema_is_refused_and_left_as_it_is(fresh_url: str) -> None:
    """It says which revision, and what to install."""
    open_store(fresh_url).close()
    _in(fresh_url, lambda conn: conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match=r"9999.*newer version.*install"):
        open_store(fresh_url)
    assert _in(fresh_url, migrate.revision) == "9999"


def test_a_strangers_database_is_refused(fresh_url: str) -> None:
    """Its tables are named, and none is added."""
    _in(fresh_url, lambda conn: conn.exec_driver_sql("CREATE TABLE recipes (name TEXT)"))
    with pytest.raises(StoreError, match="recipes"):
        open_store(fresh_url)
    assert _in(fresh_url, lambda conn: sa.inspect(conn).get_table_names()) == ["recipes"]
