"""Who changed what: by which key, whose it is, from where, and what was there before."""

from __future__ import annotations

import json

import pytest
from serving import ControlPlane

from orchestrator_fleet.cli.main import main


def test_a_change_says_who_made_it_from_where_and_what_was_before(shared: ControlPlane) -> None:
    """Newest first; of a task, of an orchestrator and of what many do at once alike."""
    task = shared.add("audited", orchestrator="vp-a", priority="LOW")["id"]
    shared.json("PUT", f"/api/tasks/{task}", key="tasks:write", json={"priority": "HIGH"})
    shared.json("POST", f"/api/tasks/{task}/cancel", json={"reason": "no longer wanted"})
    entries = shared.json("GET", f"/api/audit?task={task}")["data"]
    assert [one["kind"] for one in entries] == ["task_cancelled", "task_updated", "task_created"]
    assert {(one["owner"], one["address"], one["task"]) for one in entries} == {("person:me", "127.0.0.1", task)}
    cancelled, updated, created = entries
    assert (cancelled["before"]["status"], cancelled["after"]["status"]) == ("TODO", "CANCELLED")
    assert cancelled["reason"] == "no longer wanted"
    assert updated["before"] == {"priority": "LOW"}
    assert updated["key"] != cancelled["key"]
    assert created["before"] is None


def test_what_was_done_to_an_orchestrator_is_told(shared: ControlPlane) -> None:
    """With its status before and after; what ended by itself is nobody's change."""
    shared.json("POST", "/api/vps/vp-b/deactivate", json={"reason": "rest"})
    shared.json("POST", "/api/vps/vp-b/activate", json={})
    found = shared.json("GET", "/api/audit?orchestrator=vp-b&owner=person:me")["data"]
    kinds = [one["kind"] for one in found]
    assert {"orchestrator_paused", "orchestrator_resumed"} <= set(kinds)
    ended = found[kinds.index("action_ended")]
    assert (ended["owner"], ended["address"]) == ("person:me", "127.0.0.1")
    assert (ended["before"]["status"], ended["after"]["status"]) == ("AWAY", "OFFLINE")
    assert all(one["owner"] for one in shared.json("GET", "/api/audit?limit=100")["data"])


def test_what_workers_and_clocks_do_is_no_audit_but_what_keys_report_is(shared: ControlPlane) -> None:
    """A client that polls over HTTP has a key; its report says so."""
    task = shared.add("worked", orchestrator="vp-a")["id"]
    (claimed,) = shared.poll("vp-a")
    shared.json("POST", f"/api/tasks/{task}/complete", json={"token": claimed["lease"]["token"]})
    kinds = [one["kind"] for one in shared.json("GET", f"/api/audit?task={task}")["data"]]
    assert kinds[0] == "task_done"


def test_pages_neither_skip_nor_repeat(shared: ControlPlane) -> None:
    """By cursor, to the end."""
    for n in range(5):
        shared.add(f"page {n}", orchestrator="vp-b")
    seen: list[int] = []
    cursor = ""
    while True:
        page = shared.json("GET", f"/api/audit?kind=task_created&limit=2{cursor}")
        seen += [one["id"] for one in page["data"]]
        if page["pagination"]["next_cursor"] is None:
            break
        cursor = f"&cursor={page['pagination']['next_cursor']}"
    assert seen == sorted(set(seen), reverse=True)
    assert len(seen) == page["pagination"]["total"] >= 5


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "since=yesterday", "cursor=x", "knd=a"])
def test_a_wrong_question_is_told(shared: ControlPlane, query: str) -> None:
    """As everywhere."""
    assert shared.ask("GET", f"/api/audit?{query}").status_code == 422


def test_the_command_shows_it(
    shared: ControlPlane, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fleet audit`."""
    task = shared.add("shown", orchestrator="vp-b")["id"]
    monkeypatch.setenv("FLEET_KEY", shared.keys["admin"])
    argv = ["fleet", "-f", str(shared.home / "fleet.yaml"), "--json", "audit", "--task", task, "--since", "1h"]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert [one["kind"] for one in json.loads(capsys.readouterr().out)["data"]] == ["task_created"]
