"""An orchestrator's own key acts for that orchestrator alone, whatever it knows of others."""

from __future__ import annotations

from typing import Any

import pytest
from serving import ControlPlane


@pytest.fixture(autouse=True, scope="module")
def _writers(monkeypatch_module: pytest.MonkeyPatch) -> None:
    """Both orchestrators' keys may write tasks."""
    declare = ControlPlane.declare

    def with_write(self: ControlPlane, name: str, *, owner: str, scopes: list[str], **fields: str) -> None:
        declare(self, name, owner=owner, scopes=[*scopes, "tasks:write"] if ":" not in owner else scopes, **fields)

    monkeypatch_module.setattr(ControlPlane, "declare", with_write)


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    """A monkeypatch as old as the module."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def _forbidden(answer: Any) -> None:
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), answer.text


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("heartbeat", {}),
        ("progress", {"message": "m"}),
        ("complete", {"result": 1}),
        ("fail", {"error": {"message": "m"}}),
        ("release", {}),
    ],
)
def test_anothers_token_is_of_no_use(shared: ControlPlane, path: str, more: dict[str, Any]) -> None:
    """Its holder's key still does what the other's was refused."""
    shared.add(orchestrator="vp-b")
    (claimed,) = shared.poll("vp-b")
    task, body = claimed["task"]["id"], {"token": claimed["lease"]["token"], **more}
    _forbidden(shared.ask("POST", f"/api/tasks/{task}/{path}", key="vp-a", json=body))
    assert shared.task(task)["status"] == "IN_PROGRESS"
    assert shared.ask("POST", f"/api/tasks/{task}/{path}", key="vp-b", json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "", {"title": "mine now"}),
        ("DELETE", "", None),
        ("POST", "/cancel", {}),
        ("POST", "/retry", {}),
        ("POST", "/unblock", {}),
    ],
)
def test_anothers_task_is_not_its_to_change(
    shared: ControlPlane, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """It stays as it was; a person's key may."""
    task = shared.add(orchestrator="vp-b")
    _forbidden(shared.ask(method, f"/api/tasks/{task['id']}{path}", key="vp-a", json=body))
    assert shared.task(task["id"]) == task


def test_its_own_tasks_and_those_it_made_are_its_to_change(shared: ControlPlane) -> None:
    """Also when the one that it made went to another."""
    own = shared.add(orchestrator="vp-a")
    made = shared.json("POST", "/api/tasks", key="vp-a", code=201, json={"title": "t", "orchestrator": "vp-b"})
    for task in (own["id"], made["id"]):
        shared.json("PUT", f"/api/tasks/{task}", key="vp-a", json={"title": "another"})
        shared.json("DELETE", f"/api/tasks/{task}", key="vp-a", code=204)


def test_it_gives_tasks_away_by_delegating_only(shared: ControlPlane) -> None:
    """Assigning has no limits and asks nobody, so it is for people and services."""
    task = shared.add(orchestrator="vp-a")["id"]
    body = {"task_ids": [task], "orchestrator": "vp-b"}
    _forbidden(shared.ask("PUT", f"/api/tasks/{task}", key="vp-a", json={"orchestrator": "vp-b"}))
    _forbidden(shared.ask("POST", "/api/tasks/assign", key="vp-a", json=body))
    _forbidden(shared.ask("POST", "/api/tasks/bulk", key="vp-a", json={"action": "assign", **body}))
    assert shared.task(task)["orchestrator"] == "vp-a"


def test_in_bulk_others_tasks_are_refused_one_by_one(shared: ControlPlane) -> None:
    """Its own are done."""
    own, other = shared.add(orchestrator="vp-a")["id"], shared.add(orchestrator="vp-b")["id"]
    done = shared.json(
        "POST", "/api/tasks/bulk", key="vp-a", code=207, json={"action": "cancel", "task_ids": [own, other]}
    )
    assert [(one["id"], one.get("error", {}).get("code")) for one in done["results"]] == [
        (own, None),
        (other, "forbidden"),
    ]
    assert (shared.task(own)["status"], shared.task(other)["status"]) == ("CANCELLED", "TODO")


def test_a_poll_that_is_repeated_under_its_key_gets_the_same_tasks(shared: ControlPlane) -> None:
    """Whoever lost the answer loses no task to a lease; an answer without tasks is not kept."""
    headers = {"Idempotency-Key": "poll-1"}
    body = {"orchestrator": "vp-a", "limit": 2}
    while shared.poll("vp-a", limit=50):
        """Nothing of the others' tests is to be in the line."""
    empty = shared.json("POST", "/api/tasks/poll", json=body, headers=headers)
    assert empty["data"] == []
    tasks = {shared.add(orchestrator="vp-a")["id"] for _ in range(3)}
    first = shared.json("POST", "/api/tasks/poll", json=body, headers=headers)
    again = shared.json("POST", "/api/tasks/poll", json=body, headers=headers)
    assert again == first
    assert len(first["data"]) == 2
    other = shared.ask("POST", "/api/tasks/poll", json={**body, "limit": 3}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_key_reused")
    (last,) = shared.poll("vp-a", limit=5)
    assert {one["task"]["id"] for one in [*first["data"], last]} == tasks


def test_a_beat_that_is_repeated_under_its_key_answers_the_same(shared: ControlPlane) -> None:
    """As every write does."""
    shared.add(orchestrator="vp-b")
    (claimed,) = shared.poll("vp-b")
    path = f"/api/tasks/{claimed['task']['id']}/heartbeat"
    ask = {"json": {"token": claimed["lease"]["token"]}, "headers": {"Idempotency-Key": "beat-1"}}
    assert shared.json("POST", path, **ask) == shared.json("POST", path, **ask)


@pytest.mark.parametrize("path", ["approve", "unblock", "retry"])
def test_nobody_says_yes_to_himself(shared: ControlPlane, path: str) -> None:
    """What waits for somebody's approval waits for somebody else's."""
    task = shared.add(orchestrator="vp-a")["id"]
    shared.json("POST", "/api/vps/vp-a/escalate", key="vp-a", json={"task": task, "reason": "may I?"}, code=201)
    _forbidden(shared.ask("POST", f"/api/tasks/{task}/{path}", key="vp-a", json={}))
    bulk = {"action": "retry", "task_ids": [task]}
    (refused,) = shared.json("POST", "/api/tasks/bulk", key="vp-a", json=bulk, code=207)["results"]
    assert refused["error"]["code"] == "forbidden"
    assert shared.task(task)["blocked_reason"] == "escalation"
    shared.json("POST", f"/api/tasks/{task}/{path}", json={})


def test_whom_an_escalation_asks_may_answer_it_with_the_key_it_works_by(shared: ControlPlane) -> None:
    """And nobody else's key may, nor that one once it is not asked any more."""
    task = shared.add(orchestrator="vp-a")["id"]
    asked = {"task": task, "reason": "may I?", "to": "vp-b"}
    shared.json("POST", "/api/vps/vp-a/escalate", key="vp-a", json=asked, code=201)
    shared.daemon_key("vp-b")
    shared.json("POST", f"/api/tasks/{task}/approve", key="daemon:vp-b", json={"reason": "yes"})
    again = shared.ask("POST", f"/api/tasks/{task}/approve", key="daemon:vp-b", json={})
    assert (again.status_code, again.json()["code"]) == (403, "missing_scope")
