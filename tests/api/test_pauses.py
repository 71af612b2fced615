"""Pausing orchestrators, approving tasks, why tasks wait: over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from peer import connected
from serving import ControlPlane, until
from test_tasks import NO_TASK, drain, fields, problem

from orchestrator_fleet.clock import SystemClock
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life

LIMITS = "limits:\n  - {name: one-per-repo, key: task.metadata.repo, max_running: 1}\n"


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running control plane with a limit."""
    plane = ControlPlane(tmp_path_factory.mktemp("limited") / "home")
    plane.routing += LIMITS
    plane.orchestrators["vp-unheard"] = "none"
    plane.declare("fleet:write", owner="person:me", scopes=["fleet:write"])
    plane.declare("vp-pauser", owner="vp-a", scopes=["fleet:write", "tasks:write"])
    plane.write()
    yield plane.start()
    plane.close()


def block(plane: ControlPlane, task: dict[str, Any], reason: Any) -> None:
    """Let a task wait for somebody, as no route does yet."""
    store = open_store(plane.store)
    now_us = SystemClock().now_us()
    store.write_sync(
        lambda c: life.block(
            c, task_id=task["id"], blocked_reason=reason, reason="ask first", actor="system", now_us=now_us
        )
    )
    store.close()


def why(plane: ControlPlane, task: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = plane.json("GET", f"/api/tasks/{task['id']}/why")
    assert answer["task"] == task["id"]
    return answer


@pytest.mark.parametrize("reason", ["approval", "escalation", "budget"])
def test_what_waits_for_somebody_is_approved_or_rejected(shared: ControlPlane, reason: str) -> None:
    """To the line, or cancelled with the reason; by whom, the event says."""
    yes, no = shared.add("yes", orchestrator="vp-b"), shared.add("no", orchestrator="vp-b")
    for task in (yes, no):
        block(shared, task, reason)
    found = shared.json("GET", f"/api/tasks?blocked_reason={reason}")["data"]
    assert {task["id"] for task in found} == {yes["id"], no["id"]}
    approved = shared.json("POST", f"/api/tasks/{yes['id']}/approve", json={"reason": "fine"})
    assert (approved["status"], approved["blocked_reason"]) == ("TODO", None)
    rejected = shared.json("POST", f"/api/tasks/{no['id']}/reject", json={"reason": "too dear"})
    assert (rejected["status"], rejected["completed_at"] is None) == ("CANCELLED", False)
    for task, kind in ((yes, "task_approved"), (no, "task_rejected")):
        event = shared.json("GET", f"/api/tasks/{task['id']}/events")["data"][-1]
        assert (event["kind"], shared.declared[event["actor"]]["scopes"]) == (kind, ["admin"])
        assert event["data"]["reason"] in ("fine", "too dear")
    drain(shared, "vp-b")


def test_what_waits_for_nobody_cannot_be_approved(shared: ControlPlane) -> None:
    """409 says what it is instead."""
    task = shared.add("waits for nobody", orchestrator="vp-b")
    for verb in ("approve", "reject"):
        refused = shared.ask("POST", f"/api/tasks/{task['id']}/{verb}")
        assert problem(refused) == (409, "not_awaiting_approval")
        assert "it is TODO" in refused.json()["detail"]
        assert problem(shared.ask("POST", f"/api/tasks/{NO_TASK}/{verb}")) == (404, "not_found")
    block(shared, task, "manual")
    refused = shared.ask("POST", f"/api/tasks/{task['id']}/approve")
    assert "it is BLOCKED/manual" in refused.json()["detail"]
    shared.json("POST", f"/api/tasks/{task['id']}/cancel")


def test_an_orchestrator_does_not_approve_tasks(limited: ControlPlane) -> None:
    """A person does, or a service."""
    task = limited.add("its own")
    block(limited, task, "approval")
    refused = limited.ask("POST", f"/api/tasks/{task['id']}/approve", key="vp-pauser")
    assert problem(refused) == (403, "forbidden")
    limited.json("POST", f"/api/tasks/{task['id']}/cancel")


def test_a_paused_orchestrator_gets_nothing_and_says_why(limited: ControlPlane) -> None:
    """The poll's reason, the task's why, and the orchestrator's status; activated, a waiting poller gets it at once."""
    paused = limited.json("POST", "/api/vps/vp-a/deactivate", json={"reason": "a holiday"})
    assert (paused["changed"], paused["status"], paused["previous"]) == (True, "AWAY", "OFFLINE")
    again = limited.json("POST", "/api/orchestrators/vp-a/deactivate", json={"reason": "a holiday"})
    assert (again["changed"], again["status"], again["previous"]) == (False, "AWAY", "AWAY")
    task = limited.add("held")
    answer = limited.json("POST", "/api/tasks/poll", json={"orchestrator": "vp-a"})
    assert answer["data"] == []
    assert "a holiday" in answer["reason"]
    assert why(limited, task)["binding"]["kind"] == "pause"
    shown = limited.json("GET", "/api/vps/vp-a")
    assert (shown["status"], shown["paused"]["reason"], shown["paused"]["until"]) == ("AWAY", "a holiday", None)
    assert [vp["id"] for vp in limited.json("GET", "/api/vps?status=AWAY")["data"]] == ["vp-a"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(limited.poll, "vp-a", wait=20)
        until(lambda: "no client polls" not in str(why(limited, task)["holds"]), "the poller waits")
        woken = limited.json("POST", "/api/vps/vp-a/activate")
        (grant,) = waiting.result(timeout=5)
    assert (woken["changed"], woken["previous"]) == (True, "AWAY")
    assert grant["task"]["id"] == task["id"]
    assert limited.json("POST", "/api/vps/vp-a/activate")["changed"] is False
    assert limited.json("GET", "/api/vps/vp-a")["paused"] is None
    limited.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})


