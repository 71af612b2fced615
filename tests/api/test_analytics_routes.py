"""`/api/vps/{id}/analytics`: from what happened over HTTP to its numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from serving import ControlPlane
from test_tasks import drain, fields, problem

COUNTS = ("completed", "failed", "cancelled", "retries", "escalations")
OTHERS = ("success_rate", "tokens", "usd", "on_time_rate")


def analytics(plane: ControlPlane, query: str = "", *, of: str = "vp-b", path: str = "vps") -> dict[str, Any]:
    answer: dict[str, Any] = plane.json("GET", f"/api/{path}/{of}/analytics{query}", key="fleet:read")
    return answer


def test_what_was_done_a_moment_ago_is_counted(control_plane: ControlPlane) -> None:
    """By who completed it, to the last commit, in the summary and in the newest bucket alike."""
    plane = control_plane.start()
    moved = plane.add("moved", orchestrator="vp-a", due_at="2999-01-01T00:00:00Z")
    plane.json("POST", "/api/tasks/assign", json={"task_ids": [moved["id"]], "orchestrator": "vp-b"})
    (grant,) = plane.poll("vp-b")
    usage = {"input_tokens": 100, "output_tokens": 20, "cache_read_tokens": 5_000, "usd": 0.25}
    done = {"token": grant["lease"]["token"], "usage": usage}
    plane.json("POST", f"/api/tasks/{moved['id']}/complete", json=done)
    fails = plane.add("fails", orchestrator="vp-b", max_attempts=1)
    (grant,) = plane.poll("vp-b")
    error = {"token": grant["lease"]["token"], "error": {"message": "no", "retryable": False}}
    plane.json("POST", f"/api/tasks/{fails['id']}/fail", json=error)
    gone = plane.add("gone", orchestrator="vp-b")
    plane.json("POST", f"/api/tasks/{gone['id']}/cancel")
    unhappy = plane.add("unhappy", orchestrator="vp-b")
    plane.json("POST", "/api/vps/vp-b/escalate", code=201, json={"task": unhappy["id"], "reason": "what now?"})

    answer = analytics(plane, "?range=24h&bucket=hour")
    summary = answer["summary"]
    assert {name: summary[name] for name in COUNTS} == {
        "completed": 1,
        "failed": 1,
        "cancelled": 1,
        "retries": 0,
        "escalations": 1,
    }
    assert {name: summary[name] for name in OTHERS} == {
        "success_rate": 0.5,
        "tokens": 120,
        "usd": 0.25,
        "on_time_rate": 1.0,
    }
    assert 0 <= summary["run_time_s"]["p50"] <= summary["lead_time_s"]["p99"] < 60
    newest = answer["series"][-1]
    if newest["completed"]:  # else the hour has just turned
        assert {name: newest[name] for name in summary} == summary
    assert newest["end"] == answer["to"]
    assert sum(one["completed"] for one in answer["series"]) == 1
    assert len(answer["series"]) in (24, 25)
    assert (answer["series"][0]["start"], answer["previous"]["completed"]) == (answer["from"], 0)
    assert set(answer["trend"]) == set(summary)
    assert analytics(plane, of="vp-a")["summary"]["completed"] == 0
    in_sql = "select completed, failed, tokens from analytics('vp-b', now() - interval 1 day, now())"
    assert plane.json("POST", "/api/sql", json={"query": in_sql})["rows"] == [[1, 1, 120]]


def test_an_orchestrator_without_a_past_has_no_numbers(shared: ControlPlane) -> None:
    """Counts are 0 and the rest is null; nobody declared is 404; both words for the path are the same."""
    answer = analytics(shared, path="orchestrators")
    assert (answer["range"], answer["bucket"]) == ("7d", "day")
    assert all(answer["summary"][name] == 0 for name in ("failed", "retries", "escalations"))
    assert {answer["summary"][name] for name in ("tokens", "usd", "on_time_rate")} == {None}
    assert set(answer["trend"].values()) == {None}
    to = datetime.fromisoformat(answer["to"])
    assert to - datetime.fromisoformat(answer["from"]) == timedelta(days=7)
    assert abs(datetime.now(UTC) - to) < timedelta(minutes=1)
    for name in ("vp-none", "conflicts", "..%2f", "%00"):
        assert problem(shared.ask("GET", f"/api/vps/{name}/analytics")) == (404, "not_found")
    assert problem(shared.ask("GET", "/api/vps/vp-b/analytics", key="tasks:read")) == (403, "missing_scope")


@pytest.mark.parametrize(
    "query", ["range=1d", "range=", "bucket=minute", "range=7d'--", "range=%00", "since=2026", "range=7d&bucket=Day"]
)
def test_a_wrong_query_names_its_field(shared: ControlPlane, query: str) -> None:
    """422."""
    wrong = {pair.partition("=")[0] for pair in query.split("&") if pair != "range=7d"}
    assert fields(shared.ask("GET", f"/api/vps/vp-b/analytics?{query}")) == wrong


def test_both_wrong_words_are_told_at_once(shared: ControlPlane) -> None:
    """Not one after the other."""
    assert fields(shared.ask("GET", "/api/vps/vp-b/analytics?range=x&bucket=y")) == {"range", "bucket"}


def test_a_long_history_by_hours_is_refused(control_plane: ControlPlane) -> None:
    """422 says which bucket to take; `all` begins with the first that is known of it."""
    plane = control_plane.start()
    plane.add("old", orchestrator="vp-b")
    drain(plane, "vp-b")
    assert len(analytics(plane, "?range=all&bucket=hour")["series"]) <= 2
    assert len(analytics(plane, "?range=90d&bucket=hour")["series"]) == 2_161
    whole = analytics(plane, "?range=all&bucket=month")
    assert (whole["previous"], whole["summary"]["completed"]) == (None, 1)
    assert set(whole["trend"].values()) == {None}


def test_many_ask_at_once(shared: ControlPlane) -> None:
    """While others write; each answer is whole."""

    def ask(n: int) -> int:
        if n % 4 == 0:
            shared.add(f"t{n}", orchestrator="vp-b")
        answer = analytics(shared, "?range=30d&bucket=week")
        return len(answer["series"])

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(24))) <= {5, 6}
    drain(shared, "vp-b")
