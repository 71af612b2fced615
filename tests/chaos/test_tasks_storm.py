"""Workers, daemons, sessions and control planes killed at random while clocks jump: no task lost, none done twice.

FLEET_STORM_S makes it last longer than the suite has time for, FLEET_STORM_SEED makes it another one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import audit
import pytest
import sqlalchemy as sa
from living_fleet import until
from storm import LIBFAKETIME, Creators, Storm, storm

from orchestrator_fleet.store.schema import attempts, tasks

SHORT_S = 12.0
STORM_S = float(os.environ.get("FLEET_STORM_S", SHORT_S))
SEED = int(os.environ.get("FLEET_STORM_SEED", "20260101"))
DRAIN_S = 75.0
TASKS_PER_S = 12
POLLERS = {"vp-a": 6, "vp-b": 5, "vp-c": 5}
DAEMONS = ("vp-d1", "vp-d2")
LIMITS = "limits: [{name: per-repo, key: task.metadata.repo, max_running: 3}]\n"
MAX_RUNNING = {"repo": 3}

pytestmark = pytest.mark.timeout(STORM_S + DRAIN_S + 120)


def test_a_storm_of_kills_loses_no_task_and_completes_none_twice(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Everything there is gets kill -9, over and over; then all is done once, by the events and by the ledger."""
    with storm(tmp_path, pollers=POLLERS, daemons=DAEMONS, seed=SEED, extra=LIMITS) as one:
        _rage(one, {"poller": 12, "daemon": 2, "session": 3, "server": 2}, record_property)


@pytest.mark.skipif(LIBFAKETIME is None, reason="clocks can't be moved without libfaketime: apt-get install faketime")
def test_a_storm_in_which_clocks_jump_loses_no_task_and_completes_none_twice(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The same while the control plane's clock is set forward and back, by seconds and by an hour."""
    with storm(tmp_path, pollers=POLLERS, daemons=DAEMONS, seed=SEED + 1, extra=LIMITS, clocks_move=True) as one:
        # A control plane that starts anew holds all leases for a while, which the short form has no time for.
        servers = {"server": 2} if STORM_S > SHORT_S else {}
        _rage(one, {"poller": 8, "daemon": 1, "session": 2, "clock": 5, **servers}, record_property)


def test_a_storm_over_two_control_planes_on_postgresql_loses_no_task(
    tmp_path: Path, postgres_url: str, record_property: Callable[[str, object], None]
) -> None:
    """Two of them on one database, killed in turn: the other goes on, and all is done exactly once."""
    with storm(
        tmp_path, pollers=POLLERS, daemons=DAEMONS, seed=SEED + 2, stores=[postgres_url] * 2, extra=LIMITS
    ) as one:
        _rage(one, {"poller": 12, "daemon": 2, "session": 3, "server": 2}, record_property)


def _rage(one: Storm, weights: dict[str, int], record_property: Callable[[str, object], None]) -> None:
    strike = {
        "poller": one.kill_poller,
        "daemon": one.kill_daemon,
        "session": one.kill_session,
        "server": one.kill_server,
        "clock": one.jump,
    }
    many = round(STORM_S * TASKS_PER_S)
    creators = Creators(one, many=many, over_s=STORM_S * 0.9)
    end = time.monotonic() + STORM_S
    # Each kind at least once, however short the storm.
    due = list(weights)
    while time.monotonic() < end or due:
        victim = due.pop() if due else one.dice.choices(list(weights), list(weights.values()))[0]
        strike[victim]()
        one.done[victim] += 1
        _check_open(one)
        time.sleep(one.dice.uniform(0.02, 0.25))
    creators.join(DRAIN_S)
    began = time.monotonic()
    try:
        until(lambda: not _open(one), f"{many} tasks are done", DRAIN_S)
    except AssertionError as late:
        raise AssertionError(f"{late}; left: {_left(one)}; daemons: {one.autopsy()}") from None
    drained_s = time.monotonic() - began
    events, lines = one.events(), one.lines()
    wrong = audit.of_events(events, max_running=MAX_RUNNING) + audit.of_ledger(lines, events)
    assert not wrong, "\n".join(wrong[:20])
    made = {event.task: event.data["task"]["title"] for event in events if event.kind == "task_created"}
    assert {title: task for task, title in made.items()} == one.created, "a task was lost, or made twice"
    assert len(made) == many
    assert {event.task for event in events if event.kind == "task_done"} == set(made)
    rescues = audit.rescues_s(lines, one.killed_at)
    told = {
        "tasks": many,
        "strikes": dict(one.done),
        "claims": sum(event.kind == "task_claimed" for event in events),
        "leases lost": sum(event.kind == "lease_expired" for event in events),
        "drained_s": round(drained_s, 1),
        "rescues": len(rescues),
        "rescue_median_s": round(statistics.median(rescues), 1) if rescues else None,
        "rescue_max_s": round(max(rescues), 1) if rescues else None,
    }
    record_property("storm", str(told))
    print("storm:", told)  # noqa: T201 - the figures are why the long form is run


def _open(one: Storm) -> int:
    """How many tasks have not ended."""
    query = sa.select(sa.func.count()).select_from(tasks).where(tasks.c.status.notin_(["DONE", "CANCELLED"]))
    found: int = one.read(lambda conn: conn.execute(query).scalar_one())
    return found


def _left(one: Storm) -> list[dict[str, object]]:
    """What has not ended, with all that may hold it."""
    query = sa.select(tasks).where(tasks.c.status.notin_(["DONE", "CANCELLED"])).limit(10)
    found = one.read(lambda conn: conn.execute(query).mappings().all())
    return [{name: value for name, value in row.items() if value not in (None, "", [], {})} for row in found]


def _check_open(one: Storm) -> None:
    """At any moment: what runs has a lease and one open attempt under its token, and nothing else has one."""
    running = sa.select(tasks.c.id, tasks.c.token).where(tasks.c.status == "IN_PROGRESS")
    tried = sa.select(attempts.c.task, attempts.c.token).where(attempts.c.ended_at_us.is_(None))
    run, trying = one.read(lambda conn: (conn.execute(running).all(), conn.execute(tried).all()))
    assert sorted(map(tuple, run)) == sorted(map(tuple, trying))
