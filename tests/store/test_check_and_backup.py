"""What `fleet store` does: find what contradicts itself, copy a store while it is used, and put a copy back."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from orchestrator_fleet.errors import Refused, StoreDamaged, StoreError
from orchestrator_fleet.store import backup, check, migrate, outbox
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import (
    REVISION,
    attempt_log,
    attempts,
    events,
    metadata,
    task_dependencies,
    task_tags,
    tasks,
)

TASK = {
    "title": "t",
    "description": "ü\n",
    "priority": "LOW",
    "status": "TODO",
    "tags": [],
    "depends_on": [],
    "metadata": {"a": [1, None]},
    "attempt": 0,
    "failures": 0,
    "max_attempts": 3,
    "created_by": "k",
    "created_at_us": 1,
    "updated_at_us": 1,
    "version": 1,
    "rank": 3,
    "due_key_us": 2**62,
    "waiting_since_us": 1,
}
RUNNING = {
    "status": "IN_PROGRESS",
    "token": "x",
    "lease_until_us": 9,
    "orchestrator": "v",
    "started_at_us": 2,
    "attempt": 1,
}
ATTEMPT = {"attempt": 1, "token": "x", "orchestrator": "v", "machine": "m", "holder": "h", "started_at_us": 2}
BLOCKED = {"status": "BLOCKED", "blocked_reason": "dependency"}
EVENT = Event(at_us=1, kind="k", actor="k", data={"n": 1})


def _put(conn: sa.Connection, task_id: str, **fields: Any) -> None:
    conn.execute(tasks.insert(), {**TASK, "id": task_id, **fields})


def _fill(conn: sa.Connection) -> None:
    """A small sound store: one of everything that refers to something."""
    _put(conn, "a", tags=["x", "y"])
    _put(conn, "b", **RUNNING)
    _put(conn, "c", **BLOCKED, depends_on=["a", "b"])
    conn.execute(attempts.insert(), {**ATTEMPT, "task": "b"})
    conn.execute(task_tags.insert(), [{"task": "a", "tag": tag} for tag in ("x", "y")])
    conn.execute(task_dependencies.insert(), [{"task": "c", "depends_on": one} for one in ("a", "b")])
    log = {"task": "b", "attempt": 1, "at_us": 1, "stream": "stdout", "byte_offset": 0, "text": "said"}
    conn.execute(attempt_log.insert(), log)
    outbox.append(conn, EVENT, EVENT)


def _found(url: str) -> list[str]:
    with check.looking(url) as conn:
        return [str(one) for one in check.examine(conn)]


def _rows(conn: sa.Connection) -> dict[str, list[Any]]:
    return {
        table.name: sorted(map(tuple, conn.execute(sa.select(table)).all()), key=repr)
        for table in metadata.sorted_tables
    }


def _circle(conn: sa.Connection) -> None:
    for one, other in (("d", "e"), ("e", "f"), ("f", "d")):
        _put(conn, one, **BLOCKED, depends_on=[other])
    conn.execute(
        task_dependencies.insert(), [{"task": a, "depends_on": b} for a, b in (("d", "e"), ("e", "f"), ("f", "d"))]
    )


def test_a_sound_store_has_nothing_wrong(store: Store, url: str) -> None:
    """Empty, and with one of everything."""
    assert _found(url) == []
    store.write_sync(_fill)
    assert _found(url) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda c: c.execute(attempts.delete()), "running: task b: is in progress without an open attempt"),
        (lambda c: _end(c, "b"), "running: attempt b 1: is open"),
        (
            lambda c: c.execute(attempts.insert(), {**ATTEMPT, "task": "a"}),
            "attempts: attempt a 1: has a greater number",
        ),
        (
            lambda c: (_end(c, "a"), _end(c, "b")),
            "dependencies: task c: waits for dependencies, and all of them are done",
        ),
        (lambda c: c.execute(task_dependencies.delete()), "dependencies: task c: lists other depends_on"),
        (lambda c: c.execute(task_tags.delete()), "tags: task a: lists other tags"),
        (lambda c: c.execute(task_tags.insert(), {"task": "c", "tag": "z"}), "tags: task c: lists other tags"),
        (_circle, "dependencies: task e: waits for itself"),
    ],
    ids=lambda one: one[:30] if isinstance(one, str) else "",
)
def test_each_contradiction_is_found(store: Store, url: str, wrong: Callable[[sa.Connection], Any], told: str) -> None:
    """By name, with the task."""
    store.write_sync(_fill)
    store.write_sync(wrong)
    assert any(one.startswith(told) for one in _found(url)), _found(url)


def _end(conn: sa.Connection, task_id: str) -> None:
    done = {"status": "DONE", "completed_at_us": 9, "token": None, "lease_until_us": None}
    conn.execute(tasks.update().where(tasks.c.id == task_id), done)


def test_an_old_schema_is_told_and_left_as_it_is(store: Store, url: str) -> None:
    """Looking migrates nothing."""
    store.write_sync(lambda c: c.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'"))
    assert _found(url) == [f"schema: store: is at revision 0001, wanted {REVISION}; run `fleet store migrate`"]
    assert store.read_sync(migrate.revision) == "0001"


def test_a_backup_holds_every_row_and_is_a_store_of_its_own(store: Store, url: str, tmp_path: Path) -> None:
    """One file, its owner's alone; a second one does not take its place."""
    store.write_sync(_fill)
    file = tmp_path / "deep/backup.sqlite"
    made = backup.backup(url, file)
    assert (made.tasks, made.events, made.revision) == (3, 2, REVISION)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["backup.sqlite"]
    with closing(open_store(f"sqlite:///{file}")) as copy:
        assert copy.read_sync(_rows) == store.read_sync(_rows)
    with pytest.raises(Refused, match="it is there already"):
        backup.backup(url, file)


