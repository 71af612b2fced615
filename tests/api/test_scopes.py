"""Every route against every scope: one table says who may ask what, and a route that it lacks fails."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import httpx
import pytest
from serving import ControlPlane
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from orchestrator_fleet.api.app import create_app
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.keys import SCOPES, Scope


@dataclass(frozen=True)
class Needs:
    """`scope` (or, of `also`, another): a key of a person or a service with it may.

    `own`: an orchestrator's own key may with that on its own routes. `alone`: whatever scope it has, an orchestrator's
    key may nothing on the routes of another.
    """

    scope: Scope
    also: Scope | None = None
    own: Scope | None = None
    alone: bool = False

    def met_by(self, scope: str) -> bool:
        return scope in (self.scope, self.also, "admin")


READS, READS_TASKS = Needs("fleet:read"), Needs("tasks:read")
WRITES, WRITES_TASKS, WORKS = Needs("fleet:write"), Needs("tasks:write"), Needs("tasks:work")
ACTS = Needs("tasks:write", own="tasks:work", alone=True)
READS_OWN = Needs("fleet:read", own="tasks:work", alone=True)
STEERS, HAS_KEYS = Needs("fleet:write", alone=True), Needs("keys:write", alone=True)

OPEN = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/schema/openapi.json"),
    ("POST", "/api/vps/validate"),
    ("POST", "/api/orchestrators/validate"),
}
OF_TASKS = {
    ("GET", ""): READS_TASKS,
    ("POST", ""): WRITES_TASKS,
    ("POST", "/assign"): WRITES_TASKS,
    ("POST", "/bulk"): WRITES_TASKS,
    ("GET", "/poll"): WORKS,
    ("POST", "/poll"): WORKS,
    ("GET", "/{task_id}"): READS_TASKS,
    ("PUT", "/{task_id}"): WRITES_TASKS,
    ("DELETE", "/{task_id}"): WRITES_TASKS,
    **{("POST", f"/{{task_id}}/{verb}"): WORKS for verb in ("heartbeat", "complete", "fail", "release", "progress")},
    **{("POST", f"/{{task_id}}/{verb}"): WRITES_TASKS for verb in ("cancel", "retry", "unblock", "approve", "reject")},
    **{("GET", f"/{{task_id}}/{what}"): READS_TASKS for what in ("events", "log", "why")},
}
OF_ORCHESTRATORS = {
    ("GET", ""): READS,
    ("POST", ""): WRITES,
    ("GET", "/{vp}"): READS,
    ("PUT", "/{vp}"): WRITES,
    ("DELETE", "/{vp}"): WRITES,
    ("POST", "/{vp}/activate"): STEERS,
    ("POST", "/{vp}/deactivate"): STEERS,
    ("GET", "/{vp}/actions"): READS,
    ("POST", "/{vp}/actions"): STEERS,
    ("POST", "/bulk"): WRITES,
    ("POST", "/{vp}/api-key"): HAS_KEYS,
    ("DELETE", "/{vp}/api-key"): HAS_KEYS,
    ("POST", "/{vp}/api-key/rotate"): HAS_KEYS,
    ("GET", "/{vp}/backlog"): READS_TASKS,
    ("GET", "/{vp}/status"): READS,
    ("POST", "/{vp}/status"): ACTS,
    ("GET", "/{vp}/analytics"): READS,
    ("POST", "/{vp}/delegate"): ACTS,
    ("POST", "/{vp}/escalate"): ACTS,
    ("POST", "/{vp}/handoff"): ACTS,
    ("POST", "/{vp}/collaborate"): ACTS,
    ("GET", "/{vp}/coordinations"): READS_OWN,
    ("GET", "/{vp}/coordinations/{coordination_id}"): READS_OWN,
    ("POST", "/{vp}/coordinations/{coordination_id}/accept"): ACTS,
    ("POST", "/{vp}/coordinations/{coordination_id}/reject"): ACTS,
    ("POST", "/{vp}/conversations/initiate"): ACTS,
    ("GET", "/{vp}/conversations"): READS_OWN,
    ("GET", "/{vp}/conversations/{conversation_id}"): READS_OWN,
    ("GET", "/{vp}/inbox"): READS_OWN,
    ("POST", "/{vp}/inbox/seen"): ACTS,
    ("GET", "/conflicts"): READS,
    ("POST", "/conflicts/{conflict_id}/resolve"): WRITES,
}
TABLE: dict[tuple[str, str], Needs] = {
    **{(method, f"/api/tasks{path}"): needs for (method, path), needs in OF_TASKS.items()},
    **{
        (method, f"/api/{word}{path}"): needs
        for word in ("vps", "orchestrators")
        for (method, path), needs in OF_ORCHESTRATORS.items()
    },
    ("GET", "/api/events"): Needs("tasks:read", also="fleet:read"),
    ("GET", "/api/keys"): Needs("keys:write"),
    ("GET", "/api/audit"): READS,
    ("GET", "/api/fleet"): READS,
    ("GET", "/api/fleet/plan"): READS,
    ("POST", "/api/fleet/apply"): WRITES,
    ("GET", "/api/fleet/generations"): READS,
    ("POST", "/api/sql"): Needs("history:sql"),
    ("WEBSOCKET", "/ws/daemon"): WORKS,
}
# Nothing that is there, so that nothing comes of what is let through; and no JSON, for what has a body.
NOWHERE = {"vp": "vp-none", "task_id": "task-00000000000000000000000000"}
NO_JSON = b"{"
# Each handler once: what serves /api/vps is what serves /api/orchestrators, guards and all.
ROUTES = [route for route in sorted(TABLE) if "/api/orchestrators" not in route[1]]


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """With a person's key of each scope, and a key of vp-a's of each."""
    one = ControlPlane(tmp_path_factory.mktemp("scopes") / "home")
    for scope in SCOPES:
        one.declare(scope, owner="person:me", scopes=[scope])
        one.declare(f"vp-a:{scope}", owner="vp-a", scopes=[scope])
    one.write()
    yield one.start()
    one.close()


def _path(template: str, **given: str) -> str:
    names = {**NOWHERE, **given}
    return re.sub(r"{(\w+)}", lambda match: names.get(match[1], "none"), template)


def _unnamed(template: str) -> str:
    return re.sub(r"{\w+}", "{}", template)


def _asked(plane: ControlPlane, method: str, path: str, key: str | None) -> tuple[int, str]:
    """(status, code) of an answer; of one that never ends, its beginning."""
    headers = {} if key is None else {"Authorization": f"Bearer {plane.keys[key]}"}
    if method == "WEBSOCKET":
        return asyncio.run(_dialled(plane, path, headers))
    body = NO_JSON if method in ("POST", "PUT") else b""
    with httpx.stream(method, plane.url + path, headers=headers, content=body, timeout=20) as answer:
        if "json" not in answer.headers.get("content-type", ""):
            return answer.status_code, ""
        answer.read()
        document = answer.json()
        return answer.status_code, document.get("code", "") if isinstance(document, dict) else ""


async def _dialled(plane: ControlPlane, path: str, headers: dict[str, str]) -> tuple[int, str]:
    try:
        async with connect(plane.url.replace("http", "ws", 1) + path, additional_headers=headers, proxy=None):
            return 101, ""
    except InvalidStatus as refused:
        return refused.response.status_code, json.loads(refused.response.body or b"{}").get("code", "")


def _routes() -> set[tuple[str, str]]:
    """Every route of the app itself, in the document or not."""
    found = set()
    app: Any = create_app(cast("Plane", None))._app
    for route in app.routes:
        path = re.sub(r":\w+}", "}", route.path_format) or "/"
        methods = getattr(route, "methods", None) or {"WEBSOCKET"}
        found |= {(str(method), path) for method in methods if method != "OPTIONS"}
    return {one for one in found if not one[1].startswith("/schema")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_names_have_the_same_handlers() -> None:
    """So what is asked of one below holds for the other."""
    handlers = {
        route.path_format: {handler.fn for handler in route.route_handlers if "OPTIONS" not in handler.http_methods}
        for route in cast("Any", create_app(cast("Plane", None)))._app.routes
        if hasattr(route, "route_handlers")
    }
    of_vps = {path: found for path, found in handlers.items() if path.startswith("/api/vps")}
    assert of_vps == {
        path.replace("/api/orchestrators", "/api/vps"): found
        for path, found in handlers.items()
        if path.startswith("/api/orchestrators")
    }
    assert len(of_vps) > 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_table_has_every_route() -> None:
    """A route that is added must be added here too, and one that is gone must go."""
    tabled = {(method, _unnamed(path)) for method, path in {*TABLE, *OPEN} if "schema" not in path}
    routes = {(method, _unnamed(path)) for method, path in _routes()}
    assert not routes - tabled, "add these to the table of tests/api/test_scopes.py"
    assert not tabled - routes, "these are in the table, but are no routes"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_route_takes_its_scope_and_admin_and_no_other(plane: ControlPlane, method: str, path: str) -> None:
    """403 missing_scope for the others; with it the request gets to its own errors."""
    needs = TABLE[method, path]
    for scope in SCOPES:
        status, code = _asked(plane, method, _path(path), scope)
        assert ((status, code) == (403, "missing_scope")) == (not needs.met_by(scope)), (scope, status, code)
        assert needs.met_by(scope) <= (status not in (401, 403)), (scope, status, code)
        assert status < 500, (scope, status, code)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_an_orchestrators_key_acts_for_it_alone(plane: ControlPlane, method: str, path: str) -> None:
    """On the routes that act for one: 403 for another that is there and one that is not alike; but for `admin`."""
    needs = TABLE[method, path]
    if needs.own is not None:
        status, code = _asked(plane, method, _path(path, vp="vp-a"), f"vp-a:{needs.own}")
        assert status not in (401, 403), (status, code)
    if needs.alone:
        for scope in SCOPES:
            if scope == "admin":
                continue
            told = {_asked(plane, method, _path(path, vp=other), f"vp-a:{scope}") for other in ("vp-b", "vp-none")}
            expected = "forbidden" if needs.met_by(scope) else "missing_scope"
            assert told == {(403, expected)}, scope


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nope"), ("GET", "/api/nope"), ("WEBSOCKET", "/ws/no")])
def test_nothing_is_told_without_a_key(plane: ControlPlane, method: str, path: str) -> None:
    """401 for what is and what is not there alike."""
    assert _asked(plane, method, _path(path), None) == (401, "unauthorized")


@pytest.mark.parametrize(("method", "path"), sorted(OPEN))
def test_open_routes_need_no_key(plane: ControlPlane, method: str, path: str) -> None:
    """Health, the OpenAPI document and the check of a key."""
    body = {"api_key": "x"} if method == "POST" else None
    assert plane.ask(method, path, key=None, json=body).status_code == 200
