"""What people do to orchestrators over HTTP: actions, in bulk, and the log of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from peer import connected
from serving import ControlPlane, until
from test_tasks import drain, fields, problem

from orchestrator_fleet.clock import SystemClock
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.orchestrators import actions
from orchestrator_fleet.store.database import open_store

ALL = ("activate", "deactivate", "pause", "resume", "restart", "drain", "stop_sessions")
PAUSES = ("deactivate", "pause", "drain")
LINE = {"id", "orchestrator", "action", "state", "reason", "by", "at", "ended_at", "outcome", "detail", "duration_s"}


@pytest.fixture(scope="module")
def acting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running control plane of five orchestrators and no machine."""
    plane = ControlPlane(tmp_path_factory.mktemp("acting") / "home")
    plane.orchestrators |= {"vp-c": "eng", "vp-d": "law", "vp-e": "none"}
    for scope in ("fleet:write", "keys:write"):
        plane.declare(scope, owner="person:me", scopes=[scope])
    plane.declare("vp-a-acts", owner="vp-a", scopes=["fleet:write"])
    plane.write()
    yield plane.start()
    plane.close()


@pytest.fixture(autouse=True)
def afresh(acting: ControlPlane) -> Iterator[None]:
    """Nobody is paused or at work afterwards."""
    yield
    acting.json("POST", "/api/vps/bulk", json={"action": "activate", "ids": list(acting.orchestrators)})
    acting.json("POST", "/api/vps/bulk", json={"action": "stop_sessions", "ids": list(acting.orchestrators)})
    for name in {task["orchestrator"] for task in acting.json("GET", "/api/tasks?status=TODO")["data"]}:
        drain(acting, name)


def act(plane: ControlPlane, vp: str, action: str, *, code: int = 200, **more: Any) -> dict[str, Any]:
    done: dict[str, Any] = plane.json(
        "POST", f"/api/vps/{vp}/actions", code=code, json={"action": action, **more.pop("body", {})}, **more
    )
    return done


