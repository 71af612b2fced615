"""Escalating and collaborating over HTTP: a real control plane, its loop, and a daemon's link."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peer import connected
from serving import ControlPlane, until
from test_tasks import NO_TASK, drain, fields, problem

LADDERS = {
    "vp-a": "escalate_to: [vp-b, human:oncall], escalation_timeout: 1h",
    "vp-hasty": "escalate_to: [vp-b, vp-c], escalation_timeout: 300ms",
}


class Laddered(ControlPlane):
    """Some of its orchestrators escalate."""

    def write(self) -> None:
        """(Re)write fleet.yaml, with whom they escalate to."""
        super().write()
        file = self.home / "fleet.yaml"
        text = file.read_text()
        for name, ladder in LADDERS.items():
            text = text.replace(f"  {name}: {{charter", f"  {name}: {{{ladder}, charter")
        file.write_text(text)


def laddered(home: Path) -> Laddered:
    plane = Laddered(home)
    plane.orchestrators |= {"vp-c": "qa", "vp-hasty": "rush"}
    for name in ("vp-c", "vp-hasty"):
        plane.declare(name, owner=name, scopes=["tasks:work", "tasks:read"])
    plane.declare("vp-b:write", owner="vp-b", scopes=["tasks:write", "tasks:work"])
    plane.declare("vp-c:write", owner="vp-c", scopes=["tasks:write"])
    plane.write()
    return plane


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laddered]:
    """A running control plane with ladders."""
    plane = laddered(tmp_path_factory.mktemp("laddered") / "home")
    yield plane.start()  # type: ignore[misc]
    plane.close()


def escalate(plane: ControlPlane, task: str, vp: str = "vp-a", *, key: str = "admin", **more: Any) -> dict[str, Any]:
    body = {"task": task, "reason": "which one?", **more}
    answer: dict[str, Any] = plane.json("POST", f"/api/vps/{vp}/escalate", code=201, key=key, json=body)
    return answer


def collaborate(plane: ControlPlane, task: str, *names: str, vp: str = "vp-a", **more: Any) -> dict[str, Any]:
    body = {"task": task, "with": list(names), **more}
    answer: dict[str, Any] = plane.json("POST", f"/api/vps/{vp}/collaborate", code=201, json=body)
    return answer


def kinds(plane: ControlPlane, task: str) -> list[str]:
    return [event["kind"] for event in events(plane, task)]


def events(plane: ControlPlane, task: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = plane.json("GET", f"/api/tasks/{task}/events?limit=100")["data"]
    return found


def state(plane: ControlPlane, of: dict[str, Any]) -> str:
    one: str = plane.json("GET", f"/api/vps/{of['from']}/coordinations/{of['id']}")["state"]
    return one


def done(plane: ControlPlane, vp: str, result: Any = None) -> None:
    (grant,) = plane.poll(vp)
    body = {"token": grant["lease"]["token"], "result": result}
    plane.json("POST", f"/api/tasks/{grant['task']['id']}/complete", json=body)


def test_an_escalation_is_asked_told_and_decided_by_who_is_asked(plane: Laddered) -> None:
    """Its own key says yes; before it is written down, whoever looks sees it."""
    task = plane.add("choose", orchestrator="vp-a")["id"]
    asked = escalate(plane, task, key="vp-a", severity="CRITICAL")
    assert (asked["kind"], asked["state"], asked["from"], asked["to"]) == ("escalation", "pending", "vp-a", "vp-b")
    assert (asked["level"], asked["severity"], asked["reason"]) == (1, "CRITICAL", "which one?")
    assert asked["expires_at"] is not None
    assert (asked["task"]["id"], asked["task"]["blocked_reason"]) == (task, "escalation")
    held = plane.json("GET", f"/api/tasks/{task}/why")["binding"]
    assert (held["kind"], held["asked"], held["next_level_at"]) == ("escalation", "vp-b", asked["expires_at"])
    for key in ("vp-a", "vp-c:write"):
        assert plane.ask("POST", f"/api/tasks/{task}/approve", key=key).status_code == 403
    approved = plane.json("POST", f"/api/tasks/{task}/approve", key="vp-b:write", json={"reason": "the blue one"})
    assert approved["status"] == "TODO"
    assert state(plane, asked) == "accepted"
    until(lambda: "escalation_accepted" in kinds(plane, task), "the answer is told")
    told = events(plane, task)[-1]
    assert plane.declared[told["actor"]]["owner"] == "vp-b"
    assert told["data"]["reason"].endswith(": the blue one")
    drain(plane)
    until(lambda: state(plane, asked) == "done" and "escalation_done" in kinds(plane, task), "it is over")


def test_time_alone_asks_the_next(plane: Laddered) -> None:
    """Up to any person, whose yes is wanted."""
    task = plane.add("hurry", orchestrator="vp-hasty")["id"]
    asked = escalate(plane, task, "vp-hasty")
    until(lambda: "approval_wanted" in kinds(plane, task), "a person is asked")
    assert state(plane, asked) == "expired"
    found = plane.json("GET", "/api/vps/vp-hasty/coordinations?kind=escalation")["data"]
    assert [(one["to"], one["state"]) for one in found] == [(None, "pending"), ("vp-c", "expired"), ("vp-b", "expired")]
    held = plane.json("GET", f"/api/tasks/{task}/why")["binding"]
    assert (held["asked"], held["level"], held["next_level_at"]) == (None, 3, None)
    assert problem(plane.ask("POST", f"/api/tasks/{task}/approve", key="vp-b:write")) == (403, "forbidden")
    plane.json("POST", f"/api/tasks/{task}/reject", json={"reason": "no"})
    until(lambda: "escalation_rejected" in kinds(plane, task), "the no is told")
    (newest, *_) = plane.json("GET", "/api/vps/vp-hasty/coordinations?kind=escalation")["data"]
    assert newest["state"] == "rejected"
    assert newest["reason"].endswith(": no")


def test_a_running_session_is_told_to_stop(plane: Laddered) -> None:
    """Over its daemon's link, for an escalation and for a split; who is asked is told over its own."""

    async def scenario() -> None:
        ask = asyncio.to_thread
        async with connected(plane, "vp-a") as (owner, _), connected(plane, "vp-b") as (above, _):
            task = (await ask(plane.add, "runs", orchestrator="vp-a"))["id"]
            (grant,) = await owner.claim()
            await ask(escalate, plane, task)
            stopped = await owner.cancelled()
            assert (stopped.task, stopped.token) == (task, grant.token)
            while (notice := await above.told()).data["task"] != task:
                await above.noticed(notice)
            assert (notice.kind, notice.data["level"]) == ("escalation_pending", 1)
            await above.noticed(notice)
            await ask(plane.json, "POST", f"/api/tasks/{task}/unblock")
            (again,) = await owner.claim()
            await ask(lambda: collaborate(plane, task, "vp-b", mode="split"))
            stopped = await owner.cancelled()
            assert (stopped.task, stopped.token) == (task, again.token)
            (part,) = await above.claim()
            assert part.task["parent"] == task
            await ask(plane.json, "POST", f"/api/tasks/{part.task['id']}/cancel")
            await ask(plane.json, "POST", f"/api/tasks/{task}/cancel")

    asyncio.run(scenario())


