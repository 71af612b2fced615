"""Copies of a store, and stores from copies.

A backup is a SQLite file with our tables, whichever database it is of: it can be looked at, checked like any store,
and put back into either kind. It is one snapshot, taken while others write.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Refused, StoreDamaged, StoreError
from orchestrator_fleet.store import check, locks, migrate
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import REVISION, alembic_version, events, metadata, tasks

BATCH_ROWS = 2_000
MAX_SHOWN = 5
BUSY_TIMEOUT_S = 15.0

_TABLES = [table for table in metadata.sorted_tables if table.name != alembic_version.name]
_SEQUENCES = [(table, column) for table in _TABLES for column in table.c if column.autoincrement is True]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """What a backup holds, or what was put back. `aside` is where the old store is kept, if there was one."""

    file: Path
    revision: str
    tasks: int
    events: int
    bytes: int
    aside: Path | None = None


def backup(url: str, file: Path) -> Copy:
    """Copy the store at `url` to `file`; it is there complete, or not at all. Refused when something is there."""
    if file.exists():
        raise Refused(f"{file}: it is there already; name another file, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    with _part_of(file) as part:
        if sa.make_url(url).get_backend_name() == "sqlite":
            _copy_file(Path(sa.make_url(url).database or ""), part)
        else:
            _copy_rows_to_file(url, part)
        _flush(part)
        part.replace(file)
    _flush(file.parent)
    return look_at(file)


def look_at(file: Path) -> Copy:
    """What the backup `file` holds. StoreError when it is no store, StoreDamaged when it is damaged."""
    with check.looking(_url(file)) as conn:
        found = [one for one in check.examine(conn) if one.rule != "schema"]
        if found:
            shown = "; ".join(map(str, found[:MAX_SHOWN]))
            raise StoreDamaged(f"{file}: it can't be trusted: {shown}; take an older backup")
        revision = migrate.revision(conn)
        if revision is None:
            raise StoreError(f"{file}: it is no backup of a store; name one that `fleet store backup` made")
        counts = [
            conn.execute(sa.select(sa.func.count()).select_from(table)).scalar() or 0 for table in (tasks, events)
        ]
    return Copy(file=file, revision=revision, tasks=counts[0], events=counts[1], bytes=file.stat().st_size)


def restore(file: Path, url: str, *, force: bool, aside: Path) -> Copy:
    """Make the store at `url` what the backup `file` holds, brought to this version's schema.

    The backup is verified first. Refused when the store is in use, or holds anything and `force` is not given; then
    what it held is kept in `aside`. The caller sees to it that no control plane of this machine runs.
    """
    held = look_at(file)
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        kept = _put_back_file(file, Path(parsed.database or ""), force=force, aside=aside)
    else:
        kept = _put_back_rows(file, url, force=force, aside=aside)
    return Copy(file=file, revision=held.revision, tasks=held.tasks, events=held.events, bytes=held.bytes, aside=kept)


def _put_back_file(file: Path, target: Path, *, force: bool, aside: Path) -> Path | None:
    kept = None
    target.parent.mkdir(parents=True, exist_ok=True)
    with _part_of(target) as part:
        _copy_file(file, part)
        open_store(_url(part)).close()  # brings it to this version's schema
        _flush(part)
        if target.exists():
            if _is_in_use(target):
                raise Refused(f"{target}: it is in use; end `fleet serve` and whatever else has it open")
            if not _is_empty_file(target):
                _require(force, str(target))
                kept = aside
            for suffix in ("-wal", "-shm"):  # only a damaged one has these still
                with suppress(FileNotFoundError):
                    Path(f"{target}{suffix}").replace(f"{aside}{suffix}")
            os.link(target, aside)  # and not a rename: at no moment is there no store
        part.replace(target)
        _flush(target.parent)
    return kept


def _put_back_rows(file: Path, url: str, *, force: bool, aside: Path) -> Path | None:
    kept = None
    store = open_store(url)
    try:
        if not store.read_sync(locks.alone):
            raise Refused("store: a `fleet serve` works on this database; end it first")
        if not store.read_sync(_is_empty):
            _require(force, sa.make_url(url).render_as_string(hide_password=True))
            kept = backup(url, aside).file
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".restore-") as folder:
            current = Path(folder) / "store.sqlite"
            _copy_file(file, current)
            open_store(_url(current)).close()  # brings it to this version's schema
            with check.looking(_url(current)) as source:
                store.write_sync(lambda conn: _replace_rows(source, conn))
    finally:
        store.close()
    return kept


def _replace_rows(source: Connection, target: Connection) -> None:
    for table in reversed(_TABLES):
        target.execute(table.delete())
    for table in _TABLES:
        _copy_rows(source, target, table)
    for table, column in _SEQUENCES:
        last = target.execute(sa.select(sa.func.max(column))).scalar()
        target.execute(
            sa.text(f"SELECT setval(pg_get_serial_sequence('{table.name}', '{column.name}'), :to, :used)"),
            {"to": last or 1, "used": last is not None},
        )


def _copy_rows_to_file(url: str, part: Path) -> None:
    with check.looking(url) as source:
        revision = migrate.revision(source)
        if revision != REVISION:
            raise StoreError(f"store: it is at revision {revision}, wanted {REVISION}; `fleet store migrate` first")
        engine = sa.create_engine(_url(part), poolclass=sa.NullPool)
        with engine.begin() as target:
            migrate.to_head(target)
            for table in _TABLES:
                _copy_rows(source, target, table)
        engine.dispose()


def _copy_rows(source: Connection, target: Connection, table: sa.Table) -> None:
    rows = source.execution_options(yield_per=BATCH_ROWS).execute(sa.select(table))
    for batch in rows.mappings().partitions(BATCH_ROWS):
        target.execute(table.insert(), [dict(row) for row in batch])


def _copy_file(source: Path, target: Path) -> None:
    """SQLite's own copy: one snapshot, also of a file that others write."""
    if not source.is_file():
        raise StoreError(f"store {source}: it is not there")
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)) as old,
            closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # one file, with nothing beside it
    except sqlite3.Error as error:
        raise StoreError(f"store {source}: it can't be copied: {error}; see `fleet store check`") from error


def _require(force: bool, shown: str) -> None:  # noqa: FBT001 (the flag itself)
    if not force:
        raise Refused(f"{shown}: it holds tasks or events; --force puts it aside and the backup in its place")


def _is_empty(conn: Connection) -> bool:
    return not any(
        conn.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() for table in (tasks, events)
    )


def _is_empty_file(path: Path) -> bool:
    """Whether nothing would be lost. What can't be read is not taken for empty."""
    with suppress(StoreError, sa.exc.SQLAlchemyError), check.looking(_url(path)) as conn:
        return migrate.revision(conn) is not None and _is_empty(conn)
    return path.stat().st_size == 0


def _is_in_use(path: Path) -> bool:
    """Whether another process has it open. If not, everything is in the one file afterwards."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as raw:
        try:
            raw.execute("PRAGMA locking_mode = EXCLUSIVE")
            raw.execute("BEGIN IMMEDIATE")
            raw.execute("COMMIT")
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError as error:
            return "locked" in str(error)
        except sqlite3.DatabaseError:
            return False  # damaged: it is put aside as it is
    return False


@contextmanager
def _part_of(file: Path) -> Iterator[Path]:
    """A file beside it that is its owner's alone, and gone afterwards unless it was moved into place."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    part = Path(name)
    try:
        yield part
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{part}{suffix}").unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _url(path: Path) -> str:
    return f"sqlite:///{path}"