def log(plane: ControlPlane, vp: str, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = plane.json("GET", f"/api/vps/{vp}/actions?limit=100{query}")["data"]
    return found


def bulk(plane: ControlPlane, action: str, *, code: int = 200, key: str = "admin", **body: Any) -> list[dict[str, Any]]:
    answer = plane.json("POST", "/api/vps/bulk", code=code, key=key, json={"action": action, **body})
    assert (answer["action"], answer["dry_run"]) == (action, body.get("dry_run", False))
    results: list[dict[str, Any]] = answer["results"]
    assert answer["failed"] == sum(not one["ok"] for one in results)
    return results


def run(plane: ControlPlane, vp: str) -> dict[str, Any]:
    """A task that runs."""
    plane.add("runs", orchestrator=vp)
    (grant,) = plane.poll(vp, lease_s=3600)
    return grant


def finish(plane: ControlPlane, grant: dict[str, Any]) -> None:
    plane.json("POST", f"/api/tasks/{grant['task']['id']}/complete", json={"token": grant["lease"]["token"]})


def events(plane: ControlPlane, action_id: str) -> list[dict[str, Any]]:
    """What the outbox has of an action."""
    query = "select kind, actor, data from events where kind like 'action_%' order by id"
    rows = plane.json("POST", "/api/sql", json={"query": query})["rows"]
    found = [{"kind": kind, "actor": actor, **_data(data)} for kind, actor, data in rows]
    return [one for one in found if one["id"] == action_id]


def _data(data: Any) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(data) if isinstance(data, str) else data
    return decoded


@pytest.mark.parametrize(("off", "on"), [("pause", "resume"), ("deactivate", "activate")])
def test_a_pause_and_its_end(acting: ControlPlane, off: str, on: str) -> None:
    """Claims stop and go on, what runs goes on; the same again changes nothing; each is in the log with its actor."""
    grant = run(acting, "vp-a")
    soon = datetime.now(UTC) + timedelta(hours=1)
    done = act(acting, "vp-a", off, body={"reason": "a holiday", "until": soon.isoformat()}, key="fleet:write")
    assert set(done) == LINE | {"changed", "previous", "status", "status_reason", "paused"}
    assert (done["outcome"], done["changed"], done["previous"], done["status"]) == ("done", True, "OFFLINE", "AWAY")
    assert (done["paused"]["reason"], done["duration_s"]) == ("a holiday", 0)
    assert acting.declared[done["by"]]["scopes"] == ["fleet:write"]
    assert acting.task(grant["task"]["id"])["status"] == "IN_PROGRESS"
    acting.add("held", orchestrator="vp-a")
    assert acting.poll("vp-a") == []
    again = act(acting, "vp-a", off, body={"reason": "a holiday", "until": soon.isoformat()})
    assert (again["changed"], again["previous"]) == (False, "AWAY")
    resumed = act(acting, "vp-a", on)
    assert (resumed["changed"], resumed["status"], resumed["paused"]) == (True, "OFFLINE", None)
    assert act(acting, "vp-a", on)["changed"] is False
    assert [one["action"] for one in log(acting, "vp-a")[:4]] == [on, on, off, off]
    (event,) = events(acting, done["id"])
    assert (event["kind"], event["actor"]) == ("action_ended", done["by"])
    assert (event["before"]["status"], event["after"]["status"]) == ("OFFLINE", "AWAY")


def test_the_older_routes_stand_in_the_log(acting: ControlPlane) -> None:
    """/deactivate and /activate are the same actions."""
    off = acting.json("POST", "/api/vps/vp-b/deactivate", json={"reason": "x"})
    on = acting.json("POST", "/api/orchestrators/vp-b/activate")
    assert (off["changed"], off["id"], off["previous"], on["changed"]) == (True, "vp-b", "OFFLINE", True)
    newest, older = log(acting, "vp-b")[:2]
    assert (newest["id"], newest["action"]) == (on["action_id"], "activate")
    assert (older["id"], older["action"], older["reason"]) == (off["action_id"], "deactivate", "x")


def test_a_drain_goes_on_until_the_last_session_ends(acting: ControlPlane) -> None:
    """202 and `running`, seen at the orchestrator too; then done, by itself."""
    grant = run(acting, "vp-b")
    begun = act(acting, "vp-b", "drain", code=202)
    assert (begun["state"], begun["outcome"], begun["ended_at"]) == ("running", None, None)
    assert (begun["status"], begun["detail"]) == (
        "AWAY",
        "it claims nothing until it is activated; waits for 1 session to end",
    )
    shown = acting.json("GET", "/api/vps/vp-b")
    assert [(one["id"], one["state"]) for one in shown["actions"]] == [(begun["id"], "running")]
    refused = acting.ask("POST", "/api/vps/vp-b/actions", json={"action": "drain"})
    assert problem(refused) == (409, "in_progress")
    assert begun["id"] in refused.json()["detail"]
    finish(acting, grant)
    until(lambda: log(acting, "vp-b")[0]["outcome"], "it is drained")
    ended = log(acting, "vp-b")[0]
    assert (ended["id"], ended["outcome"], ended["detail"]) == (begun["id"], "done", "its last session has ended")
    assert ended["duration_s"] > 0
    shown = acting.json("GET", "/api/vps/vp-b")
    assert (shown["actions"], shown["status"]) == ([], "AWAY")
    assert [(one["kind"], one["state"]) for one in events(acting, begun["id"])] == [
        ("action_started", "running"),
        ("action_ended", "done"),
    ]


def test_a_drain_of_nobody_is_done_at_once_and_one_that_is_activated_has_failed(acting: ControlPlane) -> None:
    """200 and done; and the log says why it failed."""
    assert act(acting, "vp-c", "drain")["outcome"] == "done"
    acting.json("POST", "/api/vps/vp-c/activate")
    grant = run(acting, "vp-c")
    begun = act(acting, "vp-c", "drain", code=202)
    acting.json("POST", "/api/vps/vp-c/activate")
    (ended,) = [one for one in log(acting, "vp-c") if one["id"] == begun["id"]]
    assert (ended["outcome"], ended["detail"]) == ("failed", "it was activated before its last session ended")
    finish(acting, grant)


def test_stopped_sessions_are_ended_at_their_daemon_and_stand_in_line(acting: ControlPlane) -> None:
    """The daemon is told; the orchestrator is not paused, and claims them again."""

    async def scenario() -> None:
        async with connected(acting, "vp-d") as (peer, _):
            ask = asyncio.to_thread
            task = await ask(acting.add, "stopped", orchestrator="vp-d")
            (grant,) = await peer.claim()
            done = await ask(act, acting, "vp-d", "stop_sessions", body={"reason": "too hot"})
            assert (done["changed"], done["outcome"], done["paused"]) == (True, "done", None)
            assert done["detail"] == "1 session ended, the tasks stand in line again"
            told = await peer.cancelled()
            assert (told.task, told.token) == (task["id"], grant.token)
            assert "too hot" in told.reason
            (again,) = await peer.claim()
            assert (again.task["id"], again.attempt) == (task["id"], 2)
            assert (await ask(act, acting, "vp-d", "resume"))["changed"] is False
            await peer.finish(again)
            assert (await ask(act, acting, "vp-d", "stop_sessions"))["changed"] is False

    asyncio.run(scenario())


def test_a_restart_without_a_machine_is_refused_and_in_the_log(acting: ControlPlane) -> None:
    """409 `not_running`; the machine's folder is not made for it."""
    refused = acting.ask("POST", "/api/vps/vp-e/actions", json={"action": "restart", "reason": "stuck"})
    assert problem(refused) == (409, "not_running")
    assert refused.json()["detail"] == "m01: no supervisord runs there; `fleet apply` starts it"
    (line,) = log(acting, "vp-e", "&action=restart")
    assert (line["outcome"], line["reason"], line["detail"]) == ("failed", "stuck", refused.json()["detail"])
    assert not Layout(acting.state / "machines/m01").root.exists()


def test_a_machine_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    """409 `unreachable` for an address that is not local, in bulk and in a dry run as well."""
    plane = ControlPlane(tmp_path / "home")
    plane.write()
    text = (plane.home / "fleet.yaml").read_text()
    (plane.home / "fleet.yaml").write_text(text.replace("m01: {}", 'm01: {address: "ssh://ops@far.example"}'))
    try:
        plane.start()
        refused = plane.ask("POST", "/api/vps/vp-a/actions", json={"action": "restart"})
        assert problem(refused) == (409, "unreachable")
        assert "only `address: local`" in refused.json()["detail"]
        for dry_run in (False, True):
            (one,) = bulk(plane, "restart", ids=["vp-a"], code=207, dry_run=dry_run)
            assert one["error"]["code"] == "unreachable"
    finally:
        plane.close()


@pytest.mark.parametrize("action", ALL)
def test_until_is_for_pauses_and_in_the_future(acting: ControlPlane, action: str) -> None:
    """422 on `until`."""
    path = "/api/vps/vp-e/actions"
    past, soon = "2020-01-01T00:00:00Z", (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert fields(acting.ask("POST", path, json={"action": action, "until": past})) == {"until"}
    refused = acting.ask("POST", path, json={"action": action, "until": soon})
    assert (refused.status_code == 200) if action in PAUSES else (fields(refused) == {"until"})


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, {"action"}),
        ({"action": "destroy", "reason": 1}, {"action", "reason"}),
        ({"action": "pause", "reason": "a\0b"}, {"reason"}),
        ({"action": "pause", "force": True, "until": "soon"}, {"force", "until"}),
        ({"action": None}, {"action"}),
    ],
)
def test_what_is_no_action_is_refused_all_at_once(acting: ControlPlane, body: dict[str, Any], named: set[str]) -> None:
    """422, and nothing is done or written down."""
    before = log(acting, "vp-e")
    assert fields(acting.ask("POST", "/api/vps/vp-e/actions", json=body)) == named
    assert problem(acting.ask("POST", "/api/vps/vp-e/actions", content=b"{")) == (400, "malformed_json")
    assert log(acting, "vp-e") == before


