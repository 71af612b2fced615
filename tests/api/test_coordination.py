"""Delegating and handing over, over HTTP and the daemons' link."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from peer import Peer, connected
from serving import ControlPlane, until
from test_tasks import NO_TASK, fields, problem

from orchestrator_fleet.wire import link as wire

NO_ONE = "dlg-00000000000000000000000000"
ABOUT: dict[str, Any] = {"notes": "mind the tests", "context": {"branch": "fix"}, "completion": 40}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def plane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running control plane of some orchestrators, on either store."""
    store = request.getfixturevalue("postgres_server").empty() if request.param == "postgresql" else ""
    one = ControlPlane(
        tmp_path_factory.mktemp("asking") / "home",
        store=store,
        orchestrators={f"vp-{letter}": f"of-{letter}" for letter in "abcdefg"},
    )
    one.declare("fleet:write", owner="person:me", scopes=["fleet:write"])
    one.declare("vp-b's writer", owner="vp-b", scopes=["tasks:write"])
    one.write()
    yield one.start()
    one.close()


def delegate(plane: ControlPlane, task: dict[str, Any], to: str, *, vp: str = "vp-a", **more: Any) -> dict[str, Any]:
    body = {"task": task["id"], "to": to, **more}
    one: dict[str, Any] = plane.json("POST", f"/api/vps/{vp}/delegate", code=201, json=body)
    return one


def asks(plane: ControlPlane, vp: str, verb: str, key: str = "admin", **body: Any) -> httpx.Response:
    return plane.ask("POST", f"/api/vps/{vp}/{verb}", key=key, json=body)


def coordination(plane: ControlPlane, one: dict[str, Any], vp: str = "vp-a") -> dict[str, Any]:
    found: dict[str, Any] = plane.json("GET", f"/api/vps/{vp}/coordinations/{one['id']}")
    return found


def written(plane: ControlPlane, task: dict[str, Any]) -> list[str]:
    """The kinds of what happened to a task that coordinations did."""
    events = plane.json("GET", f"/api/tasks/{task['id']}/events?limit=100")["data"]
    return [event["kind"] for event in events if event["kind"].startswith(("delegation_", "handoff_"))]


def complete(plane: ControlPlane, grant: dict[str, Any]) -> None:
    body = {"token": grant["lease"]["token"], "result": {"ok": True}}
    plane.json("POST", f"/api/tasks/{grant['task']['id']}/complete", json=body)


def test_a_delegated_task_is_claimed_done_and_told_so(plane: ControlPlane) -> None:
    """At each step a look says how it stands, and soon it is written down, with nobody looking."""
    task = plane.add("delegated", orchestrator="vp-a")
    answer = asks(plane, "vp-a", "delegate", task=task["id"], to="vp-b", note="yours", priority="HIGH")
    one = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/api/vps/vp-a/coordinations/{one['id']}")
    assert (one["state"], one["kind"], one["from"], one["to"], one["note"]) == (
        "pending",
        "delegation",
        "vp-a",
        "vp-b",
        "yours",
    )
    assert (one["task"]["id"], one["task"]["orchestrator"], one["task"]["priority"]) == (task["id"], "vp-b", "HIGH")
    for path in (answer.headers["location"], f"/api/orchestrators/vp-b/coordinations/{one['id']}"):
        assert plane.json("GET", path)["task"] == task["id"]
    (grant,) = plane.poll("vp-b")
    assert coordination(plane, one)["state"] == "accepted"
    until(lambda: written(plane, task)[-1] == "delegation_accepted", "the claim is written down")
    complete(plane, grant)
    assert coordination(plane, one, "vp-b")["state"] == "done"
    until(lambda: written(plane, task)[-1] == "delegation_done", "the end is written down")


async def told_of(peer: Peer, one: dict[str, Any]) -> str:
    """The kind of the next notice about it; what earlier tests left behind is taken on the way."""
    while True:
        notice = await peer.told()
        await peer.noticed(notice)
        if notice.data["id"] == one["id"]:
            return notice.kind