def test_a_backup_taken_while_others_write_is_one_moment(store: Store, url: str, tmp_path: Path) -> None:
    """Two rows that are always written together are in it together."""
    end = threading.Event()

    def write_on() -> None:
        n = 0
        while not end.is_set():
            n += 1
            store.write_sync(lambda c, n=n: (_put(c, f"a{n}"), outbox.append(c, EVENT)))

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        made = [backup.backup(url, tmp_path / f"backup{n}.sqlite") for n in range(5)]
    finally:
        end.set()
        writer.join(30)
    assert [one.tasks for one in made] == [one.events for one in made]
    assert made[-1].tasks > 0


def test_a_store_is_put_back_as_it_was_and_goes_on(store: Store, url: str, tmp_path: Path) -> None:
    """What came after the backup is gone from it, and kept aside; numbers go on after the last."""
    store.write_sync(_fill)
    before = store.read_sync(_rows)
    file, aside = tmp_path / "backup.sqlite", tmp_path / "aside.sqlite"
    backup.backup(url, file)
    store.write_sync(lambda c: _put(c, "later"))
    store.close()
    with pytest.raises(Refused, match="--force"):
        backup.restore(file, url, force=False, aside=aside)
    assert backup.restore(file, url, force=True, aside=aside).aside == aside
    assert backup.look_at(aside).tasks == 4
    with closing(open_store(url)) as again:
        assert again.read_sync(_rows) == before
        again.write_sync(lambda c: outbox.append(c, EVENT))
        assert again.read_sync(outbox.last_seq) == 3
    assert _found(url) == []


def test_a_backup_of_an_older_version_is_brought_to_this_one(store: Store, url: str, tmp_path: Path) -> None:
    """And the file itself stays what it was."""
    file = tmp_path / "old.sqlite"
    engine = sa.create_engine(f"sqlite:///{file}")
    with engine.begin() as conn:
        migrate.upgrade(conn, None, to="0001")
        conn.exec_driver_sql("INSERT INTO counters VALUES ('round', 7)")
    engine.dispose()
    store.close()
    backup.restore(file, url, force=False, aside=tmp_path / "aside")
    with closing(open_store(url)) as again:
        assert again.read_sync(_rows)["counters"] == [("round", 7)]
    assert backup.look_at(file).revision == "0001"