def test_who_may_act(acting: ControlPlane) -> None:
    """The scope is needed; an orchestrator's own key acts for it alone, and learns nothing of others."""
    body = {"json": {"action": "resume"}}
    for path in ("/api/vps/vp-a/actions", "/api/vps/vp-a/activate", "/api/vps/vp-a/deactivate"):
        assert problem(acting.ask("POST", path, key="tasks:write", **body)) == (403, "missing_scope")
        assert problem(acting.ask("POST", path, key="vp-b", **body)) == (403, "missing_scope")
    for other in ("vp-b", "vp-none"):
        refused = acting.ask("POST", f"/api/vps/{other}/actions", key="vp-a-acts", **body)
        assert problem(refused) == (403, "forbidden")
    assert act(acting, "vp-a", "resume", key="vp-a-acts")["outcome"] == "done"
    assert problem(acting.ask("POST", "/api/vps/vp-none/actions", **body)) == (404, "not_found")
    assert problem(acting.ask("GET", "/api/vps/vp-none/actions")) == (404, "not_found")
    assert problem(acting.ask("GET", "/api/vps/vp-a/actions", key="tasks:read")) == (403, "missing_scope")
    assert acting.ask("GET", "/api/orchestrators/vp-a/actions", key="fleet:read").status_code == 200
    assert problem(acting.ask("POST", "/api/vps/bulk", key="tasks:write", json={})) == (403, "missing_scope")