def test_both_sides_are_told_over_the_link(plane: ControlPlane) -> None:
    """What runs is told to stop, and its slot is free for the next."""

    async def scenario() -> None:
        async with connected(plane, "vp-a") as (a, _), connected(plane, "vp-b") as (b, _):
            task = await asyncio.to_thread(plane.add, "told", orchestrator="vp-a")
            (grant,) = await a.claim()
            one = await asyncio.to_thread(delegate, plane, task, "vp-b")
            cancel = await a.cancelled()
            assert (cancel.task, cancel.token, cancel.reason) == (task["id"], grant.token, "delegated to vp-b by vp-a")
            for side in (a, b):
                assert await told_of(side, one) == "delegation_pending"
            (taken,) = await b.claim()
            assert (taken.task["id"], "handoff" in taken.task) == (task["id"], False)
            assert await told_of(a, one) == "delegation_accepted"
            assert await b.finish(taken) == "DONE"
            assert await told_of(a, one) == "delegation_done"

    asyncio.run(scenario())


def test_an_orchestrators_key_acts_for_it_alone(plane: ControlPlane) -> None:
    """It delegates its own, and answers what it was asked; of others it learns nothing."""
    task = plane.add("own", orchestrator="vp-a")
    body = {"task": task["id"], "to": "vp-b"}
    for vp in ("vp-a", "vp-none"):
        assert problem(asks(plane, vp, "delegate", key="vp-b", **body)) == (403, "missing_scope")
        assert problem(asks(plane, vp, "delegate", key="vp-b's writer", **body)) == (403, "forbidden")
    others = asks(plane, "vp-b", "delegate", key="vp-b", task=task["id"], to="vp-c")
    assert problem(others) == (409, "not_owner")
    assert "vp-a" not in others.json()["detail"]
    one = asks(plane, "vp-a", "delegate", key="vp-a", **body).json()
    assert plane.declared[one["by"]]["owner"] == "vp-a"
    answering = f"coordinations/{one['id']}/reject"
    assert problem(asks(plane, "vp-b", answering, key="vp-a")) == (403, "missing_scope")
    assert problem(asks(plane, "vp-a", answering, key="vp-a")) == (409, "not_target")
    assert problem(asks(plane, "vp-c", answering, key="vp-c")) == (404, "not_found")
    assert problem(plane.ask("GET", f"/api/vps/vp-a/coordinations/{one['id']}", key="vp-b")) == (403, "missing_scope")
    assert problem(plane.ask("GET", f"/api/vps/vp-c/coordinations/{one['id']}")) == (404, "not_found")
    assert plane.json("GET", "/api/vps/vp-b/coordinations", key="vp-b")["data"][0]["id"] == one["id"]
    rejected = plane.json("POST", f"/api/vps/vp-b/{answering}", key="vp-b", json={"reason": "no"})
    assert (rejected["state"], rejected["reason"], rejected["task"]["orchestrator"]) == ("rejected", "no", "vp-a")
    plane.json("POST", f"/api/tasks/{task['id']}/cancel")


@pytest.mark.parametrize("verb", ["delegate", "handoff"])
def test_scopes_and_what_is_not_there(plane: ControlPlane, verb: str) -> None:
    """403 before anything else; then 404 of the orchestrator."""
    body = {"task": NO_TASK, "to": "vp-b"}
    for key in ("tasks:read", "tasks:work", "fleet:read", "fleet:write"):
        assert problem(asks(plane, "vp-none", verb, key=key, **body)) == (403, "missing_scope")
    assert problem(asks(plane, "vp-none", verb, key="tasks:write", **body)) == (404, "not_found")
    assert problem(plane.ask("POST", f"/api/vps/vp-a/{verb}", key=None, json=body)) == (401, "unauthorized")
    for key in ("tasks:read", "tasks:work", "tasks:write"):
        assert problem(plane.ask("GET", "/api/vps/vp-a/coordinations", key=key)) == (403, "missing_scope")
    assert plane.ask("GET", "/api/vps/vp-a/coordinations", key="fleet:read").status_code == 200


