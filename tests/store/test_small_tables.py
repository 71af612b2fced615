"""The outbox, daemon keys, presence, repeated requests and counters."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import sqlalchemy as sa

from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.store import counters, daemon_keys, idempotency, outbox, presence
from orchestrator_fleet.store.database import Store
from orchestrator_fleet.store.idempotency import Answered
from orchestrator_fleet.store.presence import Presence
from orchestrator_fleet.store.schema import attempts, tasks
from orchestrator_fleet.store.schema import daemon_keys as keys_table

EVENT = outbox.Event(at_us=5, kind="apply_done", actor="k-1", machine="m1", data={"a": [1, None], "b": "ü"})
SHA = "a" * 64
HELLO = Presence(
    orchestrator="vp-a",
    machine="m1",
    boot="b1",
    epoch="e1",
    pid=1,
    generation="g1",
    charter_version="c1",
    sessions_max=2,
    sessions=("t1",),
    connected_at_us=10,
    last_seen_us=10,
)


def test_events_come_back_as_written_in_order_and_after_a_cursor(store: Store) -> None:
    """Seq grows by commit, and a reader takes up where it stopped."""
    store.write_sync(lambda c: outbox.append(c, EVENT, msgspec.structs.replace(EVENT, kind="second")))
    store.write_sync(lambda c: outbox.append(c, msgspec.structs.replace(EVENT, kind="third")))
    got = store.read_sync(lambda c: outbox.read_after(c, 0))
    assert [(e.seq, e.kind) for e in got] == [(1, "apply_done"), (2, "second"), (3, "third")]
    assert msgspec.structs.replace(got[0], seq=0) == EVENT
    assert [e.seq for e in store.read_sync(lambda c: outbox.read_after(c, 1, 1))] == [2]
    assert store.read_sync(outbox.last_seq) == 3


def test_an_undone_event_leaves_no_trace(store: Store) -> None:
    """Whoever reads on from what was read last meets only what stands."""

    def fail(conn: sa.Connection) -> None:
        outbox.append(conn, EVENT)
        raise LookupError

    store.write_sync(lambda c: outbox.append(c, EVENT))
    with pytest.raises(LookupError):
        store.write_sync(fail)
    store.write_sync(lambda c: outbox.append(c, msgspec.structs.replace(EVENT, kind="second")))
    assert [e.kind for e in store.read_sync(lambda c: outbox.read_after(c, 1))] == ["second"]
    assert len(store.read_sync(lambda c: outbox.read_after(c, 0))) == 2


def test_daemon_keys_are_registered_once_and_a_new_one_replaces_the_old(store: Store, url: str) -> None:
    """While another has the store open; nothing is written when nothing is new."""
    row = ("vp-a", "m1", "k-00000001", SHA)
    assert daemon_keys.register_daemon_keys(url, [row, ("vp-b", "m1", "k-00000002", SHA)]) == 2
    assert daemon_keys.register_daemon_keys(url, [row]) == 0
    assert daemon_keys.register_daemon_keys(url, []) == 0
    found = store.read_sync(lambda c: daemon_keys.find(c, "k-00000001"))
    assert found == daemon_keys.DaemonKeyRow(orchestrator="vp-a", machine="m1", key_id="k-00000001", sha256=SHA)
    assert daemon_keys.register_daemon_keys(url, [("vp-a", "m1", "k-00000003", SHA)]) == 1
    assert store.read_sync(lambda c: daemon_keys.find(c, "k-00000001")) is None
    assert store.read_sync(lambda c: daemon_keys.find(c, "k-none")) is None


def test_a_key_id_that_moves_to_another_machine_belongs_to_the_new_one(store: Store) -> None:
    """A key names one daemon."""
    store.write_sync(lambda c: daemon_keys.register(c, [("vp-a", "m1", "k-1", SHA)]))
    store.write_sync(lambda c: daemon_keys.register(c, [("vp-a", "m2", "k-1", SHA)]))
    assert store.read_sync(lambda c: c.execute(sa.select(keys_table.c.machine)).scalars().all()) == ["m2"]


def test_a_newer_connection_takes_the_place_and_late_words_of_the_old_change_nothing(store: Store) -> None:
    """The epoch decides."""
    store.write_sync(lambda c: presence.put(c, HELLO))
    newer = dataclasses.replace(HELLO, epoch="e2", last_seen_us=20)
    store.write_sync(lambda c: presence.put(c, newer))
    beat = {"orchestrator": "vp-a", "generation": "g2", "charter_version": "c2", "sessions_max": 3, "sessions": []}
    assert not store.write_sync(lambda c: presence.heard(c, **beat, epoch="e1", now_us=30))
    assert not store.write_sync(lambda c: presence.gone(c, orchestrator="vp-a", epoch="e1", now_us=30))
    assert store.read_sync(lambda c: presence.find(c, "vp-a")) == newer
    assert store.write_sync(lambda c: presence.heard(c, **beat, epoch="e2", now_us=40))
    assert store.write_sync(lambda c: presence.gone(c, orchestrator="vp-a", epoch="e2", now_us=50))
    (row,) = store.read_sync(presence.everybody)
    assert (row.last_seen_us, row.gone_at_us, row.sessions, row.generation) == (40, 50, (), "g2")
    assert store.read_sync(lambda c: presence.find(c, "vp-b")) is None


def test_a_repeated_request_gets_its_first_answer_and_a_different_one_is_refused(store: Store) -> None:
    """Per actor: another's key with the same text is another key."""
    answer = Answered(actor="k-1", key="x", fingerprint="f1", status=201, headers={"l": "/t"}, body="{}", at_us=10)
    store.write_sync(lambda c: idempotency.remember(c, answer))
    assert store.read_sync(lambda c: idempotency.find(c, actor="k-1", key="x", fingerprint="f1")) == answer
    assert store.read_sync(lambda c: idempotency.find(c, actor="k-2", key="x", fingerprint="f1")) is None
    with pytest.raises(Conflict, match="another request") as refused:
        store.read_sync(lambda c: idempotency.find(c, actor="k-1", key="x", fingerprint="f2"))
    assert refused.value.code == "idempotency_key_reused"
    assert store.write_sync(lambda c: idempotency.forget_old(c, now_us=11)) == 0
    assert store.write_sync(lambda c: idempotency.forget_old(c, now_us=10 + 86_401_000_000)) == 1