def test_collaborators_get_children_and_their_results_come_back(plane: Laddered) -> None:
    """As events, and to the next session of the task, even when it is claimed the moment the last part ends."""
    task = plane.add("ship it", orchestrator="vp-a", priority="HIGH")["id"]
    with ThreadPoolExecutor(1) as pool:
        asked = collaborate(plane, task, "vp-c", "vp-b", mode="split", roles={"vp-c": "tests"}, note="by noon")
        assert (asked["mode"], asked["task"]["id"], asked["task"]["status"]) == ("split", task, "BLOCKED")
        parts = asked["collaborations"]
        assert [(one["to"], one["role"], one["note"]) for one in parts] == [
            ("vp-c", "tests", "by noon"),
            ("vp-b", None, "by noon"),
        ]
        assert {one["batch"] for one in parts} == {asked["id"]}
        assert asked["task"]["depends_on"] == [one["child"] for one in parts]
        child = plane.task(parts[0]["child"])
        assert (child["title"], child["priority"], child["parent"]) == ("Part of: ship it", "HIGH", task)
        waiting = pool.submit(plane.poll, "vp-a", wait=20)
        done(plane, "vp-c", {"passed": 3})
        done(plane, "vp-b", "fine")
        (grant,) = waiting.result(timeout=20)
    assert grant["task"]["id"] == task
    assert [(one["from"], one["role"], one["result"]) for one in grant["task"]["collaboration"]] == [
        ("vp-c", "tests", {"passed": 3}),
        ("vp-b", None, "fine"),
    ]
    until(lambda: "collaboration_gathered" in kinds(plane, task), "the results are gathered")
    gathered = next(event for event in events(plane, task) if event["kind"] == "collaboration_gathered")
    assert [one["result"] for one in gathered["data"]["results"]] == [{"passed": 3}, "fine"]
    plane.json("POST", f"/api/tasks/{task}/complete", json={"token": grant["lease"]["token"]})


