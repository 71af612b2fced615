"""kill -9 of whatever runs, at random, while tasks are worked."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from living_fleet import LivingFleet, living, until

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(300)]

TASKS = 40
CHAOS_S = 20.0
SEED = 20260101
VICTIMS = ("daemon", "daemon", "supervisord", "session", "session", "server")


@contextmanager
def running_fleet(home: Path, *, machines: int, per_machine: int) -> Iterator[LivingFleet]:
    """Applied, served and connected."""
    for fleet in living(home, machines=machines, per_machine=per_machine):
        fleet.make_key()
        fleet.fleet("apply", "--yes")
        fleet.serve()
        fleet.wait_online()
        yield fleet


def test_random_kills_lose_no_task_and_complete_none_twice(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Daemons, supervisords, sessions and the control plane die; apply and time mend all of it."""
    dice = random.Random(SEED)  # noqa: S311 - the same kills each time, as far as time allows
    with running_fleet(tmp_path / "home", machines=3, per_machine=2) as fleet:
        ids = [
            fleet.add_task(f"t{n}", discipline=f"d{n % 2 + 1}", metadata={"sleep_s": dice.uniform(0.1, 1.5)})["id"]
            for n in range(TASKS)
        ]
        kills = dict.fromkeys(VICTIMS, 0)
        end = time.monotonic() + CHAOS_S
        while time.monotonic() < end:
            victim = dice.choice(VICTIMS)
            kills[victim] += _kill(fleet, victim, dice)
        fleet.fleet("apply", "--yes")
        done = fleet.wait_done(ids, 120)
        assert {t["id"] for t in done} == set(ids)
        ends = fleet.json("sql", "select task, count(*) from events where kind = 'task_done' group by 1")["rows"]
        assert sorted(ends) == sorted([i, 1] for i in ids)
        fleet.fleet("plan", "--exit-code")
        until(lambda: not _sessions(fleet.home / "marks"), "no session is left", 20)
        record_property("kills", str(kills))
        assert all(kills.values()), kills


def _kill(fleet: LivingFleet, victim: str, dice: random.Random) -> bool:
    """Kill one of a kind and start again what nobody else starts; whether there was one to kill."""
    if victim == "server":
        fleet.kill_server()
        fleet.serve()
        return True
    pids = {
        "daemon": lambda: list(fleet.programs().values()),
        "supervisord": lambda: [pid for pid in fleet.supervisords().values() if pid],
        "session": lambda: _sessions(fleet.home / "marks"),
    }[victim]()
    if not pids:
        return False
    try:
        os.kill(dice.choice(pids), signal.SIGKILL)
    except ProcessLookupError:
        return False
    if victim == "supervisord":
        fleet.fleet("apply", "--yes")
    return True


def _sessions(marks: Path) -> list[int]:
    """Pids of sessions that have started and not ended, and still live."""
    alive = []
    for started in marks.glob("started-*"):
        if (marks / started.name.replace("started-", "ended-")).exists():
            continue
        try:
            pid = int(started.read_text() or 0)
            if pid and b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                alive.append(pid)
        except OSError:
            continue
    return alive


def test_the_control_plane_answers_after_each_of_ten_kills(tmp_path: Path) -> None:
    """Killed as soon as it is ready, ten times in a row: it starts at once, and knows its key."""
    with running_fleet(tmp_path / "home", machines=1, per_machine=1) as fleet:
        for _ in range(10):
            fleet.kill_server()
            fleet.serve()
            assert httpx.get(f"{fleet.url}/healthz", timeout=5).status_code == 200
            assert fleet.http("GET", "/api/tasks")["data"] == []