def test_counters_begin_at_zero(store: Store) -> None:
    """And keep what they are set to."""
    assert store.read_sync(lambda c: counters.get(c, "n")) == 0
    for value in (1, 7):
        store.write_sync(lambda c, v=value: counters.put(c, "n", v))
        assert store.read_sync(lambda c: counters.get(c, "n")) == value


TASK = {
    "id": "t",
    "title": "t",
    "description": "",
    "priority": "LOW",
    "status": "TODO",
    "tags": [],
    "depends_on": [],
    "metadata": {},
    "attempt": 0,
    "failures": 0,
    "max_attempts": 3,
    "created_by": "k",
    "created_at_us": 1,
    "updated_at_us": 1,
    "version": 1,
    "rank": 3,
    "due_key_us": 1,
    "waiting_since_us": 1,
}
RUNNING = {
    "status": "IN_PROGRESS",
    "token": "x",
    "lease_until_us": 9,
    "orchestrator": "vp",
    "started_at_us": 2,
    "attempt": 1,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "OPEN"},
        {"priority": "URGENT"},
        {"status": "BLOCKED"},
        {"status": "BLOCKED", "blocked_reason": "mood"},
        {"blocked_reason": "manual"},
        {"token": "x"},
        {"lease_until_us": 9},
        {"completed_at_us": 9},
        {"status": "DONE"},
        {"status": "CANCELLED"},
        {"rank": 4},
        {"rank": -1},
        {"failures": 1},
        {"max_attempts": 0},
        {"status": "DONE", "completed_at_us": 9, "wakes_at_us": 9},
        *({**RUNNING, column: None} for column in ("token", "lease_until_us", "orchestrator", "started_at_us")),
        {**RUNNING, "attempt": 0},
        {**RUNNING, "completed_at_us": 9},
        {**RUNNING, "ripens_at_us": 9},
    ],
    ids=str,
)
def test_the_schema_itself_refuses_a_row_that_can_not_be(store: Store, wrong: dict[str, object]) -> None:
    """Whatever the code above does: these rows never stand."""
    with pytest.raises(sa.exc.IntegrityError, match=r"(?i)check constraint"):
        store.write_sync(lambda c: c.execute(tasks.insert(), {**TASK, **wrong}))


@pytest.mark.parametrize(
    "right",
    [{}, RUNNING, {"status": "BLOCKED", "blocked_reason": "manual"}, {"status": "DONE", "completed_at_us": 9}],
    ids=str,
)
def test_the_schema_takes_rows_that_can_be(store: Store, right: dict[str, object]) -> None:
    """So the refusals above are not for another reason."""
    store.write_sync(lambda c: c.execute(tasks.insert(), {**TASK, **right}))


def test_an_attempt_belongs_to_a_task(store: Store) -> None:
    """Foreign keys are in force."""
    row = {"task": "none", "attempt": 1, "token": "x", "orchestrator": "v", "machine": "m", "holder": "h"}
    with pytest.raises(sa.exc.IntegrityError, match=r"(?i)foreign key"):
        store.write_sync(lambda c: c.execute(attempts.insert(), {**row, "started_at_us": 1}))
