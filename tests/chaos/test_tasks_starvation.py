"""A LOW task under an endless stream of more urgent ones is done all the same: once it has waited long enough."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from desk import Desk
from living_fleet import until
from serving import ControlPlane
from storm import LIBFAKETIME, MovedClock, Server

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.store.database import open_store

HOUR_S = 3600
BACKLOG = 5
CLASSES_BELOW = {"MEDIUM": 1, "HIGH": 2, "CRITICAL": 3}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A desk on a store of its own; its clock moves when told."""
    store = open_store(f"sqlite:///{tmp_path}/store.sqlite")
    yield Desk(store)
    store.close()


@pytest.mark.parametrize("urgent", list(CLASSES_BELOW))
def test_low_is_done_after_a_day_for_each_class_above_it_however_many_come(desk: Desk, urgent: str) -> None:
    """Every half hour one more comes and one is done, for four days: LOW is the first that is older than its class."""
    low = desk.make("low", priority="LOW")
    for _ in range(BACKLOG):
        desk.make("urgent", priority=urgent)
    began, done_after_h = desk.now, None
    for _ in range(4 * 24 * 2):
        desk.clock.advance(HOUR_S / 2)
        desk.make("urgent", priority=urgent)
        (grant,) = desk.claim()
        desk.finish(grant)
        if grant.task.id == low.id:
            done_after_h = (desk.now - began) / 1e6 / HOUR_S
            break
    assert done_after_h is not None, "LOW was never done"
    assert 24 * CLASSES_BELOW[urgent] <= done_after_h <= 24 * CLASSES_BELOW[urgent] + 1


def test_a_low_task_keeps_its_age_through_a_failure(desk: Desk) -> None:
    """What was waited is not lost by a try that failed: it does not begin at the end of the line again."""
    low = desk.make("low", priority="LOW")
    (grant,) = desk.claim()
    desk.finish(grant, "failed")
    desk.clock.advance(49 * HOUR_S)
    for _ in range(BACKLOG):
        desk.make("urgent", priority="HIGH")
    assert desk.claim()[0].task.id == low.id


@pytest.mark.skipif(LIBFAKETIME is None, reason="clocks can't be moved without libfaketime: apt-get install faketime")
def test_a_served_fleet_lets_low_through_when_days_have_passed(tmp_path: Path) -> None:
    """The same through the doors, on a control plane whose clock is set forward by days."""
    plane = ControlPlane(tmp_path / "home")
    clock = MovedClock(tmp_path / "clock", moves=True)
    server = Server(plane=plane, clock=clock, state=plane.home / ".fleet-0", port=plane.port)
    server.state.mkdir()
    server.start()
    bearer = {"Authorization": f"Bearer {plane.keys['admin']}"}
    try:
        server.wait()
        http = httpx.Client(base_url=f"{plane.url}/api", headers=bearer, timeout=30)

        def post(path: str, **body: Any) -> Any:
            answer = http.post(path, json=body)
            assert answer.is_success, answer.text
            return answer.json()

        streams = {"vp-a": "HIGH", "vp-b": "CRITICAL"}
        low = {name: post("/tasks", title="low", orchestrator=name, priority="LOW")["id"] for name in streams}
        for name, urgent in streams.items():
            for _ in range(BACKLOG):
                post("/tasks", title="urgent", orchestrator=name, priority=urgent)
        for hours, through in ((23, []), (47, []), (49, ["vp-a"]), (71, ["vp-a"]), (73, ["vp-a", "vp-b"])):
            clock.move_to(hours * HOUR_S)
            soon = to_rfc3339(int((time.time() + hours * HOUR_S - 60) * 1e6))
            probe = {"title": "what is the time", "orchestrator": "vp-a", "available_at": "2100-01-01T00:00:00Z"}
            until(
                lambda soon=soon, probe=probe: post("/tasks", **probe)["created_at"] > soon,
                f"it is {hours} h later",
                15,
            )
            for name, urgent in streams.items():
                # Those that waited as long come first: they have risen as well.
                for _ in range(BACKLOG + 2):
                    post("/tasks", title="urgent", orchestrator=name, priority=urgent)
                    (grant,) = plane.poll(name)
                    path = f"/api/tasks/{grant['task']['id']}/complete"
                    plane.json("POST", path, json={"token": grant["lease"]["token"]})
            done = [name for name, task in low.items() if http.get(f"/tasks/{task}").json()["status"] == "DONE"]
            assert done == through, f"after {hours} h"
    finally:
        server.end()
