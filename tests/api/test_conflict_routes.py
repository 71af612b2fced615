"""`/api/vps/conflicts`: what stands against what, over HTTP, and that somebody decides it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peer import Peer, connected
from serving import ControlPlane, until
from test_tasks import fields, problem

from orchestrator_fleet.clock import SECOND_US, SystemClock, to_rfc3339
from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.tasks import life
from orchestrator_fleet.wire import link as wire

URL = "/api/vps/conflicts"


@pytest.fixture
def plane(control_plane: ControlPlane) -> ControlPlane:
    """It runs, with a key for each who may look or decide."""
    control_plane.declare("fleet:write", owner="service:ci", scopes=["fleet:write"])
    control_plane.declare("vp-writer", owner="vp-a", scopes=["fleet:write", "fleet:read"])
    control_plane.write()
    return control_plane.start()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One in which nothing happens."""
    plane = ControlPlane(tmp_path_factory.mktemp("quiet") / "home")
    plane.declare("fleet:write", owner="service:ci", scopes=["fleet:write"])
    plane.write()
    yield plane.start()
    plane.close()


def found(plane: ControlPlane, query: str = "") -> list[dict[str, Any]]:
    answer = plane.json("GET", f"{URL}{query}", key="fleet:read")
    assert answer["pagination"]["total"] >= len(answer["data"])
    conflicts: list[dict[str, Any]] = answer["data"]
    return conflicts


def stuck(plane: ControlPlane, title: str = "t") -> tuple[dict[str, Any], dict[str, Any]]:
    """A task that waits for one that was cancelled."""
    root = plane.add(title, orchestrator="vp-b")
    waits = plane.add("waits", orchestrator="vp-a", depends_on=[root["id"]])
    plane.json("POST", f"/api/tasks/{root['id']}/cancel")
    return root, waits


def test_where_nothing_stands_against_anything_the_list_is_empty(quiet: ControlPlane) -> None:
    """The path is not an orchestrator's; both words for it are the same."""
    for path in (URL, "/api/orchestrators/conflicts"):
        answer = quiet.json("GET", path, key="fleet:read")
        assert answer == {
            "data": [],
            "pagination": {"limit": 20, "total": 0, "next_cursor": None},
            "truncated": False,
        }
    assert problem(quiet.ask("GET", "/api/vps/conflicts", key="tasks:read")) == (403, "missing_scope")


def test_a_conflict_is_told_resolved_and_over(plane: ControlPlane) -> None:
    """Resolving keeps who decided it and changes nothing else; the event has all of it."""
    root, waits = stuck(plane)
    (one,) = found(plane)
    assert (one["type"], one["resolved"]) == ("dependency_deadlock", None)
    assert (one["orchestrators"], one["tasks"]) == (["vp-b", "vp-a"], [root["id"], waits["id"]])
    assert one["suggestion"]["action"] == "unblock"
    assert one["since"] <= plane.task(waits["id"])["updated_at"]
    path = f"{URL}/{one['id']}/resolve"
    shown = plane.json("POST", path, key="fleet:write", json={"note": "we let it lie"})
    assert {**shown, "resolved": None} == one
    assert shown["resolved"]["note"] == "we let it lie"
    assert plane.declared[shown["resolved"]["by"]]["owner"] == "service:ci"
    assert found(plane) == []
    assert found(plane, "?resolved=true") == [shown]
    assert problem(plane.ask("POST", path, key="fleet:write")) == (409, "already_resolved")
    query = "select actor, data -> '$.by.owner', data -> '$.conflict' from events where kind = 'conflict_resolved'"
    assert plane.json("POST", "/api/sql", json={"query": query})["rows"] == [
        [shown["resolved"]["by"], "service:ci", shown]
    ]
    plane.json("POST", f"/api/tasks/{waits['id']}/unblock")
    assert found(plane, "?resolved=true") == []
    assert problem(plane.ask("POST", path, key="fleet:write")) == (404, "not_found")


