"""`POST /api/tasks/bulk`: many at once, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
from serving import ControlPlane
from test_tasks import NO_TASK, drain, fields, problem

MAX_BULK = 500


def bulk(plane: ControlPlane, action: str, *, code: int = 200, **body: Any) -> dict[str, Any]:
    """A bulk request's answer."""
    answer: dict[str, Any] = plane.json("POST", "/api/tasks/bulk", code=code, json={"action": action, **body})
    return answer


def statuses(plane: ControlPlane, tag: str) -> list[str]:
    found = plane.json("GET", f"/api/tasks?tag={tag}&sort=created_at&limit=100")["data"]
    return [task["status"] for task in found]


def test_those_that_match_are_cancelled_and_the_others_stay(shared: ControlPlane) -> None:
    """A filter without a status means open tasks; counts and results say what happened."""
    tasks = [shared.add(f"b{n}", tags=["bulk-1"], priority=("LOW", "HIGH")[n % 2]) for n in range(4)]
    shared.json("POST", f"/api/tasks/{tasks[0]['id']}/cancel")
    done = bulk(shared, "cancel", filter={"tag": "bulk-1", "priority": ["LOW"]}, reason="no need")
    assert {name: done[name] for name in ("matched", "changed", "failed", "left", "next_cursor", "dry_run")} == {
        "matched": 1,
        "changed": 1,
        "failed": 0,
        "left": 0,
        "next_cursor": None,
        "dry_run": False,
    }
    assert done["results"] == [{"id": tasks[2]["id"], "ok": True, "status": "CANCELLED", "changed": True}]
    assert statuses(shared, "bulk-1") == ["CANCELLED", "TODO", "CANCELLED", "TODO"]
    event = shared.json("GET", f"/api/tasks/{tasks[2]['id']}/events")["data"][-1]
    assert (event["kind"], event["data"]["reason"]) == ("task_cancelled", "no need")
    drain(shared)


def test_a_dry_run_says_what_would_happen_and_changes_nothing(shared: ControlPlane) -> None:
    """Not an event, not a version; the real one then answers the same."""
    tasks = [shared.add(f"d{n}", tags=["bulk-2"]) for n in range(2)]
    shared.json("POST", f"/api/tasks/{tasks[0]['id']}/cancel")
    ids = [task["id"] for task in tasks]
    before = [shared.task(task) for task in ids]
    dry = bulk(shared, "cancel", code=207, task_ids=ids, dry_run=True)
    assert [shared.task(task) for task in ids] == before
    assert len(shared.json("GET", f"/api/tasks/{ids[1]}/events")["data"]) == 1
    real = bulk(shared, "cancel", code=207, task_ids=ids)
    assert real["results"] == dry["results"]
    assert [(one["ok"], one.get("error", {}).get("code")) for one in real["results"]] == [
        (False, "invalid_transition"),
        (True, None),
    ]
    assert (real["changed"], real["failed"]) == (1, 1)


def test_dead_letters_are_redriven(shared: ControlPlane) -> None:
    """Retry with a filter means the blocked ones, and nothing that was done is done again."""
    task = shared.add("fragile", tags=["bulk-3"], orchestrator="vp-b", max_attempts=1)
    shared.add("fine", tags=["bulk-3"], orchestrator="vp-b", priority="LOW")
    for verb, body in (("fail", {"error": {"message": "no"}}), ("complete", {})):
        (grant,) = shared.poll("vp-b")
        shared.json("POST", f"/api/tasks/{grant['task']['id']}/{verb}", json={"token": grant["lease"]["token"], **body})
    assert [t["id"] for t in shared.json("GET", "/api/tasks?blocked_reason=attempts_exhausted&tag=bulk-3")["data"]] == [
        task["id"]
    ]
    redriven = bulk(shared, "retry", filter={"tag": "bulk-3"})
    assert redriven["results"] == [{"id": task["id"], "ok": True, "status": "TODO", "changed": True}]
    again = bulk(shared, "retry", filter={"tag": "bulk-3", "status": "DONE"})
    (made,) = again["results"]
    assert shared.task(made["task"])["parent"] == made["id"]
    drain(shared, "vp-b")