def test_a_backup_goes_into_the_other_kind_of_store(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """From a file to PostgreSQL and back."""
    postgres_url = request.getfixturevalue("postgres_url")
    first, second = f"sqlite:///{tmp_path}/first.sqlite", f"sqlite:///{tmp_path}/second.sqlite"
    with closing(open_store(first)) as store:
        store.write_sync(_fill)
        rows = store.read_sync(_rows)
    for source, target in ((first, postgres_url), (postgres_url, second)):
        file = tmp_path / f"{sa.make_url(source).get_backend_name()}.backup"
        backup.backup(source, file)
        backup.restore(file, target, force=False, aside=tmp_path / "aside")
    with closing(open_store(second)) as store:
        assert store.read_sync(_rows) == rows


def test_a_store_in_use_is_not_replaced(store: Store, url: str, tmp_path: Path) -> None:
    """Whoever uses it would work on a file that nobody finds."""
    store.write_sync(_fill)
    file = tmp_path / "backup.sqlite"
    backup.backup(url, file)
    store.listen(lambda: None)
    if url.startswith("postgresql"):
        assert _until(lambda: not store.read_sync(_alone))
    with pytest.raises(Refused, match="end"):
        backup.restore(file, url, force=True, aside=tmp_path / "aside")
    assert store.read_sync(_rows)["tasks"]


def _alone(conn: sa.Connection) -> bool:
    return backup.locks.alone(conn)


def _until(condition: Callable[[], bool]) -> bool:
    wait = threading.Event()
    return any(condition() or wait.wait(0.05) for _ in range(200))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A store's file with rubbish in its middle."""
    path = tmp_path / "damaged.sqlite"
    with closing(open_store(f"sqlite:///{path}")) as store:
        for n in range(200):
            store.write_sync(lambda c, n=n: _put(c, f"t{n}"))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(data)
    return path


def test_damage_is_found_and_a_damaged_backup_is_not_put_back(damaged: Path, tmp_path: Path) -> None:
    """What stands stays."""
    found = _found(f"sqlite:///{damaged}")
    assert found[0].startswith("integrity: file: ")
    assert "fleet store restore" in found[0]
    target = f"sqlite:///{tmp_path}/store.sqlite"
    with pytest.raises(StoreDamaged, match="can't be trusted"):
        backup.restore(damaged, target, force=True, aside=tmp_path / "aside")
    assert not (tmp_path / "store.sqlite").exists()


def test_a_damaged_store_is_put_aside_for_a_sound_backup(damaged: Path, tmp_path: Path) -> None:
    """As the message of the damaged one says."""
    good, file = f"sqlite:///{tmp_path}/good.sqlite", tmp_path / "backup.sqlite"
    with closing(open_store(good)) as store:
        store.write_sync(_fill)
    backup.backup(good, file)
    with pytest.raises(Refused, match="--force"):
        backup.restore(file, f"sqlite:///{damaged}", force=False, aside=tmp_path / "aside")
    backup.restore(file, f"sqlite:///{damaged}", force=True, aside=tmp_path / "aside")
    assert _found(f"sqlite:///{damaged}") == []
    assert (tmp_path / "aside").exists()


def test_what_is_no_store_is_no_backup(tmp_path: Path) -> None:
    """Another program's database, or no database at all."""
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as raw:
        raw.execute("CREATE TABLE recipes (name TEXT)")
    (tmp_path / "text").write_text("hello" * 1000)
    for file in (other, tmp_path / "text", tmp_path / "none"):
        with pytest.raises(StoreError):
            backup.restore(file, f"sqlite:///{tmp_path}/store.sqlite", force=False, aside=tmp_path / "aside")
    assert events.name not in (tmp_path / "store.sqlite").name
