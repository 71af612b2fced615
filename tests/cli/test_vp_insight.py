"""`fleet vp conflicts`, `resolve` and `analytics` against a real control plane."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Run, run_in

sys.path.insert(0, str(Path(__file__).parent.parent / "api"))

from serving import ControlPlane


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """It runs; a task waits for one that was cancelled, and one is done."""
    running = ControlPlane(tmp_path_factory.mktemp("insight") / "home").start()
    running.add("done", orchestrator="vp-b")
    (grant,) = running.poll("vp-b")
    done = {"token": grant["lease"]["token"], "usage": {"input_tokens": 7, "usd": 0.5}}
    running.json("POST", f"/api/tasks/{grant['task']['id']}/complete", json=done)
    root = running.add("root", orchestrator="vp-b")
    running.add("waits", orchestrator="vp-a", depends_on=[root["id"]])
    running.json("POST", f"/api/tasks/{root['id']}/cancel")
    yield running
    running.close()


@pytest.fixture
def fleet(plane: ControlPlane) -> Run:
    """`fleet vp ...` of that control plane, with the admin's key."""
    run = run_in(plane.home)
    return lambda *args, **given: run("vp", *args, FLEET_URL=plane.url, FLEET_KEY=plane.keys["admin"], **given)


def test_conflicts_are_listed_and_resolved(fleet: Run) -> None:
    """A line each with what to do; resolved ones are shown when asked for."""
    (one,) = json.loads(fleet("conflicts", "--json").stdout)["data"]
    shown = fleet("conflicts").stdout.splitlines()
    assert shown[0].split()[:2] == ["conflict", "age"]
    assert shown[1].startswith(one["id"])
    assert "unblock what waits for" in shown[1]
    assert len(fleet("conflicts", "--type", "same_branch").stdout.splitlines()) == 1
    assert f"{one['id']}  resolved by k-" in fleet("resolve", one["id"], "--note", "seen").stdout
    assert len(fleet("conflicts").stdout.splitlines()) == 1
    assert "resolved by k-" in fleet("conflicts", "--resolved").stdout
    assert "409" in fleet("resolve", one["id"], code=1).stderr
    assert "404" in fleet("resolve", "nothing", code=1).stderr
    fleet("conflicts", "--type", "odd", code=64)
    fleet("resolve", "a/b", code=64)


def test_analytics_are_shown_for_people_and_programs(fleet: Run) -> None:
    """Metrics with what they were before, then a row a bucket; what is not known is a dash."""
    told = json.loads(fleet("analytics", "vp-b", "--range", "24h", "--bucket", "hour", "--json").stdout)
    assert (told["summary"]["completed"], told["summary"]["cancelled"], told["bucket"]) == (1, 1, "hour")
    shown = fleet("analytics", "vp-b", "--range", "24h").stdout
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert rows["metric"] == ["24h", "before", "trend"]
    assert rows["completed"] == ["1", "0", "-"]
    assert rows["success_rate"] == ["100.0%", "-", "-"]
    assert rows["usd"] == ["0.50", "-", "-"]
    assert rows["day"][0] == "completed"
    assert "404" in fleet("analytics", "vp-none", code=1).stderr
    fleet("analytics", "vp-b", "--range", "1d", code=64)
    fleet("analytics", "../x", code=64)