def test_advice_lets_the_task_go_on(plane: Laddered) -> None:
    """The collaborator may say no by its own key, which the owner is told."""
    task = plane.add("think", orchestrator="vp-a")["id"]
    (grant,) = plane.poll("vp-a")
    (one,) = collaborate(plane, task, "vp-b")["collaborations"]
    assert plane.task(task)["status"] == "IN_PROGRESS"
    path = f"/api/orchestrators/vp-b/coordinations/{one['id']}"
    plane.json("POST", f"{path}/reject", key="vp-b", json={"reason": "no time"})
    assert state(plane, one) == "rejected"
    assert plane.task(one["child"])["status"] == "CANCELLED"
    assert kinds(plane, task)[-3:] == ["collaboration_rejected", "collaboration_answered", "collaboration_gathered"]
    assert events(plane, task)[-1]["data"]["results"][0]["error"] == "no time"
    assert problem(plane.ask("POST", f"{path}/reject", key="vp-b"))[0] == 409
    plane.json("POST", f"/api/tasks/{task}/complete", json={"token": grant["lease"]["token"]})


@pytest.mark.parametrize(
    ("path", "body", "wrong"),
    [
        ("escalate", {}, {"task", "reason"}),
        ("escalate", {"task": NO_TASK, "reason": "r", "to": "vp-none"}, {"task", "to"}),
        ("escalate", {"task": NO_TASK, "reason": "", "severity": "DIRE"}, {"reason", "severity"}),
        ("escalate", {"task": NO_TASK, "reason": "a\0b"}, {"reason"}),
        ("escalate", {"task": NO_TASK, "reason": "r", "to": "human:"}, {"to"}),
        ("escalate", {"task": NO_TASK, "reason": "r", "to": "human:me\n"}, {"to"}),
        ("escalate", {"task": "\0", "reason": "r", "tu": 1}, {"task", "tu"}),
        ("collaborate", {}, {"task", "with"}),
        ("collaborate", {"task": NO_TASK, "with": []}, {"with"}),
        ("collaborate", {"task": NO_TASK, "with": [f"vp-{n}" for n in range(11)]}, {"with"}),
        ("collaborate", {"task": NO_TASK, "with": ["vp-a", "vp-none"]}, {"task", "with[0]", "with[1]"}),
        ("collaborate", {"task": NO_TASK, "with": ["vp-b", "vp-b"], "mode": "advise"}, {"task", "with[1]"}),
        ("collaborate", {"task": NO_TASK, "with": ["vp-b"], "roles": {"vp-c": "r"}}, {"task", "roles.vp-c"}),
        ("collaborate", {"task": NO_TASK, "with": ["vp-b"], "roles": {"\0": "r"}}, {"task", "roles.\0"}),
        ("collaborate", {"task": NO_TASK, "with": ["vp-b"], "roles": {"vp-b": 7}, "mode": "x"}, {"roles[...]", "mode"}),
        ("collaborate", {"task": NO_TASK, "with": ["vp-b"], "with_": ["vp-b"]}, {"with_"}),
    ],
)
def test_every_wrong_field_is_told_at_once(plane: Laddered, path: str, body: Any, wrong: set[str]) -> None:
    """422, and nothing is left of it."""
    for base in ("/api/vps", "/api/orchestrators"):
        assert fields(plane.ask("POST", f"{base}/vp-a/{path}", json=body)) == wrong


