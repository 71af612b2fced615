"""`fleet store`: migrate, check, backup and restore, as a user runs them."""

from __future__ import annotations

import fcntl
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from command_line import Run

from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import REVISION


@pytest.fixture
def store_file(fleet_home: Path) -> Path:
    return fleet_home / ".fleet/store.sqlite"


def _tell(url: str) -> None:
    with closing(open_store(url)) as store:
        store.write_sync(lambda c: outbox.append(c, Event(at_us=1, kind="k", actor="k")))


@pytest.mark.usefixtures("fleet_home")
def test_a_store_is_made_backed_up_put_back_and_checked(run: Run, tmp_path: Path, store_file: Path) -> None:
    """Each step says what it did, in words and in JSON."""
    assert "it is not there" in run("store", "check", code=1).stderr
    assert run("store", "migrate").stdout == f"migrated from nothing to {REVISION}\n"
    assert json.loads(run("store", "migrate", "--json").stdout) == {"from": REVISION, "to": REVISION, "changed": False}
    assert run("store", "check").stdout == "ok\n"
    _tell(f"sqlite:///{store_file}")
    assert f"0 tasks, 1 event, revision {REVISION}" in run("store", "backup", "copy.sqlite").stdout
    assert "it is there already" in run("store", "backup", "copy.sqlite", code=3).stderr
    _tell(f"sqlite:///{store_file}")
    assert "--force" in run("store", "restore", "copy.sqlite", code=3).stderr
    told = json.loads(run("store", "restore", "copy.sqlite", "--force", "--json").stdout)
    assert (told["events"], Path(told["aside"]).parent) == (1, store_file.parent)
    assert json.loads(run("store", "check", "--json").stdout) == {"ok": True, "findings": []}
    assert not list(tmp_path.glob(".copy*"))


@pytest.mark.usefixtures("fleet_home")
def test_nothing_is_put_back_under_a_running_control_plane(run: Run, store_file: Path) -> None:
    """It holds the lock of its state folder."""
    run("store", "migrate")
    run("store", "backup", "copy.sqlite")
    with (store_file.parent / "serve.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "`fleet serve` runs here; end it first" in run("store", "restore", "copy.sqlite", code=3).stderr


@pytest.mark.usefixtures("fleet_home")
def test_what_is_wrong_is_told_and_the_exit_code_says_so(run: Run, store_file: Path) -> None:
    """A reference to nothing, made behind the store's back."""
    run("store", "migrate")
    with closing(sqlite3.connect(store_file)) as raw:
        raw.execute("INSERT INTO task_tags (tag, task) VALUES ('x', 'none')")
        raw.commit()
    assert "reference: task_tags: has a row without its tasks" in run("store", "check", code=1).stdout
    (finding,) = json.loads(run("store", "check", "--json", code=1).stdout)["findings"]
    assert finding["rule"] == "reference"


def test_fleet_store_in_the_environment_names_the_database(run: Run, fleet_home: Path, postgres_url: str) -> None:
    """Before what fleet.yaml says."""
    _tell(postgres_url)
    told = json.loads(run("store", "backup", "copy.sqlite", "--json", FLEET_STORE=postgres_url).stdout)
    assert told["events"] == 1
    assert run("store", "check", FLEET_STORE=postgres_url).stdout == "ok\n"
    rows = run("sql", "select kind from events", FLEET_STORE=postgres_url).stdout
    assert rows == "kind\nk\n"
    assert not (fleet_home / ".fleet/store.sqlite").exists()
