"""`fleet store`: the live database itself: its schema, whether it is sound, copies of it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.sql import store_of
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, Refused, StoreError
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.store import check as checks
from orchestrator_fleet.store import migrate as migrations
from orchestrator_fleet.store.backup import Copy
from orchestrator_fleet.store.backup import backup as make_backup
from orchestrator_fleet.store.backup import restore as put_back
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import REVISION


@click.group(cls=Group)
def command() -> None:
    """Migrate, check, back up and restore the live database.

    It is the one that FLEET_STORE names, else `control_plane.store` as applied, else as fleet.yaml has it.
    """


@command.command("migrate")
def migrate() -> None:
    """Bring the schema to this version's; `fleet serve` does the same when it starts. What stands there stays."""
    url = _url()
    found = _revision(url)
    open_store(url).close()
    changed = found != REVISION
    if place().json:
        output.write_json({"from": found, "to": REVISION, "changed": changed})
    elif changed:
        output.say(f"migrated from {found or 'nothing'} to {REVISION}")
    else:
        output.say(f"at {REVISION} already: nothing to do")


@command.command("check")
def check() -> int:
    """Look for damage, and for tasks that contradict each other; changes nothing, also beside a `fleet serve`.

    Exit code 1 when anything is found.
    """
    with checks.looking(_url()) as conn:
        found = checks.examine(conn)
    if place().json:
        output.write_json({"ok": not found, "findings": [asdict(one) for one in found]})
    else:
        output.say("\n".join(map(str, found)) if found else "ok")
    return EXIT_FAILED if found else EXIT_DONE


@command.command("backup")
@click.argument("copy", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
def backup(*, copy: Path) -> None:
    """Copy the store to FILE, also while `fleet serve` works on it: one consistent moment, flushed to the disk.

    FILE is a SQLite store, of a PostgreSQL store too (no pg_dump is needed); `fleet store restore` puts it back into
    either kind.
    """
    _tell(make_backup(_url(), copy.absolute()), "backed up to")


@command.command("restore")
@click.argument("copy", metavar="FILE", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--force", is_flag=True, help="Also over a store that holds something; that is kept aside.")
def restore(*, copy: Path, force: bool) -> None:
    """Put a backup back in the store's place. FILE is verified first; no `fleet serve` may run.

    A store that holds anything is left alone without --force. With it, what it held is kept in the state folder.
    """
    state = State(place().file)
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    with _nobody_serves(state):
        _tell(
            put_back(copy.absolute(), _url(), force=force, aside=state.dir / f"store.before-{now}.sqlite"),
            "restored from",
        )


def _tell(copy: Copy, did: str) -> None:
    if place().json:
        output.write_json({**asdict(copy), "file": str(copy.file), "aside": copy.aside and str(copy.aside)})
        return
    counted = f"{output.count(copy.tasks, 'task')}, {output.count(copy.events, 'event')}"
    output.say(f"{did} {copy.file}: {counted}, revision {copy.revision}, {copy.bytes:,} bytes")
    if copy.aside is not None:
        output.say(f"what was there is in {copy.aside}", err=True)


def _url() -> str:
    state = State(place().file)
    return state.store_url(store_of(state))


def _revision(url: str) -> str | None:
    try:
        with checks.looking(url) as conn:
            return migrations.revision(conn)
    except StoreError:
        return None  # it is not there yet, or can't be opened: which of them, opening it tells


@contextmanager
def _nobody_serves(state: State) -> Iterator[None]:
    """Keep `fleet serve` from starting meanwhile."""
    state.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with state.serve_lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"{state.dir}: `fleet serve` runs here; end it first") from None
        yield