@pytest.mark.parametrize("verb", ["delegate", "handoff"])
def test_everything_wrong_is_told_at_once(plane: ControlPlane, verb: str) -> None:
    """The body's shape; then whom and what it names."""
    assert fields(asks(plane, "vp-a", verb)) == {"task", "to"}
    shape = {"task": "T\0", "to": "VP", "note" if verb == "delegate" else "notes": "a\0", "too": 1}
    assert fields(asks(plane, "vp-a", verb, **shape)) == set(shape)
    assert fields(asks(plane, "vp-a", verb, task=NO_TASK, to="vp-none")) == {"task", "to"}
    assert fields(asks(plane, "vp-a", verb, task=NO_TASK, to="vp-a")) == {"task", "to"}
    for raw in (b"", b"{", b"[]", b"\xff", b"null"):
        answer = plane.ask("POST", f"/api/vps/vp-a/{verb}", content=raw)
        assert answer.status_code in (400, 422), (raw, answer.text)


def test_bodies_of_one_kind_only(plane: ControlPlane) -> None:
    """A time that is none of UTC, a completion beyond 100, a context that is no object, is too deep, or too big."""
    task = plane.add("wrong", orchestrator="vp-a")
    named = {"task": task["id"], "to": "vp-b"}
    early = asks(plane, "vp-a", "delegate", due_at="0001-01-01T00:00:00+14:00", priority="SOON", **named)
    assert fields(early) == {"priority"}
    early = asks(plane, "vp-a", "delegate", due_at="0001-01-01T00:00:00+14:00", task=NO_TASK, to="vp-b")
    assert fields(early) == {"due_at", "task"}
    deep: Any = 1
    for _ in range(200):
        deep = {"x": deep}
    for wrong in ({"completion": 101}, {"context": [1]}, {"context": deep}, {"context": {"x": "y" * 70_000}}):
        assert fields(asks(plane, "vp-a", "handoff", **named, **wrong)) == set(wrong)
    assert plane.task(task["id"])["orchestrator"] == "vp-a"
    plane.json("POST", f"/api/tasks/{task['id']}/cancel")


def test_refusals_have_their_words(plane: ControlPlane) -> None:
    """409 each, and nothing has changed."""
    task = plane.add("refused", orchestrator="vp-a")
    assert problem(asks(plane, "vp-b", "delegate", task=task["id"], to="vp-c")) == (409, "not_owner")
    plane.json("POST", "/api/vps/vp-g/deactivate", json={"reason": "a holiday"})
    for verb in ("delegate", "handoff"):
        refused = asks(plane, "vp-a", verb, task=task["id"], to="vp-g")
        assert problem(refused) == (409, "target_paused")
        assert "a holiday" in refused.json()["detail"]
    plane.json("POST", "/api/vps/vp-g/activate")
    delegate(plane, task, "vp-b")
    cycle = asks(plane, "vp-b", "delegate", task=task["id"], to="vp-a")
    assert problem(cycle) == (409, "delegation_cycle")
    assert "vp-a -> vp-b -> vp-a" in cycle.json()["detail"]
    for source, target in ("bc", "cd", "de", "ef"):
        delegate(plane, task, f"vp-{target}", vp=f"vp-{source}")
    assert problem(asks(plane, "vp-f", "handoff", task=task["id"], to="vp-g")) == (409, "hop_limit")
    plane.json("POST", f"/api/tasks/{task['id']}/cancel")
    assert problem(asks(plane, "vp-f", "delegate", task=task["id"], to="vp-g")) == (409, "final")
    states = plane.json("GET", "/api/vps/vp-b/coordinations?role=target")["data"]
    assert (states[0]["state"], states[0]["reason"]) == ("expired", "the task was cancelled")


def test_answers_after_the_end(plane: ControlPlane) -> None:
    """409 not_open; of what is not there, 404."""
    task = plane.add("answered", orchestrator="vp-a")
    one = delegate(plane, task, "vp-b")
    accepted = plane.json("POST", f"/api/vps/vp-b/coordinations/{one['id']}/accept", json={"reason": "soon"})
    assert (accepted["state"], accepted["task"]["status"]) == ("accepted", "TODO")
    complete(plane, plane.poll("vp-b")[0])
    for verb in ("accept", "reject"):
        assert problem(asks(plane, "vp-b", f"coordinations/{one['id']}/{verb}")) == (409, "not_open")
        assert problem(asks(plane, "vp-b", f"coordinations/{NO_ONE}/{verb}")) == (404, "not_found")
        assert problem(asks(plane, "vp-b", f"coordinations/%00/{verb}")) == (404, "not_found")
    over = delegate(plane, plane.add("over", orchestrator="vp-a"), "vp-c")["task"]
    handed = asks(plane, "vp-c", "handoff", task=over["id"], to="vp-d").json()
    assert problem(asks(plane, "vp-d", f"coordinations/{handed['id']}/reject")) == (409, "not_answerable")
    plane.json("POST", f"/api/tasks/{over['id']}/cancel")


