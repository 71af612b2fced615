"""A fresh schema and a migrated one are the same, and a stranger's database is left alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store import migrate
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import REVISION, metadata


def _schema(path: Path) -> set[tuple[str, str, str]]:
    """Every table's and index's SQL, spacing and the order of constraints aside."""
    with sqlite3.connect(path) as raw:
        found = raw.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {(kind, name, " ".join(sorted(sql.replace(",", " ").split()))) for kind, name, sql in found}


def _migrated(path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as conn:
        migrate.upgrade(conn, None)
    engine.dispose()


def test_a_fresh_schema_equals_the_migrated_one(tmp_path: Path) -> None:
    """Column for column, constraint for constraint, index for index."""
    open_store(f"sqlite:///{tmp_path}/fresh.sqlite").close()
    _migrated(tmp_path / "migrated.sqlite")
    fresh = _schema(tmp_path / "fresh.sqlite")
    assert len(fresh) > 20
    assert fresh == _schema(tmp_path / "migrated.sqlite")


def test_alembic_finds_nothing_to_add(tmp_path: Path) -> None:
    """The declared metadata is what the migrations make."""
    _migrated(tmp_path / "migrated.sqlite")
    engine = sa.create_engine(f"sqlite:///{tmp_path}/migrated.sqlite")
    with engine.connect() as conn:
        ours = MigrationContext.configure(
            conn, opts={"include_object": lambda _o, name, _t, _r, _c: name != "alembic_version"}
        )
        assert compare_metadata(ours, metadata) == []
    engine.dispose()


def test_the_stamped_revision_is_the_newest_script() -> None:
    """A new migration raises REVISION too."""
    assert ScriptDirectory(str(migrate.MIGRATIONS)).get_current_head() == REVISION


def test_a_migrated_store_opens_and_works(tmp_path: Path) -> None:
    """As a fresh one does."""
    _migrated(tmp_path / "store.sqlite")
    store = open_store(f"sqlite:///{tmp_path}/store.sqlite")
    assert store.read_sync(lambda c: c.execute(sa.text("SELECT count(*) FROM tasks")).scalar()) == 0
    store.close()


def test_a_newer_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """It says which revision, and what to install."""
    path = tmp_path / "store.sqlite"
    open_store(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match=r"9999.*newer version.*install"):
        open_store(f"sqlite:///{path}")
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)


def test_a_strangers_database_is_refused(tmp_path: Path) -> None:
    """Its tables are named, and none is added."""
    path = tmp_path / "store.sqlite"
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(StoreError, match="recipes"):
        open_store(f"sqlite:///{path}")
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]