def test_assign_and_priority_take_what_they_need(shared: ControlPlane) -> None:
    """And change what they say."""
    task = shared.add("moved", tags=["bulk-4"])
    bulk(shared, "assign", filter={"tag": ["bulk-4"]}, orchestrator="vp-b")
    bulk(shared, "priority", task_ids=[task["id"]], priority="CRITICAL")
    moved = shared.task(task["id"])
    assert (moved["orchestrator"], moved["route"], moved["priority"]) == ("vp-b", "assigned", "CRITICAL")
    unchanged = bulk(shared, "priority", task_ids=[task["id"], task["id"]], priority="CRITICAL")
    assert (unchanged["matched"], unchanged["changed"]) == (1, 0)
    drain(shared, "vp-b")


def test_a_running_task_is_taken_from_its_holder(shared: ControlPlane) -> None:
    """As by cancel of one."""
    task = shared.add("runs", tags=["bulk-5"], orchestrator="vp-b")
    (grant,) = shared.poll("vp-b")
    bulk(shared, "cancel", filter={"tag": "bulk-5"})
    late = shared.ask("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})
    assert problem(late) == (409, "lease_lost")


def test_more_than_a_call_does_are_done_by_the_cursor(shared: ControlPlane) -> None:
    """Each call says what is left, and none is done twice."""
    many = MAX_BULK + 3
    for start in range(0, many, 100):
        for n in range(start, min(start + 100, many)):
            shared.add(f"m{n}", tags=["bulk-6"], orchestrator="vp-b")
    first = bulk(shared, "cancel", filter={"tag": "bulk-6"})
    assert (first["matched"], first["changed"], first["left"]) == (many, MAX_BULK, 3)
    second = bulk(shared, "cancel", filter={"tag": "bulk-6"}, cursor=first["next_cursor"])
    assert (second["matched"], second["changed"], second["left"], second["next_cursor"]) == (3, 3, 0, None)


def test_the_same_key_does_it_once(shared: ControlPlane) -> None:
    """The first answer again, though nothing matches any more."""
    shared.add("once", tags=["bulk-7"])
    body = {"action": "cancel", "filter": {"tag": "bulk-7"}}
    one, two = (
        shared.ask("POST", "/api/tasks/bulk", json=body, headers={"Idempotency-Key": "bulk-7"}) for _ in range(2)
    )
    assert (one.status_code, one.text) == (two.status_code, two.text)
    assert one.json()["changed"] == 1


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, {"action"}),
        ({"action": "purge", "task_ids": [NO_TASK]}, {"action"}),
        ({"action": "cancel"}, {"filter"}),
        ({"action": "cancel", "filter": {}}, {"filter"}),
        ({"action": "cancel", "filter": {"status": "TODO"}, "task_ids": [NO_TASK]}, {"filter"}),
        (
            {"action": "cancel", "filter": {"stauts": "TODO", "priority": ["URGENT"]}},
            {"filter.stauts", "filter.priority"},
        ),
        ({"action": "cancel", "filter": {"tag": "a\0"}}, {"filter.tag"}),
        ({"action": "cancel", "task_ids": []}, {"task_ids"}),
        ({"action": "cancel", "task_ids": [NO_TASK] * 501}, {"task_ids"}),
        ({"action": "cancel", "task_ids": [NO_TASK], "cursor": NO_TASK}, {"cursor"}),
        ({"action": "assign", "task_ids": [NO_TASK]}, {"orchestrator"}),
        ({"action": "assign", "task_ids": [NO_TASK], "orchestrator": "vp-none"}, {"orchestrator"}),
        ({"action": "priority", "task_ids": [NO_TASK], "orchestrator": "vp-a"}, {"orchestrator", "priority"}),
    ],
)
def test_a_wrong_request_is_refused_field_by_field(shared: ControlPlane, body: Any, wrong: set[str]) -> None:
    """422, and nothing is done."""
    answer = shared.ask("POST", "/api/tasks/bulk", json=body)
    assert {field.partition("[")[0] for field in fields(answer)} == wrong


def test_a_task_that_is_not_there_is_told_beside_the_others(shared: ControlPlane) -> None:
    """207."""
    answer = bulk(shared, "cancel", code=207, task_ids=[NO_TASK])
    assert answer["results"][0]["error"]["code"] == "not_found"


def test_it_needs_the_scope(shared: ControlPlane) -> None:
    """403."""
    body = {"action": "cancel", "task_ids": [NO_TASK]}
    assert problem(shared.ask("POST", "/api/tasks/bulk", key="tasks:read", json=body)) == (403, "missing_scope")