def test_a_list_takes_its_filters_and_no_others(plane: ControlPlane) -> None:
    """State, kind and role; words that are none are named."""
    task = plane.add("listed", orchestrator="vp-e")
    one = delegate(plane, task, "vp-f", vp="vp-e")
    for query in ("state=pending", "kind=delegation,handoff&state=pending", "role=source&limit=1"):
        found = plane.json("GET", f"/api/vps/vp-e/coordinations?{query}")
        assert found["data"][0]["id"] == one["id"]
        assert found["pagination"]["total"] >= 1
    assert plane.json("GET", "/api/vps/vp-e/coordinations?role=target&state=pending")["data"] == []
    wrong = plane.ask("GET", "/api/vps/vp-e/coordinations?state=open&kind=x&role=both")
    assert fields(wrong) == {"state", "kind", "role"}
    assert fields(plane.ask("GET", "/api/vps/vp-e/coordinations?cursor=x")) == {"cursor"}
    assert fields(plane.ask("GET", "/api/vps/vp-e/coordinations?sate=x")) == {"sate"}
    assert problem(plane.ask("GET", "/api/vps/vp-none/coordinations")) == (404, "not_found")
    plane.json("POST", f"/api/tasks/{task['id']}/cancel")


def test_the_same_again_answers_the_same(plane: ControlPlane) -> None:
    """With an Idempotency-Key it is delegated once; the key is good for one request alone."""
    task = plane.add("once", orchestrator="vp-a")
    headers = {"Idempotency-Key": f"once-{task['id']}"}
    body = {"task": task["id"], "to": "vp-b"}
    first, again = (plane.ask("POST", "/api/vps/vp-a/delegate", json=body, headers=headers) for _ in range(2))
    assert (first.status_code, first.content, first.headers["location"]) == (
        again.status_code,
        again.content,
        again.headers["location"],
    )
    other = plane.ask("POST", "/api/vps/vp-a/delegate", json={**body, "to": "vp-c"}, headers=headers)
    assert problem(other) == (409, "idempotency_key_reused")
    plane.json("POST", f"/api/tasks/{task['id']}/cancel")


@pytest.mark.parametrize("verb", ["delegate", "handoff"])
def test_of_two_at_once_one_wins(plane: ControlPlane, verb: str) -> None:
    """The other gets 409 not_owner."""
    for _ in range(5):
        task = plane.add("race", orchestrator="vp-a")
        with ThreadPoolExecutor(2) as pool:
            answers = list(
                pool.map(lambda to, t=task: asks(plane, "vp-a", verb, task=t["id"], to=to), ("vp-b", "vp-c"))
            )
        (won,) = [one for one in answers if one.status_code < 300]
        (lost,) = [one for one in answers if one.status_code >= 300]
        assert problem(lost) == (409, "not_owner")
        assert plane.task(task["id"])["orchestrator"] == won.json()["to"]
        plane.json("POST", f"/api/tasks/{task['id']}/cancel")


def test_a_task_that_nobody_runs_is_handed_over_at_once(plane: ControlPlane) -> None:
    """Its next session is told, over HTTP too; each session, until the task moves on."""
    task = plane.add("handed", orchestrator="vp-a")
    answer = asks(plane, "vp-a", "handoff", task=task["id"], to="vp-b", **ABOUT)
    one = answer.json()
    assert (answer.status_code, one["state"], one["task"]["orchestrator"]) == (200, "accepted", "vp-b")
    told = {"id": one["id"], "from": "vp-a", "transcript": None, **ABOUT}
    (grant,) = plane.poll("vp-b")
    assert grant["task"]["handoff"] == told
    plane.json("POST", f"/api/tasks/{task['id']}/release", json={"token": grant["lease"]["token"]})
    headers = {"Idempotency-Key": f"poll-{task['id']}"}
    polls = [plane.json("POST", "/api/tasks/poll", json={"orchestrator": "vp-b"}, headers=headers) for _ in range(2)]
    assert polls[0] == polls[1]
    assert polls[0]["data"][0]["task"]["handoff"] == told
    complete(plane, polls[0]["data"][0])
    assert "handoff" not in plane.task(task["id"])


