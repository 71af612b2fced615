"""What the contract of `/api/tasks` says beyond the plain way: statuses, headers, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from serving import ControlPlane
from test_tasks import drain, problem

# Each body's fields get values of every kind, under an allocator that notices what was written where it must not be.
HOSTILE_VALUES = """
import gc, msgspec
from orchestrator_fleet.api.bodies import from_dict
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.wire import http, vps
values = [None, 1, -1, 1.5, True, "x", "TODO", "2026-01-01T00:00:00Z", [], ["TODO"], [1], [["x"]], {}, {"a": 1}]
values.append({field: ["x"] for field in http.TaskFilter.__struct_fields__})
values.append({"labels": {"a": "b"}, "discipline": ["x"]})
named = [*vars(http).values(), *vars(vps).values()]
for kind in [one for one in named if isinstance(one, type) and issubclass(one, http.Body)]:
    for value in values:
        for _ in range(20):
            try:
                from_dict({field.encode_name: value for field in msgspec.structs.fields(kind)}, kind)
            except Invalid:
                pass
gc.collect()
print("unharmed")
"""


def test_no_body_harms_the_memory() -> None:
    """Not every union of types is safe in msgspec."""
    env = {**os.environ, "PYTHONMALLOC": "debug"}
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE_VALUES], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "unharmed\n"), done.stderr[-2_000:]


@pytest.mark.parametrize(
    ("status", "wanted", "named"),
    [
        ("TODO", "IN_PROGRESS", "only a claim"),
        ("TODO", "DONE", "IN_PROGRESS, BLOCKED, CANCELLED"),
        ("BLOCKED", "IN_PROGRESS", "TODO, CANCELLED"),
        ("CANCELLED", "TODO", "final"),
        ("CANCELLED", "BLOCKED", "final"),
        ("DONE", "CANCELLED", "final"),
    ],
)
def test_a_status_off_the_table_names_the_legal_ones(
    shared: ControlPlane, status: str, wanted: str, named: str
) -> None:
    """409 `invalid_transition`, and nothing changes."""
    task = shared.add("table", orchestrator="vp-b")
    if status == "DONE":
        drain(shared, "vp-b")
    elif status != "TODO":
        shared.json("PUT", f"/api/tasks/{task['id']}", json={"status": status})
    before = shared.task(task["id"])
    refused = shared.ask("PUT", f"/api/tasks/{task['id']}", json={"status": wanted})
    assert problem(refused) == (409, "invalid_transition")
    assert named in refused.json()["detail"]
    assert shared.task(task["id"]) == before
    drain(shared, "vp-b")


def test_a_running_task_moves_by_a_persons_word(shared: ControlPlane) -> None:
    """To DONE, back to TODO, to BLOCKED; its holder has lost it then."""
    for wanted in ("DONE", "TODO", "BLOCKED"):
        task = shared.add("runs", orchestrator="vp-b")
        (grant,) = shared.poll("vp-b")
        moved = shared.json("PUT", f"/api/tasks/{task['id']}", json={"status": wanted})
        assert moved["status"] == wanted
        late = shared.ask("POST", f"/api/tasks/{task['id']}/heartbeat", json={"token": grant["lease"]["token"]})
        assert problem(late) == (409, "lease_lost")
        shared.ask("POST", f"/api/tasks/{task['id']}/cancel")


def test_an_ended_task_is_edited_no_more(shared: ControlPlane) -> None:
    """409 `final` says what to do."""
    task = shared.add("ended", orchestrator="vp-b")
    drain(shared, "vp-b")
    refused = shared.ask("PUT", f"/api/tasks/{task['id']}", json={"title": "x"})
    assert problem(refused) == (409, "final")
    assert "retry it" in refused.json()["detail"]


def test_retry_of_a_done_task_answers_where_the_new_one_is(shared: ControlPlane) -> None:
    """201 with Location and ETag."""
    task = shared.add("done", orchestrator="vp-b")
    drain(shared, "vp-b")
    answer = shared.ask("POST", f"/api/tasks/{task['id']}/retry")
    assert (answer.status_code, answer.json()["parent"]) == (201, task["id"])
    assert answer.headers["location"] == f"/api/tasks/{answer.json()['id']}"
    assert answer.headers["etag"] == '"1"'
    drain(shared, "vp-b")


def test_a_stale_version_is_refused_before_anything_is_done(shared: ControlPlane) -> None:
    """412 also for a status or an orchestrator alone."""
    task = shared.add("versions", orchestrator="vp-b")
    path = f"/api/tasks/{task['id']}"
    shared.json("PUT", path, json={"title": "newer"})
    for body in ({"status": "CANCELLED"}, {"orchestrator": "vp-a"}, {"title": "older"}):
        assert problem(shared.ask("PUT", path, json=body, headers={"If-Match": '"1"'})) == (412, "stale")
    assert (shared.task(task["id"])["title"], shared.task(task["id"])["version"]) == ("newer", 2)
    drain(shared, "vp-b")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_poll_is_kept_by_a_cache(shared: ControlPlane, method: str) -> None:
    """Empty or not."""
    asked: dict[str, Any] = {"json": {"orchestrator": "vp-b"}} if method == "POST" else {}
    path = "/api/tasks/poll" + ("" if method == "POST" else "?orchestrator=vp-b")
    empty = shared.ask(method, path, **asked)
    assert (empty.json()["data"], empty.headers["cache-control"]) == ([], "no-store")
    shared.add("polled", orchestrator="vp-b")
    full = shared.ask(method, path, **asked)
    assert (len(full.json()["data"]), full.headers["cache-control"]) == (1, "no-store")
    grant = full.json()["data"][0]
    shared.json("POST", f"/api/tasks/{grant['task']['id']}/complete", json={"token": grant["lease"]["token"]})


def test_another_ones_line_needs_admin(shared: ControlPlane) -> None:
    """Its own does not, and is the default."""
    assert problem(shared.ask("GET", "/api/tasks/poll?orchestrator=vp-b", key="vp-a")) == (403, "missing_scope")
    assert shared.ask("GET", "/api/tasks/poll", key="vp-a").status_code == 200


def test_a_spent_quota_is_no_failure(control_plane: ControlPlane) -> None:
    """The task waits, no attempt is spent, and its orchestrator claims nothing until then."""
    plane = control_plane.start()
    task = plane.add("thirsty", orchestrator="vp-b", max_attempts=1)
    (grant,) = plane.poll("vp-b")
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    error = {"message": "429 from the provider", "quota_until": until}
    path = f"/api/tasks/{task['id']}"
    waits = plane.json("POST", f"{path}/fail", json={"token": grant["lease"]["token"], "error": error})
    assert (waits["status"], waits["blocked_reason"]) == ("BLOCKED", "quota")
    other = plane.add("other", orchestrator="vp-b")
    answer = plane.json("POST", "/api/tasks/poll", json={"orchestrator": "vp-b"})
    assert answer["data"] == []
    assert "quota" in answer["reason"]
    held = plane.json("GET", f"/api/tasks/{other['id']}/why")["holds"]
    assert "quota" in [hold["kind"] for hold in held]
    assert plane.json("POST", "/api/vps/vp-b/activate")["changed"] is True
    (again,) = plane.poll("vp-b")
    assert again["task"]["id"] == task["id"]
    plane.json("POST", f"{path}/complete", json={"token": again["lease"]["token"]})
    assert [one["task"]["id"] for one in plane.poll("vp-b")] == [other["id"]]


def test_every_route_of_tasks_is_documented_with_its_problems(shared: ControlPlane) -> None:
    """Streams with their media type; 404 where there is an id; 409 and 507 for writes."""
    paths = shared.json("GET", "/schema/openapi.json", key=None)["paths"]
    for verb in ("approve", "reject", "cancel", "retry", "unblock", "complete", "fail"):
        answers = paths[f"/api/tasks/{{task_id}}/{verb}"]["post"]["responses"]
        assert {"401", "403", "404", "409", "422", "503", "507"} <= answers.keys(), verb
    assert "207" in paths["/api/tasks/bulk"]["post"]["responses"]
    for path in ("/api/tasks/{task_id}/events", "/api/tasks/{task_id}/log", "/api/events"):
        assert "text/event-stream" in paths[path]["get"]["responses"]["200"]["content"], path
    for prefix in ("vps", "orchestrators"):
        for route in ("backlog", "activate", "deactivate"):
            assert f"/api/{prefix}/{{vp}}/{route}" in paths
    assert "/api/tasks/{task_id}/why" in paths
