"""`GET /api/vps/{id}/backlog`: an orchestrator's tasks and their numbers."""

from __future__ import annotations

import pytest
from serving import ControlPlane
from test_tasks import drain, fields, problem


def test_a_backlog_lists_what_is_open_with_numbers_of_everything(control_plane: ControlPlane) -> None:
    """In the order of claims, from one snapshot; the numbers don't follow the filter."""
    control_plane.start()
    empty = control_plane.json("GET", "/api/vps/vp-b/backlog")
    assert (empty["data"], empty["pagination"]["total"]) == ([], 0)
    metrics = empty["metrics"]
    assert (metrics["total"], metrics["overdue"]) == (0, 0)
    assert (metrics["completion_rate"], metrics["oldest_age_s"], metrics["estimate_s"]) == (None, None, None)

    control_plane.add("done", orchestrator="vp-b", priority="CRITICAL")
    drain(control_plane, "vp-b")
    low = control_plane.add("low", orchestrator="vp-b", priority="LOW", estimate_s=60)
    high = control_plane.add("high", orchestrator="vp-b", priority="HIGH", due_at="2020-01-01T00:00:00Z", estimate_s=30)
    held = control_plane.add("held", orchestrator="vp-b", depends_on=[low["id"]], estimate_s=10)
    control_plane.add("another's", orchestrator="vp-a")

    answer = control_plane.json("GET", "/api/orchestrators/vp-b/backlog")
    assert [task["id"] for task in answer["data"]] == [high["id"], held["id"], low["id"]]
    metrics = answer["metrics"]
    assert (metrics["total"], metrics["completion_rate"], metrics["overdue"]) == (4, 0.25, 1)
    assert metrics["by_status"] == {"TODO": 2, "IN_PROGRESS": 0, "BLOCKED": 1, "DONE": 1, "CANCELLED": 0}
    assert metrics["by_priority"] == {"CRITICAL": 0, "HIGH": 1, "MEDIUM": 1, "LOW": 1}
    assert metrics["estimate_s"] == 100.0
    assert 0 <= metrics["oldest_age_s"] < 60

    filtered = control_plane.json("GET", "/api/vps/vp-b/backlog?status=DONE,BLOCKED&sort=created_at&order=desc")
    assert [task["title"] for task in filtered["data"]] == ["held", "done"]
    assert filtered["metrics"].keys() == metrics.keys()
    assert filtered["metrics"]["total"] == 4
    assert [t["title"] for t in control_plane.json("GET", "/api/vps/vp-b/backlog?q=hig&priority=HIGH")["data"]] == [
        "high"
    ]


def test_its_pages_go_on_by_the_cursor(shared: ControlPlane) -> None:
    """Each task once."""
    ids = {shared.add(f"p{n}", orchestrator="vp-b")["id"] for n in range(5)}
    first = shared.json("GET", "/api/vps/vp-b/backlog?limit=3")
    rest = shared.json("GET", f"/api/vps/vp-b/backlog?limit=3&cursor={first['pagination']['next_cursor']}")
    seen = [task["id"] for task in first["data"] + rest["data"]]
    assert (set(seen), len(seen), rest["pagination"]["next_cursor"]) == (ids, 5, None)
    drain(shared, "vp-b")


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "status=OPEN", "sort=title", "orchestrator=vp-a"])
def test_a_wrong_query_is_422(shared: ControlPlane, query: str) -> None:
    """With the field."""
    assert fields(shared.ask("GET", f"/api/vps/vp-b/backlog?{query}")) == {query.partition("=")[0]}


def test_it_is_of_an_orchestrator_that_is_declared(shared: ControlPlane) -> None:
    """404, and 403 without the scope."""
    assert problem(shared.ask("GET", "/api/vps/vp-none/backlog")) == (404, "not_found")
    assert problem(shared.ask("GET", "/api/vps/vp-a/backlog", key="tasks:write")) == (403, "missing_scope")