async def begun(plane: ControlPlane, peer: Peer, **more: Any) -> tuple[wire.Grant, asyncio.Task[httpx.Response]]:
    """A session that runs, and the request to hand its task over, under way."""
    task = await asyncio.to_thread(plane.add, "runs", orchestrator="vp-a")
    (grant,) = await peer.claim()
    assert grant.task["id"] == task["id"]
    body = {"task": task["id"], "to": "vp-b", **ABOUT}
    path = "/api/vps/vp-a/handoff"
    asking = asyncio.create_task(asyncio.to_thread(plane.ask, "POST", path, json=body, **more))
    cancel = await peer.cancelled()
    assert (cancel.task, cancel.token) == (task["id"], grant.token)
    return grant, asking


async def refused_finish(peer: Peer, grant: wire.Grant) -> None:
    """The session has ended, and its attempt is over."""
    told = wire.Finish(task=grant.task["id"], token=grant.token, outcome="cancelled")
    assert (await peer.ask(told, wire.Problem)).code == "lease_lost"


def test_a_session_ends_before_its_task_changes_hands(plane: ControlPlane) -> None:
    """The request waits for it; what the target gets names its transcript."""

    async def scenario() -> None:
        async with connected(plane, "vp-a") as (a, _), connected(plane, "vp-b") as (b, _):
            grant, asking = await begun(plane, a)
            held = await asyncio.to_thread(plane.task, grant.task["id"])
            assert (held["status"], held["blocked_reason"], held["orchestrator"]) == ("BLOCKED", "manual", "vp-a")
            assert not asking.done()
            began = time.monotonic()
            await refused_finish(a, grant)
            answer = await asking
            assert time.monotonic() - began < 2
            one = answer.json()
            assert (answer.status_code, one["state"], one["task"]["orchestrator"]) == (200, "accepted", "vp-b")
            (taken,) = await b.claim()
            assert (taken.task["id"], taken.attempt) == (grant.task["id"], 2)
            assert taken.task["handoff"] == {
                "id": one["id"],
                "from": "vp-a",
                **ABOUT,
                "transcript": {
                    "machine": "m01",
                    "attempt": 1,
                    "session": f"{grant.task['id']}.1",
                    "log": f"/api/tasks/{grant.task['id']}/log?attempt=1",
                },
            }
            assert await b.finish(taken) == "DONE"

    asyncio.run(scenario())


def test_the_same_handoff_again_waits_for_the_same(plane: ControlPlane) -> None:
    """While it is under way, and afterwards, the answer is one."""

    async def scenario() -> None:
        async with connected(plane, "vp-a") as (a, _):
            headers = {"Idempotency-Key": f"handoff-{time.time_ns()}"}
            grant, asking = await begun(plane, a, headers=headers)
            body = {"task": grant.task["id"], "to": "vp-b", **ABOUT}

            async def again() -> httpx.Response:
                return await asyncio.to_thread(plane.ask, "POST", "/api/vps/vp-a/handoff", json=body, headers=headers)

            meanwhile = asyncio.create_task(again())
            await refused_finish(a, grant)
            first, second, third = await asking, await meanwhile, await again()
            assert first.status_code == second.status_code == third.status_code == 200
            assert (first.json()["id"], first.json()["state"]) == (second.json()["id"], "accepted")
            assert third.content in (first.content, second.content)
            await asyncio.to_thread(plane.json, "POST", f"/api/tasks/{grant.task['id']}/cancel")

    asyncio.run(scenario())