def test_the_same_request_again_gets_the_same_answer(plane: ControlPlane) -> None:
    """With an Idempotency-Key; of two at once one decides."""
    stuck(plane)
    (one,) = found(plane)
    path = f"{URL}/{one['id']}/resolve"

    def ask(key: str) -> Any:
        return plane.ask("POST", path, json={"note": "n"}, headers={"Idempotency-Key": key})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [f"k{n % 4}" for n in range(8)]))
    good = [answer.json() for answer in answers if answer.status_code == 200]
    assert len(good) == 2
    assert good[0] == good[1]
    assert {problem(answer) for answer in answers if answer.status_code != 200} == {(409, "already_resolved")}


def test_the_list_goes_on_by_its_cursor(plane: ControlPlane) -> None:
    """Each once, though others come and go meanwhile."""
    for n in range(5):
        stuck(plane, f"root {n}")
    first = plane.json("GET", f"{URL}?limit=2")
    stuck(plane, "a newer one")
    seen, cursor = [one["id"] for one in first["data"]], first["pagination"]["next_cursor"]
    while cursor:
        page = plane.json("GET", f"{URL}?limit=2&cursor={cursor}")
        seen += [one["id"] for one in page["data"]]
        cursor = page["pagination"]["next_cursor"]
    assert (len(seen), len(set(seen))) == (6, 6)
    since = [one["since"] for one in found(plane)]
    assert since == sorted(since)
    assert len(found(plane, "?type=dependency_deadlock,same_branch")) == 6
    assert found(plane, "?type=same_branch&type=over_capacity") == []


@pytest.mark.parametrize(
    "query", ["type=odd", "limit=0", "limit=101", "cursor=x", "cursor=W10", "resolved=perhaps", "status=open"]
)
def test_a_wrong_query_names_its_field(quiet: ControlPlane, query: str) -> None:
    """422."""
    assert fields(quiet.ask("GET", f"{URL}?{query}")) == {query.partition("=")[0]}


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"note": 1}', b'{"note": "\\u0000"}', b'{"notes": "x"}', b"\xff"])
def test_garbage_is_refused(quiet: ControlPlane, body: bytes) -> None:
    """400 or 422, before anything is looked for."""
    answer = quiet.ask("POST", f"{URL}/over_capacity-0/resolve", content=body)
    assert answer.status_code in (400, 422)


@pytest.mark.parametrize(
    "name", ["nothing", "over_capacity-0123456789abcdef", "%00", "%ff%fe", "x" * 3_000, "same_branch-"]
)
def test_what_does_not_stand_cannot_be_resolved(quiet: ControlPlane, name: str) -> None:
    """404, whatever it is called."""
    assert problem(quiet.ask("POST", f"{URL}/{name}/resolve", key="fleet:write")) == (404, "not_found")


def test_an_orchestrator_decides_nothing_between_others(plane: ControlPlane) -> None:
    """Its key may look."""
    stuck(plane)
    (one,) = plane.json("GET", URL, key="vp-writer")["data"]
    refused = plane.ask("POST", f"{URL}/{one['id']}/resolve", key="vp-writer")
    assert problem(refused) == (403, "forbidden")
    refused = plane.ask("POST", f"{URL}/{one['id']}/resolve", key="fleet:read")
    assert problem(refused) == (403, "missing_scope")


def test_a_lowered_limit_leaves_too_many_sessions(plane: ControlPlane) -> None:
    """Until enough have ended; the rules in force count, not those of the claims."""
    for n in range(3):
        plane.add(f"t{n}", orchestrator="vp-b", metadata={"repo": "r", "branch": f"b{n % 2}"})
    grants = plane.poll("vp-b", limit=3)
    assert [one["type"] for one in found(plane)] == ["same_branch"]
    text = (plane.home / "fleet.yaml").read_text().replace("sessions: {max: 100}", "sessions: {max: 2}")
    (plane.home / "fleet.yaml").write_text(text)
    plane.publish()
    one = until(lambda: found(plane, "?type=over_capacity"), "the lowered limit is in force")[0]
    assert one["evidence"] == {"orchestrator": "vp-b", "running": 3, "max": 2, "setting": "sessions.max"}
    for grant in grants[:2]:
        plane.json("POST", f"/api/tasks/{grant['task']['id']}/complete", json={"token": grant["lease"]["token"]})
    assert found(plane) == []