def test_the_log_has_pages_and_a_filter(acting: ControlPlane) -> None:
    """Newest first, nothing twice; a cursor that is none is 422."""
    for action in ("pause", "resume", "pause", "resume", "stop_sessions"):
        act(acting, "vp-d", action)
    path, seen, cursor = "/api/vps/vp-d/actions?action=pause,resume&action=stop_sessions&limit=2", [], ""
    while True:
        page = acting.json("GET", path + cursor)
        seen += [one["id"] for one in page["data"]]
        if page["pagination"]["next_cursor"] is None:
            break
        cursor = f"&cursor={page['pagination']['next_cursor']}"
    assert len(seen) == len(set(seen)) == page["pagination"]["total"]
    assert seen == [one["id"] for one in log(acting, "vp-d", "&action=pause,resume,stop_sessions")]
    assert set(log(acting, "vp-d")[0]) == LINE
    for wrong in ("x", "MA", "LTE", "bm9wZQ", "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5", "%00", "dHJ1ZQ"):
        assert fields(acting.ask("GET", f"/api/vps/vp-d/actions?cursor={wrong}")) == {"cursor"}, wrong
    assert fields(acting.ask("GET", "/api/vps/vp-d/actions?action=explode")) == {"action"}
    assert fields(acting.ask("GET", "/api/vps/vp-d/actions?actions=pause")) == {"actions"}


@pytest.mark.parametrize("action", ["pause", "drain"])
def test_a_repeated_request_is_answered_as_before(acting: ControlPlane, action: str) -> None:
    """And done once; with another body it is 409."""
    path, headers = "/api/vps/vp-e/actions", {"Idempotency-Key": f"once-{action}"}
    first = acting.ask("POST", path, json={"action": action}, headers=headers)
    length = len(log(acting, "vp-e"))
    again = acting.ask("POST", path, json={"action": action}, headers=headers)
    assert (first.status_code, again.json()) == (200, first.json())
    assert len(log(acting, "vp-e")) == length
    other = acting.ask("POST", path, json={"action": "resume"}, headers=headers)
    assert problem(other) == (409, "idempotency_key_reused")


