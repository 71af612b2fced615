"""Brings a database to this version's schema.

A new one is made from `schema` and stamped, which takes 20 ms; Alembic (0.25 s to import) comes in only when there is
something to migrate. A test holds that both ways give the same schema.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store.schema import REVISION, alembic_version, metadata

MIGRATIONS = Path(__file__).parent / "migrations"


def is_current(conn: Connection) -> bool:
    """Whether nothing is to be done."""
    return _revision(conn) == REVISION


def to_head(conn: Connection) -> None:
    """Make or migrate the schema, in the caller's transaction. StoreError when it is not ours, or newer than us."""
    found = _revision(conn)
    if found == REVISION:
        return
    if found is None:
        _make(conn)
    else:
        upgrade(conn, found)


def upgrade(conn: Connection, found: str | None) -> None:
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
    command.upgrade(config, "head")


def _revision(conn: Connection) -> str | None:
    if not sa.inspect(conn).has_table(alembic_version.name):
        return None
    return conn.execute(sa.select(alembic_version.c.version_num)).scalar()


def _make(conn: Connection) -> None:
    foreign = sorted(set(sa.inspect(conn).get_table_names()) - {alembic_version.name})
    if foreign:
        raise StoreError(f"store: the database holds tables that are not ours ({', '.join(foreign[:5])}); name another")
    metadata.create_all(conn)
    conn.execute(alembic_version.insert().values(version_num=REVISION))