def test_a_pause_ends_at_its_time(limited: ControlPlane) -> None:
    """A poller that waits is served then; a time that is over is refused."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    limited.json("POST", "/api/vps/vp-b/deactivate", json={"until": soon.isoformat()})
    task = limited.add("soon", orchestrator="vp-b")
    (grant,) = limited.poll("vp-b", wait=15)
    assert datetime.now(UTC) >= soon
    assert grant["task"]["id"] == task["id"]
    limited.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})
    past = {"until": "2020-01-01T00:00:00Z"}
    assert fields(limited.ask("POST", "/api/vps/vp-b/deactivate", json=past)) == {"until"}


def test_without_drain_what_runs_is_taken_away(limited: ControlPlane) -> None:
    """It stands in line again, and its holder's token is good for nothing."""
    task = limited.add("runs", orchestrator="vp-b")
    (grant,) = limited.poll("vp-b")
    limited.json("POST", "/api/vps/vp-b/deactivate", json={})
    assert limited.task(task["id"])["status"] == "IN_PROGRESS"
    limited.json("POST", "/api/vps/vp-b/deactivate", json={"drain": False})
    assert limited.task(task["id"])["status"] == "TODO"
    late = limited.ask("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})
    assert problem(late) == (409, "lease_lost")
    limited.json("POST", "/api/vps/vp-b/activate")
    (grant,) = limited.poll("vp-b")
    assert grant["lease"]["attempt"] == 2
    limited.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})


def test_pausing_needs_the_scope_and_is_for_oneself_alone(limited: ControlPlane) -> None:
    """403, 404, 422."""
    assert problem(limited.ask("POST", "/api/vps/vp-a/deactivate", key="tasks:write")) == (403, "missing_scope")
    assert problem(limited.ask("POST", "/api/vps/vp-b/deactivate", key="vp-pauser")) == (403, "forbidden")
    assert problem(limited.ask("POST", "/api/vps/vp-none/activate")) == (404, "not_found")
    assert fields(limited.ask("POST", "/api/vps/vp-a/deactivate", json={"drained": 1})) == {"drained"}
    limited.json("POST", "/api/vps/vp-a/deactivate", key="vp-pauser")
    limited.json("POST", "/api/vps/vp-a/activate", key="fleet:write")


def test_a_connected_daemon_is_away_while_paused(limited: ControlPlane) -> None:
    """And ONLINE again afterwards."""

    async def scenario() -> None:
        async with connected(limited, "vp-b"):
            ask = asyncio.to_thread
            assert (await ask(limited.json, "GET", "/api/vps/vp-b"))["status"] == "ONLINE"
            paused = await ask(limited.json, "POST", "/api/vps/vp-b/deactivate")
            assert (paused["previous"], paused["status"]) == ("ONLINE", "AWAY")
            resumed = await ask(limited.json, "POST", "/api/vps/vp-b/activate")
            assert (resumed["previous"], resumed["status"]) == ("AWAY", "ONLINE")
            task = await ask(limited.add, "held by nothing", orchestrator="vp-b")
            answer = await ask(why, limited, task)
            assert (answer["binding"]["kind"], answer["place_in_line"]) == ("next", {"ahead": 0, "of": 1})
            assert answer["estimate"] is not None
            await ask(limited.json, "POST", f"/api/tasks/{task['id']}/cancel")

    asyncio.run(scenario())


def test_why_names_the_dependency_and_the_limit(limited: ControlPlane) -> None:
    """And nobody's presence, where nobody is."""
    first = limited.add("first", metadata={"repo": "acme"})
    blocked = limited.add("second", depends_on=[first["id"]])
    answer = why(limited, blocked)
    assert (answer["status"], answer["binding"]["kind"]) == ("BLOCKED", "dependency")
    assert answer["binding"]["waits_for"] == [{"id": first["id"], "status": "TODO", "title": "first"}]
    unheard = limited.add("unheard", orchestrator="vp-unheard")
    assert why(limited, unheard)["binding"]["kind"] == "offline"
    limited.ask("POST", f"/api/tasks/{unheard['id']}/cancel")
    (grant,) = limited.poll("vp-a")
    # A client that polls comes and goes; it counts as there for a while.
    assert why(limited, limited.add("after it"))["binding"]["kind"] == "next"
    (after,) = limited.poll("vp-a")
    limited.json("POST", f"/api/tasks/{after['task']['id']}/complete", json={"token": after["lease"]["token"]})
    waits = limited.add("same repo", metadata={"repo": "acme"})
    assert limited.poll("vp-a") == []
    answer = why(limited, waits)
    assert (answer["binding"]["kind"], answer["binding"]["limit"]) == ("limit", "one-per-repo")
    assert answer["binding"]["running"] == [first["id"]]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(limited.poll, "vp-a", wait=20)
        limited.json("POST", f"/api/tasks/{first['id']}/complete", json={"token": grant["lease"]["token"]})
        (other,) = waiting.result(timeout=10)
    assert other["task"]["id"] in (waits["id"], blocked["id"])
    assert problem(limited.ask("GET", f"/api/tasks/{NO_TASK}/why")) == (404, "not_found")
    for task in (waits, blocked):
        limited.ask("POST", f"/api/tasks/{task['id']}/cancel")


def test_a_pause_outlives_the_control_plane(tmp_path: Path) -> None:
    """It stands in the store."""
    plane = ControlPlane(tmp_path / "home").start()
    try:
        plane.json("POST", "/api/vps/vp-a/deactivate", json={"reason": "kept"})
        plane.stop()
        plane.start()
        assert plane.json("GET", "/api/vps/vp-a")["paused"]["reason"] == "kept"
    finally:
        plane.close()