def test_a_refused_restart_may_be_tried_again_under_its_key(acting: ControlPlane) -> None:
    """Nothing was done, so nothing is remembered."""
    headers = {"Idempotency-Key": "restart-once"}
    before = len(log(acting, "vp-e"))
    for _ in range(2):
        refused = acting.ask("POST", "/api/vps/vp-e/actions", json={"action": "restart"}, headers=headers)
        assert problem(refused) == (409, "not_running")
    assert len(log(acting, "vp-e")) == before + 2


def test_bulk_does_each_in_the_asked_order(acting: ControlPlane) -> None:
    """200 when all are done; by `/orchestrators` too."""
    results = bulk(acting, "pause", ids=["vp-c", "vp-a", "vp-b"], reason="all of you")
    assert [(one["id"], one["ok"], one["changed"], one["status"]) for one in results] == [
        (name, True, True, "AWAY") for name in ("vp-c", "vp-a", "vp-b")
    ]
    for one in results:
        assert log(acting, one["id"])[0]["id"] == one["action_id"]
        assert log(acting, one["id"])[0]["reason"] == "all of you"
    again = bulk(acting, "pause", ids=["vp-c", "vp-a"], reason="all of you")
    assert [one["changed"] for one in again] == [False, False]
    answer = acting.json("POST", "/api/orchestrators/bulk", json={"action": "resume", "ids": ["vp-a"]})
    assert answer["results"][0]["previous"] == "AWAY"


def test_bulk_leaves_done_what_was_done_beside_a_refusal(acting: ControlPlane) -> None:
    """207; all failed is 207 as well."""
    results = bulk(acting, "pause", ids=["vp-a", "vp-none", "vp-b"], code=207)
    assert [one["ok"] for one in results] == [True, False, True]
    assert results[1]["error"] == {"code": "not_found", "message": "there is no orchestrator vp-none"}
    assert acting.json("GET", "/api/vps/vp-b")["paused"] is not None
    assert [one["ok"] for one in bulk(acting, "pause", ids=["vp-x", "vp-y"], code=207)] == [False, False]
    restarted = bulk(acting, "restart", ids=["vp-a", "vp-b", "vp-none"], code=207)
    assert [one["error"]["code"] for one in restarted] == ["not_running", "not_running", "not_found"]


def test_bulk_by_selector(acting: ControlPlane) -> None:
    """All labels, any of the disciplines, by name; nobody is 200 with nothing."""
    assert [one["id"] for one in bulk(acting, "pause", selector={"discipline": "eng"})] == ["vp-a", "vp-c"]
    chosen = {"discipline": ["law", "ops"], "labels": {"trade": "law"}}
    assert [one["id"] for one in bulk(acting, "pause", selector=chosen)] == ["vp-d"]
    assert bulk(acting, "pause", selector={"labels": {"trade": "eng", "no": "label"}}) == []
    for wrong, named in (
        ({"selector": {}}, {"selector"}),
        ({"selector": {"labels": {}, "discipline": []}}, {"selector"}),
        ({}, {"ids"}),
        ({"ids": ["vp-a"], "selector": {"discipline": "eng"}}, {"ids"}),
        ({"ids": []}, {"ids"}),
        ({"ids": ["vp-a", "vp-b", "vp-a"]}, {"ids"}),
        ({"ids": ["vp-a"], "until": "2030-01-01T00:00:00Z"}, {"until"}),
        ({"ids": ["Not A Name", "x\0"]}, {"ids[0]"}),
        ({"ids": [f"vp-{n}" for n in range(101)]}, {"ids"}),
        ({"selector": {"discipline": 5, "label": {}}}, {"selector.discipline", "selector.label"}),
    ):
        assert fields(acting.ask("POST", "/api/vps/bulk", json={"action": "pause", **wrong})) == named, wrong


