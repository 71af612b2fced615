"""Keys that are good and keys that are not; what each route says it answers."""

from __future__ import annotations

import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from serving import ControlPlane


@pytest.mark.parametrize(
    ("method", "path", "answers"),
    [
        ("get", "/api/tasks", "200 401 403 422 429 503"),
        ("post", "/api/tasks", "201 400 401 403 409 413 422 429 503 507"),
        ("get", "/api/tasks/{task_id}", "200 401 403 404 422 429 503"),
        ("put", "/api/tasks/{task_id}", "200 400 401 403 404 409 412 413 422 429 503 507"),
        ("delete", "/api/tasks/{task_id}", "204 401 403 404 409 422 429 503 507"),
        ("post", "/api/tasks/assign", "200 207 400 401 403 409 413 422 429 503 507"),
        ("get", "/api/tasks/poll", "200 401 403 422 429 503 507"),
        ("post", "/api/vps/{vp}/deactivate", "200 400 401 403 404 409 413 422 429 503 507"),
        ("get", "/api/events", "200 401 403 422 429 503"),
        ("post", "/api/tasks/{task_id}/retry", "200 201 400 401 403 404 409 413 422 429 503 507"),
        ("post", "/api/vps/validate", "200 400 413 422 429 503"),
    ],
)
def test_the_document_lists_what_a_route_answers(shared: ControlPlane, method: str, path: str, answers: str) -> None:
    """The good answers and the problems, which all have one shape."""
    document = shared.json("GET", "/schema/openapi.json")
    responses = document["paths"][path][method]["responses"]
    assert sorted(responses) == answers.split()
    (content,) = responses["422"]["content"].items()
    assert content == ("application/problem+json", {"schema": {"$ref": "#/components/schemas/ProblemDetails"}})
    assert "code" in document["components"]["schemas"]["ProblemDetails"]["properties"]


@pytest.mark.parametrize(
    "header", ["", "Bearer", "bearer x", "Basic eDp5", "Bearer nonsense", "Bearer fleet_k-1_2_3", "é"]
)
def test_a_header_that_is_no_key_is_401(shared: ControlPlane, header: str) -> None:
    """Whatever stands there."""
    answer = httpx.get(f"{shared.url}/api/tasks", headers={b"Authorization": header.encode()})
    assert answer.status_code == 401


def _key(plane: ControlPlane, **fields: Any) -> str:
    plane.declare("probe", owner="service:probe", scopes=["tasks:read"], **fields)
    return plane.keys["probe"]


def test_expired_and_revoked_keys_are_told_apart_only_by_validate(control_plane: ControlPlane) -> None:
    """On every other route they are 401 like an unknown one."""
    now = datetime.now(UTC)
    past, future = (now - timedelta(hours=1)).isoformat(), (now + timedelta(hours=1)).isoformat()
    texts = {
        "expired": _key(control_plane, expires=past),
        "revoked": _key(control_plane, revoked=past),
        "good": _key(control_plane, expires=future, revoked=future),
    }
    known = control_plane.keys["admin"]
    texts["malformed"] = known[:-1] + ("0" if known[-1] != "0" else "1")
    control_plane.write()
    control_plane.start()
    for reason, text in texts.items():
        told = control_plane.json("POST", "/api/vps/validate", key=None, json={"api_key": text})
        answer = httpx.get(f"{control_plane.url}/api/tasks", headers={"Authorization": f"Bearer {text}"})
        if reason == "good":
            assert told["valid"]
            assert (told["vp"], told["owner"]) == (None, "service:probe")
            assert told["key"]["scopes"] == ["tasks:read"]
            assert datetime.fromisoformat(told["key"]["expires_at"]) == datetime.fromisoformat(future)
            assert answer.status_code == 200
        else:
            assert told == {"valid": False, "reason": reason}
            assert answer.status_code == 401


def test_validate_knows_unknown_keys_and_missing_scopes(shared: ControlPlane) -> None:
    """And says which orchestrator a key is of."""
    unknown = "fleet_k-00000000_" + "0" * 64
    text = f"{unknown}_{zlib.crc32(unknown.encode()):08x}"
    for body, expected in (
        ({"api_key": text}, {"valid": False, "reason": "unknown"}),
        ({"api_key": ""}, {"valid": False, "reason": "malformed"}),
        (
            {"api_key": shared.keys["vp-a"], "required_scopes": ["history:sql"]},
            {"valid": False, "reason": "missing_scope"},
        ),
    ):
        assert shared.json("POST", "/api/orchestrators/validate", key=None, json=body) == expected
    good = {"api_key": shared.keys["vp-a"], "required_scopes": ["tasks:work"]}
    told = shared.json("POST", "/api/vps/validate", key=None, json=good)
    assert (told["vp"], told["owner"]) == ("vp-a", "vp-a")


def test_validate_is_limited_by_caller(control_plane: ControlPlane) -> None:
    """429 with Retry-After, not a guess more."""
    control_plane.start()
    with httpx.Client(base_url=control_plane.url) as client:
        for _ in range(2_000):
            answer = client.post("/api/vps/validate", json={"api_key": "x"})
            if answer.status_code != 200:
                break
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["code"] == "too_many_requests"


def test_an_orchestrators_key_claims_for_itself_alone(shared: ControlPlane) -> None:
    """Without `orchestrator` it is the key's owner; another's, and what exists at all, is for admin alone."""
    assert shared.ask("POST", "/api/tasks/poll", key="vp-a", json={}).status_code == 200
    for other in ("vp-b", "vp-nobody"):
        for key in ("vp-a", "tasks:work"):
            answer = shared.ask("POST", "/api/tasks/poll", key=key, json={"orchestrator": other})
            assert (answer.status_code, answer.json()["code"]) == (403, "missing_scope")
    assert shared.ask("POST", "/api/tasks/poll", key="admin", json={"orchestrator": "vp-b"}).status_code == 200


def test_no_key_ever_stands_in_the_log(shared: ControlPlane) -> None:
    """Not even when it was sent where it does not belong."""
    shared.ask("GET", f"/api/tasks/{shared.keys['admin']}")
    shared.ask("GET", "/api/tasks")
    for text in shared.keys.values():
        assert text not in shared.log
        assert text.split("_")[2] not in shared.log
