"""What a running control plane does by itself when its rules change, and when a schedule's moment comes."""

from __future__ import annotations

from typing import Any

from serving import ControlPlane, until

from orchestrator_fleet.clock import SECOND_US, SystemClock
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import schedules
from orchestrator_fleet.tasks.dispatch import Dispatch

SCHEDULES = """\
schedules:
  hourly: {cron: "0 * * * *", timezone: Europe/Berlin, task: {title: Triage, priority: LOW}}
  yearly: {cron: "0 0 1 1 *", task: {title: Never today}}
"""


def events(plane: ControlPlane, task: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = plane.json("GET", f"/api/tasks/{task['id']}/events")["data"]
    return found


def test_waiting_tasks_follow_the_rules_and_running_ones_stay(control_plane: ControlPlane) -> None:
    """After an apply, and after one that was made while nobody served."""
    control_plane.start()
    runs = control_plane.add("runs")
    assert [one["task"]["id"] for one in control_plane.poll()] == [runs["id"]]
    waits, named = control_plane.add("waits"), control_plane.add("named", orchestrator="vp-a")
    control_plane.routing = "  - {name: all-to-b, to: {orchestrator: vp-b}}\n"
    control_plane.write()
    control_plane.publish()
    until(lambda: control_plane.task(waits["id"])["orchestrator"] == "vp-b", "it goes where the rules say")
    assert control_plane.task(waits["id"])["route"] == "all-to-b"
    assert [control_plane.task(one["id"])["orchestrator"] for one in (runs, named)] == ["vp-a", "vp-a"]
    assert events(control_plane, waits)[-1]["kind"] == "task_routed"
    control_plane.stop()
    control_plane.routing = "  - {name: back-to-a, to: {orchestrator: vp-a}}\n"
    control_plane.write()
    control_plane.publish()
    control_plane.start()
    until(lambda: control_plane.task(waits["id"])["route"] == "back-to-a", "it goes where the rules say")


def test_a_task_that_nobody_gets_is_routed_when_a_rule_appears(control_plane: ControlPlane) -> None:
    """It waits, with a condition, until then."""
    control_plane.routing = '  - {name: sec, when: task.discipline == "sec", to: {orchestrator: vp-b}}\n'
    control_plane.write()
    control_plane.start()
    task = control_plane.add("anything")
    assert (task["orchestrator"], task["status"]) == (None, "TODO")
    control_plane.routing += "  - {name: rest, to: {orchestrator: vp-a}}\n"
    control_plane.write()
    control_plane.publish()
    until(lambda: control_plane.task(task["id"])["orchestrator"] == "vp-a", "somebody gets it")


def test_a_missed_moment_of_a_schedule_is_caught_up_with_at_the_start(control_plane: ControlPlane) -> None:
    """By the last of them, once; and not again after another start."""
    control_plane.routing += SCHEDULES
    control_plane.write()
    spec = load_fleet(control_plane.home / "fleet.yaml").file.model_dump(mode="json", by_alias=True)
    control_plane.state.mkdir(exist_ok=True)
    store = open_store(control_plane.store)
    seen_us = SystemClock().now_us() - 3 * 3600 * SECOND_US
    for schedule in schedules.schedules_of(spec):
        store.write_sync(
            lambda c, one=schedule: schedules.fire(c, schedule=one, dispatch=Dispatch.of_spec(spec), now_us=seen_us)
        )
    store.close()

    def made() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = control_plane.json("GET", "/api/tasks")["data"]
        return found

    control_plane.start()
    until(made, "the schedule makes its task")
    control_plane.stop()
    control_plane.start()
    control_plane.add("another")
    (task,) = [task for task in made() if task["title"] != "another"]
    assert (task["title"], task["priority"], task["created_by"]) == ("Triage", "LOW", "schedule:hourly")
    assert (task["orchestrator"], task["route"]) == ("vp-a", "rest")
    control_plane.stop()
    assert "can't be followed" not in control_plane.log