def test_a_due_date_that_the_line_does_not_allow(plane: ControlPlane) -> None:
    """By the time that the last tasks took, which `why` estimates from as well."""
    for n in range(120):
        plane.add(f"t{n}", orchestrator="vp-b", priority="HIGH")
    waits = plane.poll("vp-b", limit=1)
    token = waits[0]["lease"]["token"]

    began = "UPDATE attempts SET started_at_us = started_at_us - 3600000000"
    _in_store(plane, lambda conn: conn.exec_driver_sql(began).rowcount)
    plane.json("POST", f"/api/tasks/{waits[0]['task']['id']}/complete", json={"token": token})
    far = plane.add("far", orchestrator="vp-b", due_at="2999-01-01T00:00:00Z")
    assert found(plane) == []
    soon = SystemClock().now_us() + 600 * SECOND_US
    due = plane.json("PUT", f"/api/tasks/{far['id']}", json={"due_at": to_rfc3339(soon)})
    (one,) = found(plane)
    assert (one["type"], one["tasks"]) == ("deadline_collision", [due["id"]])
    estimate = plane.json("GET", f"/api/tasks/{due['id']}/why")["estimate"]["based_on"]
    assert one["evidence"]["based_on"] == estimate


def _in_store(plane: ControlPlane, do: Callable[[Any], Any]) -> Any:
    store = open_store(plane.store)
    try:
        return store.write_sync(do)
    finally:
        store.close()


def test_a_daemon_that_does_not_stop_is_seen(plane: ControlPlane) -> None:
    """It says in each beat that it runs what has been another's for a while; without that it is over."""

    async def tell() -> None:
        task = await asyncio.to_thread(plane.add, "contested", orchestrator="vp-a")
        async with connected(plane) as (peer, _):
            (grant,) = await peer.claim()
            await asyncio.to_thread(_in_store, plane, _moved_a_minute_ago(task["id"]))
            await _beat(peer, grant.token, task["id"])
            (one,) = await asyncio.to_thread(found, plane)
            assert (one["type"], one["orchestrators"]) == ("double_ownership", ["vp-b", "vp-a"])
            (holder,) = one["evidence"]["also_held_by"]
            assert (holder["orchestrator"], holder["machine"], holder["attempt"]) == ("vp-a", "m01", 1)
            assert "said at" in holder["reason"]
            await _beat(peer, "", "")
            assert await asyncio.to_thread(found, plane) == []

    asyncio.run(tell())


def _moved_a_minute_ago(task_id: str) -> Callable[[Any], Any]:
    past = SystemClock().now_us() - 60 * SECOND_US

    def move(conn: Any) -> None:
        life.assign(conn, task_id=task_id, orchestrator="vp-b", reason="moved", actor="k-test", now_us=past)

    return move


async def _beat(peer: Peer, token: str, task: str) -> None:
    """Say what it works on, and wait for the answer; what is pushed meanwhile does not matter."""
    held = (wire.Held(task=task, token=token),) if task else ()
    number = await peer.send(wire.Beat(held=held, generation="g1", charter_version="c1", sessions_max=2))
    while True:
        answer = await peer.receive()
        if isinstance(answer, wire.Beaten) and answer.id == number:
            return


def test_what_was_decided_outlives_the_control_plane(tmp_path: Path) -> None:
    """Killed right after its answer."""
    plane = ControlPlane(tmp_path / "home").start()
    try:
        stuck(plane)
        (one,) = found(plane)
        plane.json("POST", f"{URL}/{one['id']}/resolve", json={"note": "kept"})
        plane.stop(9)
        plane.start()
        assert found(plane) == []
        assert [again["resolved"]["note"] for again in found(plane, "?resolved=true")] == ["kept"]
    finally:
        plane.close()


def test_the_document_names_both_routes(quiet: ControlPlane) -> None:
    """With their problems."""
    paths = quiet.json("GET", "/schema/openapi.json", key=None)["paths"]
    for word in ("vps", "orchestrators"):
        assert {"200", "401", "403", "422", "503"} <= paths[f"/api/{word}/conflicts"]["get"]["responses"].keys()
        answers = paths[f"/api/{word}/conflicts/{{conflict_id}}/resolve"]["post"]["responses"]
        assert {"200", "400", "401", "403", "404", "409", "422", "503", "507"} <= answers.keys()