def test_a_dry_run_says_whom_it_would_change_and_changes_nothing(acting: ControlPlane) -> None:
    """Not even the log."""
    act(acting, "vp-a", "pause")
    grant = run(acting, "vp-b")
    logs = {name: log(acting, name) for name in ("vp-a", "vp-b")}
    shown = {name: acting.json("GET", f"/api/vps/{name}") for name in ("vp-a", "vp-b")}
    would = {
        action: [one.get("would_change") for one in bulk(acting, action, ids=["vp-a", "vp-b"], dry_run=True)]
        for action in ALL
    }
    assert would == {
        "activate": [True, False],
        "resume": [True, False],
        "deactivate": [False, True],
        "pause": [False, True],
        "drain": [False, True],
        "stop_sessions": [False, True],
        "restart": [True, True],
    }
    assert bulk(acting, "pause", ids=["vp-none"], dry_run=True, code=207)[0]["error"]["code"] == "not_found"
    assert {name: log(acting, name) for name in logs} == logs
    assert {name: acting.json("GET", f"/api/vps/{name}")["paused"] for name in shown} == {
        name: one["paused"] for name, one in shown.items()
    }
    assert acting.task(grant["task"]["id"])["status"] == "IN_PROGRESS"


def test_an_orchestrators_own_key_does_itself_in_bulk(acting: ControlPlane) -> None:
    """The others are forbidden, whether there are such or not; a selector means nobody else."""
    results = bulk(acting, "pause", ids=["vp-b", "vp-a", "vp-none"], key="vp-a-acts", code=207)
    assert [one["ok"] for one in results] == [False, True, False]
    assert {one["error"]["code"] for one in results if not one["ok"]} == {"forbidden"}
    assert [one["id"] for one in bulk(acting, "pause", selector={"discipline": "eng"}, key="vp-a-acts")] == ["vp-a"]
    assert acting.json("GET", "/api/vps/vp-b")["paused"] is None


def test_a_repeated_bulk_is_answered_as_before(acting: ControlPlane) -> None:
    """Of many at once under one key one is done; the others get its answer, or are told that it goes on."""
    names, headers = list(acting.orchestrators), {"Idempotency-Key": "bulk-once"}
    body = {"action": "pause", "ids": names}

    def ask(_: int) -> Any:
        return acting.ask("POST", "/api/vps/bulk", json=body, headers=headers)

    before = {name: len(log(acting, name)) for name in names}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    done = [one for one in answers if one.status_code == 200]
    assert done
    assert all(one.json() == done[0].json() for one in done)
    assert {problem(one) for one in answers if one.status_code != 200} <= {(409, "in_progress")}
    assert ask(0).json() == done[0].json()
    assert {name: len(log(acting, name)) for name in names} == {name: n + 1 for name, n in before.items()}
    other = acting.ask("POST", "/api/vps/bulk", json={**body, "action": "resume"}, headers=headers)
    assert problem(other) == (409, "idempotency_key_reused")


def test_static_paths_are_no_orchestrators(acting: ControlPlane) -> None:
    """`bulk` is a route, not a name."""
    assert fields(acting.ask("POST", "/api/vps/bulk", json={})) == {"action"}
    assert acting.ask("GET", "/api/vps/vp-a").status_code == 200


def test_a_restart_whose_control_plane_was_killed_is_closed_at_the_next_start(control_plane: ControlPlane) -> None:
    """As failed; a drain goes on and ends when the session does."""
    plane = control_plane.start()
    grant = run(plane, "vp-b")
    drained = act(plane, "vp-b", "drain", code=202)
    plane.stop(9)
    store = open_store(plane.store)
    now_us = SystemClock().now_us()
    begun = store.write_sync(
        lambda conn: actions.begin(
            conn, orchestrator="vp-a", action="restart", reason=None, actor="k-x", now_us=now_us, before={}
        )
    )
    store.close()
    plane.start()
    (line,) = log(plane, "vp-a")
    assert (line["id"], line["outcome"], line["detail"]) == (begun.id, "failed", "the control plane ended")
    assert events(plane, begun.id)[-1]["actor"] == "system"
    assert [one["id"] for one in plane.json("GET", "/api/vps/vp-b")["actions"]] == [drained["id"]]
    finish(plane, grant)
    until(lambda: log(plane, "vp-b")[0]["outcome"] == "done", "it is drained")
