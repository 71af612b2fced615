"""Brings a database to this version's schema.

A new one is made from `schema` and stamped, which takes 20 ms; Alembic (0.25 s to import) comes in only when there is
something to migrate. A test holds that both ways give the same schema.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store.schema import REVISION, alembic_version, metadata

MIGRATIONS = Path(__file__).parent / "migrations"
MAX_SHOWN = 5


def revision(conn: Connection) -> str | None:
    """The revision of the schema that stands there; None for a database without one."""
    if not sa.inspect(conn).has_table(alembic_version.name):
        return None
    return conn.execute(sa.select(alembic_version.c.version_num)).scalar()


def is_current(conn: Connection) -> bool:
    """Whether nothing is to be done."""
    return revision(conn) == REVISION


def to_head(conn: Connection) -> None:
    """Make or migrate the schema, in the caller's transaction. StoreError when it is not ours, or newer than us.

    On SQLite the transaction begins inside `foreign_keys_off`.
    """
    found = revision(conn)
    if found == REVISION:
        return
    if found is None:
        _make(conn)
    else:
        upgrade(conn, found)


@contextmanager
def foreign_keys_off(raw: sqlite3.Connection) -> Iterator[None]:
    """What a migration's transaction stands in on SQLite: it makes tables anew, and dropping the old one would take
    along whatever refers to it. The switch does nothing inside a transaction, so it stands around it.
    """  # noqa: D205 (one sentence, too long for a line)
    raw.execute("PRAGMA foreign_keys = OFF")
    try:
        yield
    finally:
        raw.execute("PRAGMA foreign_keys = ON")


def upgrade(conn: Connection, found: str | None, *, to: str = "head") -> None:
    """Run Alembic's migrations from revision `found` (None: from nothing)."""
    from alembic import command  # noqa: PLC0415 (0.25 s, only when there is something to migrate)
    from alembic.config import Config  # noqa: PLC0415 (as above)
    from alembic.script import ScriptDirectory  # noqa: PLC0415 (as above)

    config = Config(attributes={"connection": conn})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise StoreError(
            f"store: its schema is at revision {found}, made by a newer version of fleet than this one (at {REVISION});"
            " install that version, or start with another store"
        )
    is_sqlite = conn.dialect.name == "sqlite"
    if is_sqlite and conn.exec_driver_sql("PRAGMA foreign_keys").scalar():
        raise AssertionError("a migration under foreign keys would delete rows; see foreign_keys_off")
    command.upgrade(config, to)
    if is_sqlite:
        _check_foreign_keys(conn)


def _check_foreign_keys(conn: Connection) -> None:
    """They were off: what would have been refused must not stand."""
    lost = conn.exec_driver_sql("PRAGMA foreign_key_check").all()
    if lost:
        shown = ", ".join(f"one of {table} without its {parent}" for table, _, parent, _ in lost[:MAX_SHOWN])
        raise StoreError(
            f"store: {len(lost)} rows refer to rows that are not there ({shown}); nothing was migrated:"
            " put back a backup with `fleet store restore`"
        )


def _make(conn: Connection) -> None:
    foreign = sorted(set(sa.inspect(conn).get_table_names()) - {alembic_version.name})
    if foreign:
        raise StoreError(
            f"store: the database holds tables that are not ours ({', '.join(foreign[:MAX_SHOWN])}); name another"
        )
    metadata.create_all(conn)
    conn.execute(alembic_version.insert().values(version_num=REVISION))