@pytest.mark.parametrize("path", ["escalate", "collaborate"])
def test_who_may_not_ask_hears_nothing(plane: Laddered, path: str) -> None:
    """401, 403 before anything says what there is, 404, 409 for what is not the owner's."""
    task = plane.add("mine", orchestrator="vp-a")["id"]
    body = {"task": task, "reason": "r"} if path == "escalate" else {"task": task, "with": ["vp-c"]}
    url = f"/api/vps/vp-a/{path}"
    assert plane.ask("POST", url, key=None, json=body).status_code == 401
    for key in ("tasks:read", "tasks:work", "fleet:read"):
        assert problem(plane.ask("POST", url, key=key, json=body)) == (403, "missing_scope")
    for vp in ("vp-a", "vp-none"):
        other = plane.ask("POST", f"/api/vps/{vp}/{path}", key="vp-b:write", json=body)
        assert problem(other) == (403, "forbidden")
    assert problem(plane.ask("POST", f"/api/vps/vp-none/{path}", json=body)) == (404, "not_found")
    assert problem(plane.ask("POST", f"/api/vps/vp-b/{path}", json=body)) == (409, "not_owner")
    assert kinds(plane, task) == ["task_created"]
    plane.json("POST", f"/api/tasks/{task}/cancel")
    assert problem(plane.ask("POST", url, json=body)) == (409, "final")


def test_a_blocked_task_is_not_escalated_again(plane: Laddered) -> None:
    """409 with the legal ones."""
    task = plane.add("twice", orchestrator="vp-a")["id"]
    escalate(plane, task)
    again = plane.ask("POST", "/api/vps/vp-a/escalate", json={"task": task, "reason": "r"})
    assert problem(again) == (409, "invalid_transition")
    assert "TODO, CANCELLED" in again.json()["detail"]
    plane.json("POST", f"/api/tasks/{task}/cancel")


@pytest.mark.parametrize("path", ["escalate", "collaborate"])
def test_the_same_idempotency_key_asks_once(plane: Laddered, path: str) -> None:
    """Also eight at once; the same key with another body is refused."""
    task = plane.add("once", orchestrator="vp-a")["id"]
    body = {"task": task, "reason": "r"} if path == "escalate" else {"task": task, "with": ["vp-b", "vp-c"]}
    headers = {"Idempotency-Key": f"{path}-{task}"}

    def send(_: int) -> Any:
        return plane.json("POST", f"/api/vps/vp-a/{path}", code=201, json=body, headers=headers)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert len([kind for kind in kinds(plane, task) if kind.endswith("_pending")]) == (1 if path == "escalate" else 2)
    other = plane.ask("POST", f"/api/vps/vp-a/{path}", json={**body, "task": NO_TASK}, headers=headers)
    assert problem(other) == (409, "idempotency_key_reused")
    plane.json("POST", f"/api/tasks/{task}/cancel")
    for child in plane.json("GET", "/api/tasks?status=TODO&limit=100")["data"]:
        if child["parent"] == task:
            plane.json("POST", f"/api/tasks/{child['id']}/cancel")


def test_what_was_asked_outlives_a_kill(tmp_path: Path) -> None:
    """Time goes on while nobody serves: after it, the next is asked and the answers are told, each once."""
    plane = laddered(tmp_path / "home").start()
    try:
        hurry = plane.add("hurry", orchestrator="vp-hasty")["id"]
        ship = plane.add("ship", orchestrator="vp-a")["id"]
        split = collaborate(plane, ship, "vp-c", mode="split")
        escalate(plane, hurry, "vp-hasty", to="vp-c")
        done(plane, "vp-c", "fine")
        plane.stop(signal.SIGKILL)
        plane.start()
        until(lambda: "approval_wanted" in kinds(plane, hurry), "a person is asked")
        until(lambda: "collaboration_gathered" in kinds(plane, ship), "the results are gathered")
        assert kinds(plane, hurry).count("escalation_pending") == 2
        assert kinds(plane, ship).count("collaboration_answered") == 1
        assert state(plane, split["collaborations"][0]) == "done"
        (grant,) = plane.poll("vp-a")
        assert [one["result"] for one in grant["task"]["collaboration"]] == ["fine"]
    finally:
        plane.close()
