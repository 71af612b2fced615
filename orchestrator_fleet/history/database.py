"""Opening history.duckdb: one process at a time, no reach beyond the file, the schema as this version has it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb

from orchestrator_fleet.errors import FleetError

MEMORY_LIMIT = "512MB"
SPILL_LIMIT = "2GB"
MAX_THREADS = 4
LOCK_POLL_S = 0.05
SCHEMA = ("schema.sql", "analytics.sql")
_HOLDER = re.compile(r"held in (?P<program>.+?) \(PID (?P<pid>\d+)\)")
_NOT_OURS = re.compile(r"not a valid DuckDB|checksum|corrupt|serializ|newer version|older version", re.IGNORECASE)


class HistoryUnusable(FleetError):
    """The history's file can't be opened or written; the text says the cure. Nothing is lost: the outbox keeps it."""


class HistoryInUse(HistoryUnusable):
    """Another process has the history open; the text names it."""


def connect(path: Path, *, wait_s: float = 0.0) -> duckdb.DuckDBPyConnection:
    """Open the history for writing, and make it when it is missing.

    Waits up to `wait_s` seconds for another process that has it open, then raises HistoryInUse; HistoryUnusable when
    the file can't be used.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            connection = _open(path)
            break
        except duckdb.IOException as error:
            holder = _HOLDER.search(str(error))
            if holder is None:
                raise _unusable(path, error) from error
            if time.monotonic() >= deadline:
                raise HistoryInUse(
                    f"{path}: pid {holder['pid']} ({holder['program']}) has the history open, and one process at a "
                    "time may; ask that one, or try again when it is done"
                ) from error
            time.sleep(LOCK_POLL_S)
        except (duckdb.Error, OSError) as error:
            raise _unusable(path, error) from error
    try:
        _prepare(connection)
    except duckdb.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    return connection


def _open(path: Path) -> duckdb.DuckDBPyConnection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_new = not path.exists()
    connection = duckdb.connect(
        str(path),
        config={
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "python_enable_replacements": False,  # a query must not read this program's variables
            "memory_limit": MEMORY_LIMIT,
            "max_temp_directory_size": SPILL_LIMIT,
            "threads": min(MAX_THREADS, os.cpu_count() or 1),
        },
    )
    if is_new:
        path.chmod(0o600)  # while it is empty: it will hold what tasks said
    return connection


def _prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Bring the schema up to date, in one transaction, and let nobody change a setting from here on."""
    if _one(connection, "SELECT current_setting('lock_configuration')"):
        return  # another part of this process has it open already
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    files = resources.files(__package__)
    schema = "\n".join(files.joinpath(name).read_text(encoding="utf-8") for name in SCHEMA)
    digest = hashlib.sha256(schema.encode()).hexdigest()
    connection.execute("BEGIN")
    connection.execute("CREATE TABLE IF NOT EXISTS history_schema (digest VARCHAR NOT NULL)")
    if _one(connection, "SELECT max(digest) FROM history_schema") != digest:
        connection.execute(schema)
        connection.execute("DELETE FROM history_schema")
        connection.execute("INSERT INTO history_schema VALUES (?)", [digest])
    connection.execute("COMMIT")
    connection.execute("SET GLOBAL lock_configuration = true")


def _one(connection: duckdb.DuckDBPyConnection, sql: str) -> Any:
    found = connection.execute(sql).fetchone()
    return found[0] if found else None


def _unusable(path: Path, error: Exception) -> HistoryUnusable:
    told = str(error).strip().splitlines()[0]
    if _NOT_OURS.search(told):
        cure = "move it (and its .wal) away: the history is made anew from the outbox"
    else:
        cure = "check the owner, the mode and the room on its disk"
    return HistoryUnusable(f"{path}: the history can't be opened: {told}; {cure}")