def test_a_beat_without_the_session_says_that_it_is_gone(plane: ControlPlane) -> None:
    """Where its end was told before anybody waited for it."""

    async def scenario() -> None:
        async with connected(plane, "vp-a") as (a, _):
            grant, asking = await begun(plane, a)
            began = time.monotonic()
            while not asking.done():
                await a.beat()
                await asyncio.sleep(0.2)
            assert 4 < time.monotonic() - began < 12
            assert (await asking).json()["reason"] is None
            await asyncio.to_thread(plane.json, "POST", f"/api/tasks/{grant.task['id']}/cancel")

    asyncio.run(scenario())


def test_a_person_who_unblocks_the_held_task_ends_the_handoff(plane: ControlPlane) -> None:
    """409, and the task is where it was."""

    async def scenario() -> None:
        async with connected(plane, "vp-a") as (a, _):
            grant, asking = await begun(plane, a)
            await asyncio.to_thread(plane.json, "POST", f"/api/tasks/{grant.task['id']}/unblock")
            answer = await asking
            assert problem(answer) == (409, "not_handed_over")
            assert "somebody put the task back in line first" in answer.json()["detail"]
            (again,) = await a.claim()
            assert (again.task["id"], again.attempt) == (grant.task["id"], 2)
            assert await a.finish(again) == "DONE"

    asyncio.run(scenario())


def test_a_control_plane_that_dies_in_the_middle_completes_it_when_it_is_back(tmp_path: Path) -> None:
    """The pending row is the intent; nobody has to ask again, and the daemon may be gone for good."""
    plane = ControlPlane(tmp_path / "home").start()

    async def scenario() -> str:
        async with connected(plane, "vp-a") as (a, _):
            grant, asking = await begun(plane, a)
            await asyncio.to_thread(plane.stop, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await asking
            task: str = grant.task["id"]
            return task

    try:
        task = asyncio.run(scenario())
        plane.start()
        assert plane.task(task)["orchestrator"] == "vp-a"
        until(lambda: plane.task(task)["orchestrator"] == "vp-b", "it is handed over")
        (one,) = plane.json("GET", "/api/vps/vp-b/coordinations")["data"]
        assert (one["state"], one["reason"]) == ("accepted", "its session did not say within 15 s that it has ended")
        assert plane.poll("vp-b")[0]["task"]["handoff"]["id"] == one["id"]
    finally:
        plane.close()


def test_what_was_missed_while_down_is_written_down_at_the_start(tmp_path: Path) -> None:
    """A claim whose event nobody passed on before the end."""
    plane = ControlPlane(tmp_path / "home").start()
    try:
        tasks = [plane.add(f"t{n}", orchestrator="vp-a") for n in range(5)]
        for task in tasks:
            delegate(plane, task, "vp-b")
        for grant in plane.poll("vp-b", limit=5):
            complete(plane, grant)
        plane.stop(signal.SIGKILL)
        plane.start()
        for task in tasks:
            until(lambda t=task: written(plane, t)[-1] == "delegation_done", "its end is written down")
            assert written(plane, task).count("delegation_done") == 1
    finally:
        plane.close()


def test_a_session_at_another_control_plane_ends_first_too(postgres_url: str, tmp_path: Path) -> None:
    """Asked at one, with the daemon at the other."""
    one, other = ControlPlane(tmp_path / "a", store=postgres_url), ControlPlane(tmp_path / "b", store=postgres_url)

    async def scenario() -> None:
        async with connected(other, "vp-a") as (a, _):
            grant, asking = await begun(one, a)
            began = time.monotonic()
            await refused_finish(a, grant)
            answer = await asking
            assert time.monotonic() - began < 2
            assert (answer.status_code, answer.json()["state"]) == (200, "accepted")
            (taken,) = await asyncio.to_thread(other.poll, "vp-b")
            assert taken["task"]["handoff"]["from"] == "vp-a"
            await asyncio.to_thread(complete, other, taken)
            await asyncio.to_thread(until, lambda: written(one, taken["task"])[-1] == "handoff_done", "the end is told")
            assert await asyncio.to_thread(written, one, taken["task"]) == [
                "handoff_pending",
                "handoff_accepted",
                "handoff_done",
            ]

    try:
        for plane in (one, other):
            plane.process = plane.popen()
        for plane in (one, other):
            plane.ready()
        asyncio.run(scenario())
    finally:
        one.close()
        other.close()
