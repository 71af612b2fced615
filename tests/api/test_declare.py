"""Orchestrators declared, changed and deleted over HTTP: what git, the YAML and the answers say."""

from __future__ import annotations

import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from serving import DEADLINE_S, ControlPlane, until
from test_keys import git, in_git, problem

from orchestrator_fleet.cli.validate import check
from orchestrator_fleet.spec.references import WORDS_OF_API

Answer = dict[str, Any]

RUNNER = {"type": "command", "command": ["python3", "-V"]}
NEW = {"charter": "charters/vp.md", "discipline": "eng", "runner": RUNNER}
FLEET = Path(sys.executable).with_name("fleet")


def prepared(home: Path, *, control: str = "", store: str = "") -> ControlPlane:
    """In git, with keys for declaring; not started. `control` goes into `control_plane`."""
    plane = ControlPlane(home, store=store)
    plane.declare("fleet:write", owner="person:ada@example.org", scopes=["fleet:write", "fleet:read"])
    plane.declare("vp-a:fleet", owner="vp-a", scopes=["fleet:write", "fleet:read"])
    plane.write()
    file = home / "fleet.yaml"
    text = file.read_text().replace("machines: {m01: {}}", "# One is enough.\nmachines: {m01: {slots: 100}}")
    file.write_text(text.replace(f'{{url: "{plane.url}"}}', f'{{url: "{plane.url}"{control}}}'))
    named = "---\nrole: VP\nidentity: {name: Vera <Pea>, email: vera@example.org}\n---\nDo what the task says.\n"
    (home / "charters/vp.md").write_text(named)
    return in_git(plane)


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Running, with nothing applied but the control plane's part."""
    plane = prepared(tmp_path_factory.mktemp("declare") / "home").start()
    yield plane
    plane.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def on_either_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane to be changed at will, on each store; not started."""
    store = request.getfixturevalue("postgres_server").empty() if request.param == "postgresql" else ""
    plane = prepared(tmp_path / "home", store=store)
    yield plane
    plane.close()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane to be changed at will; not started."""
    plane = prepared(tmp_path / "home")
    yield plane
    plane.close()


def post(plane: ControlPlane, name: str, *, code: int = 201, query: str = "", **fields: Any) -> Answer:
    made: Answer = plane.json("POST", f"/api/vps{query}", code=code, json={"name": name, **NEW, **fields})
    return made


def put(plane: ControlPlane, name: str, spec: Answer, version: str, **kwargs: Any) -> httpx.Response:
    headers = {"If-Match": f'"{version}"', **kwargs.pop("headers", {})}
    return plane.ask("PUT", f"/api/vps/{name}{kwargs.pop('query', '')}", json=spec, headers=headers, **kwargs)


def wrong(answer: httpx.Response) -> dict[str, str]:
    """The fields that a 422 names, with what it says."""
    assert answer.status_code == 422, answer.text
    return {one["field"]: one["message"] for one in answer.json()["errors"]}


def head(plane: ControlPlane) -> str:
    return git(plane, "rev-parse", "HEAD")


def log(plane: ControlPlane, form: str, *more: str) -> str:
    return git(plane, "log", "-1", f"--format={form}", *more)


def events(plane: ControlPlane, name: str) -> list[Answer]:
    """What is known to have happened to an orchestrator's declaration."""
    asked = "select kind, actor, data from events where orchestrator = ? and kind like 'orchestrator_%' order by seq"
    with closing(sqlite3.connect(plane.state / "store.sqlite", timeout=20)) as store:
        rows = store.execute(asked, (name,)).fetchall()
    return [{"kind": kind, "actor": actor, "data": json.loads(data)} for kind, actor, data in rows]


def is_clean(plane: ControlPlane) -> bool:
    return git(plane, "status", "--porcelain") == ""


def test_a_new_orchestrator_is_a_commit_by_its_caller(plane: ControlPlane) -> None:
    """One file, a subject that a person would write, why and by whom below it, and the way back to the request."""
    before = (plane.home / "fleet.yaml").read_text()
    answer = plane.ask(
        "POST", "/api/vps?reason=The%20backlog%20grows.", key="fleet:write", json={"name": "vp-new", **NEW}
    )
    made = answer.json()
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == "/api/vps/vp-new"
    assert answer.headers["ETag"] == f'"{made["version"]}"'
    assert (made["id"], made["applied"], made["changed"], made["files"]) == ("vp-new", False, True, ["fleet.yaml"])
    assert (made["spec"]["discipline"], made["spec"]["sessions"]["max"]) == ("eng", 100)
    assert made["commit"] == head(plane)
    assert log(plane, "%an|%ae|%s") == (
        "person:ada@example.org|person.ada.example.org@test.invalid|Add orchestrator vp-new (eng)"
    )
    body = log(plane, "%b")
    assert body.startswith("The backlog grows.\n")
    assert f"Request-Id: {answer.headers['x-request-id']}" in body
    assert log(plane, "%(trailers:key=Fleet-Key,valueonly)") in plane.declared
    added = [line for line in git(plane, "diff", "HEAD~1", "--unified=0").splitlines() if line.startswith(("+", "-"))]
    assert [line for line in added if line.startswith("-")] == ["--- a/fleet.yaml"]
    after = (plane.home / "fleet.yaml").read_text()
    assert all(line in after for line in before.splitlines())
    assert is_clean(plane)
    shown = plane.ask("GET", "/api/vps/vp-new")
    assert (shown.json()["applied"], shown.json()["spec"]) == (False, made["spec"])
    assert shown.headers["ETag"] == answer.headers["ETag"]
    (event,) = events(plane, "vp-new")
    assert (event["kind"], event["data"]["commit"], event["data"]["before"]) == (
        "orchestrator_declared",
        made["commit"],
        None,
    )
    assert event["data"]["after"]["discipline"] == "eng"
    assert plane.declared[event["actor"]]["owner"] == "person:ada@example.org"


def test_what_get_shows_changes_nothing_when_it_is_put(plane: ControlPlane) -> None:
    """Though it has every default in it; and a change of one value changes one line."""
    post(plane, "vp-same", labels={"team": "x"})
    plane.publish()
    until(lambda: plane.json("GET", "/api/vps/vp-same")["applied"], "it is in force")
    shown = plane.json("GET", "/api/vps/vp-same")
    commit = head(plane)
    same = put(plane, "vp-same", shown["spec"], shown["version"]).json()
    assert (same["changed"], same["commit"], same["applied"], same["version"]) == (
        False,
        commit,
        True,
        shown["version"],
    )
    assert same["status"] == "OFFLINE"
    assert head(plane) == commit
    shown["spec"]["sessions"]["max"] = 4
    shown["spec"]["labels"]["shift"] = "night"
    answer = put(plane, "vp-same", shown["spec"], shown["version"], query="?reason=Fewer%20at%20once")
    changed = answer.json()
    assert (answer.status_code, changed["applied"], changed["spec"]["sessions"]["max"]) == (200, False, 4)
    assert answer.headers["ETag"] == f'"{changed["version"]}"' != f'"{shown["version"]}"'
    assert log(plane, "%s") == "Change vp-same: labels.shift added, sessions.max 100 -> 4"
    entry = [line for line in (plane.home / "fleet.yaml").read_text().splitlines() if "timeout" in line]
    assert entry == [], "no default was written down"
    assert [event["kind"] for event in events(plane, "vp-same")] == ["orchestrator_declared", "orchestrator_changed"]
    # The version that was answered is the one to go on from, applied or not.
    again = put(plane, "vp-same", {**changed["spec"], "role": "Night VP"}, changed["version"])
    assert (again.status_code, log(plane, "%s")) == (200, "Change vp-same: role added")


def test_a_charter_can_come_along(plane: ControlPlane) -> None:
    """As a file of its own in the same commit; one that exists is not overwritten."""
    text = "---\nrole: Poet\n---\nWrite verse."
    made = post(plane, "vp-poet", charter="charters/poet.md", charter_text=text)
    assert sorted(made["files"]) == ["charters/poet.md", "fleet.yaml"]
    assert (plane.home / "charters/poet.md").read_text() == text + "\n"
    assert is_clean(plane)
    refused = plane.ask(
        "POST", "/api/vps", json={"name": "vp-poet2", **NEW, "charter": "charters/poet.md", "charter_text": "x"}
    )
    assert problem(refused) == (409, "file_exists")


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"charter": "charters/pv.md"}, "charter", "did you mean charters/vp.md"),
        ({"charter": "../vp.md"}, "charter", "inside the fleet folder"),
        ({"charter": "/etc/passwd"}, "charter", "inside the fleet folder"),
        ({"charter": "link.md"}, "charter", "leaves the fleet folder"),
        ({"charter": "../out.md", "charter_text": "x"}, "charter", "a new Markdown file"),
        ({"charter": ".git/hooks/x.md", "charter_text": "x"}, "charter", "a new Markdown file"),
        ({"charter": "out/x.md", "charter_text": "x"}, "charter", "a new Markdown file"),
        ({"charter": "scripts/run.py", "charter_text": "x"}, "charter", "a new Markdown file"),
        ({"charter": "charters/n.md", "charter_text": "---\nrole: [1]\n---\nx"}, "charter_text", "line 2: "),
        ({"charter": "charters/n.md", "charter_text": 5}, "charter_text", "wanted text"),
        ({"charter": "charters/n.md", "charter_text": "  "}, "charter_text", "has no prose"),
        ({"machine": "m02"}, "machine", "no machine m02"),
        ({"placement": {"labels": {"zone": "z"}}}, "placement.labels", "no machine has the labels"),
        ({"escalate_to": ["vp-x"]}, "escalate_to[0]", "no orchestrator vp-x"),
        ({"runner": {"type": "command"}}, "runner.command", "is missing"),
        ({"runner": {**RUNNER, "commands": []}}, "runner.commands", "did you mean command"),
        ({"sessions": {"max": "4"}}, "sessions.max", "take it out of its quotes"),
        ({"sessions": {"timeout": 30}}, "sessions.timeout", "wanted a duration"),
        ({"machine": "m01", "placement": {}}, "body", "keep one"),
        ({"labels": {"a": "b\0"}}, "labels.a", "NUL"),
    ],
)
def test_what_is_wrong_is_told_by_field(plane: ControlPlane, fields: Answer, field: str, said: str) -> None:
    """As fleet.yaml itself would be told, and nothing is committed."""
    for link, target in (("link.md", "/etc/hostname"), ("out", "/tmp")):
        if not (plane.home / link).is_symlink():
            (plane.home / link).symlink_to(target)
            git(plane, "add", link)
            git(plane, "commit", "-q", "-m", f"Add {link}")
    before = head(plane)
    found = wrong(plane.ask("POST", "/api/vps", json={"name": "vp-wrong", **NEW, **fields}))
    assert said in found[field]
    assert (head(plane), is_clean(plane)) == (before, True)


def test_all_that_is_wrong_is_told_at_once(plane: ControlPlane) -> None:
    """The name, the shape and the references alike."""
    body = {"name": "VP", "charter": "nowhere.md", "disciplin": "x", "machine": "m9", "retry": {"jitter": 7}}
    found = wrong(plane.ask("POST", "/api/vps", json=body))
    assert set(found) == {"name", "charter", "disciplin", "machine", "retry.jitter"}
    assert "did you mean discipline?" in found["disciplin"]
    assert set(wrong(plane.ask("POST", "/api/vps", json={}))) == {"name", "charter"}
    assert set(wrong(plane.ask("POST", "/api/vps", json=[]))) == {"body"}
    deep: Any = "x"
    for _ in range(150):
        deep = [deep]
    assert set(wrong(plane.ask("POST", "/api/vps", json={"name": "vp-deep", **NEW, "labels": deep}))) == {"body"}
    assert problem(plane.ask("POST", "/api/vps", content=b"{")) == (400, "malformed_json")
    assert set(wrong(plane.ask("PUT", "/api/vps/vp-a", json={"name": "vp-b"}, headers={"If-Match": "*"}))) == {
        "name",
        "charter",
    }


def test_a_name_is_taken_once(plane: ControlPlane) -> None:
    """409, also while it is declared and not in force."""
    post(plane, "vp-once")
    for name in ("vp-once", "vp-a"):
        assert problem(plane.ask("POST", "/api/vps", json={"name": name, **NEW})) == (409, "name_taken")


def test_a_change_needs_the_version_that_was_read(plane: ControlPlane) -> None:
    """428 without, 412 with an old one, and * for whatever it is."""
    shown = plane.json("GET", "/api/orchestrators/vp-b")
    spec = {**shown["spec"], "role": "Ops"}
    assert problem(plane.ask("PUT", "/api/vps/vp-b", json=spec)) == (428, "precondition_required")
    assert problem(put(plane, "vp-b", spec, "0123456789ab")) == (412, "stale")
    assert put(plane, "vp-b", spec, shown["version"]).status_code == 200
    assert problem(put(plane, "vp-b", shown["spec"], shown["version"])) == (412, "stale")
    assert plane.ask("PUT", "/api/vps/vp-b", json=shown["spec"], headers={"If-Match": "*"}).status_code == 200
    assert problem(plane.ask("PUT", "/api/vps/vp-none", json=spec, headers={"If-Match": "*"})) == (404, "not_found")
    assert problem(plane.ask("DELETE", "/api/vps/vp-none")) == (404, "not_found")


def test_a_persons_edit_is_never_overwritten(plane: ControlPlane) -> None:
    """What git has is newer than what GET shows: 412; what is not committed yet: 409."""
    shown = plane.json("GET", "/api/vps/vp-a")
    file = plane.home / "fleet.yaml"
    was = file.read_text()
    file.write_text(was.replace("discipline: eng, labels: {trade: eng}", "discipline: eng, labels: {trade: craft}", 1))
    assert problem(put(plane, "vp-a", {**shown["spec"], "role": "R"}, shown["version"])) == (409, "dirty_work_tree")
    git(plane, "commit", "-q", "-a", "-m", "Call it craft")
    refused = put(plane, "vp-a", {**shown["spec"], "role": "R"}, shown["version"])
    assert problem(refused) == (412, "stale")
    assert "git has a newer version" in refused.json()["detail"]
    assert "trade: craft" in file.read_text()
    git(plane, "revert", "--no-edit", "HEAD")
    assert put(plane, "vp-a", {**shown["spec"], "role": "R"}, shown["version"]).status_code == 200


def test_who_may_declare(plane: ControlPlane) -> None:
    """The scope; an orchestrator's own key for itself alone, and the commit is by the name its charter gives it."""
    body = {"name": "vp-scoped", **NEW}
    assert problem(plane.ask("POST", "/api/vps", key=None, json=body)) == (401, "unauthorized")
    for key in ("fleet:read", "tasks:write"):
        assert problem(plane.ask("POST", "/api/vps", key=key, json=body)) == (403, "missing_scope")
    assert problem(plane.ask("POST", "/api/vps", key="vp-a:fleet", json=body)) == (403, "forbidden")
    assert problem(plane.ask("DELETE", "/api/vps/vp-b", key="vp-a:fleet")) == (403, "forbidden")
    assert problem(plane.ask("POST", "/api/fleet/apply", key="vp-a:fleet", json={})) == (403, "forbidden")
    spec = {**NEW, "labels": {"trade": "eng"}, "role": "Chief"}
    done = plane.ask("PUT", "/api/vps/vp-a", key="vp-a:fleet", json=spec, headers={"If-Match": "*"})
    assert done.status_code == 200, done.text
    assert log(plane, "%an|%ae") == "Vera Pea|vera@example.org"


def test_an_answer_is_given_again(plane: ControlPlane) -> None:
    """For the same Idempotency-Key; and when the answer was lost, git is found to have it already."""
    body, key = {"name": "vp-again", **NEW}, {"Idempotency-Key": "declare-1"}
    first = plane.ask("POST", "/api/vps", json=body, headers=key)
    commit = head(plane)
    second = plane.ask("POST", "/api/vps", json=body, headers=key)
    assert (second.status_code, second.json(), second.headers["ETag"]) == (201, first.json(), first.headers["ETag"])
    other = plane.ask("POST", "/api/vps", json={**body, "role": "X"}, headers=key)
    assert problem(other) == (409, "idempotency_key_reused")
    spec = {**first.json()["spec"], "role": "Again"}
    changed = put(plane, "vp-again", spec, first.json()["version"], headers={"Idempotency-Key": "put-1"})
    with closing(sqlite3.connect(plane.state / "store.sqlite", timeout=20)) as store, store:
        store.execute("delete from idempotency")
    late = put(plane, "vp-again", spec, first.json()["version"], headers={"Idempotency-Key": "put-1"})
    assert (late.status_code, late.json()["changed"]) == (200, False)
    assert late.json()["commit"] == changed.json()["commit"] == head(plane) != commit
    taken = plane.ask("POST", "/api/vps", json=body, headers=key)
    assert problem(taken) == (409, "name_taken"), "it reads otherwise by now"
    again = plane.ask("POST", "/api/vps", json={**body, "role": "Again"}, headers={"Idempotency-Key": "declare-2"})
    assert (again.status_code, again.json()["changed"]) == (201, False)
    assert head(plane) == changed.json()["commit"]


def test_open_tasks_need_somewhere_to_go(on_either_store: ControlPlane) -> None:
    """409 without; to another, the running one taken from its holder first; or cancelled."""
    file = on_either_store.home / "fleet.yaml"
    lines = "".join(f"  {name}: {{charter: charters/vp.md, discipline: x, runner: {{type: command, command: [ls]}}}}\n"
                    for name in ("vp-go", "vp-end"))  # fmt: skip
    file.write_text(file.read_text().replace("keys:\n", lines + "keys:\n", 1))
    git(on_either_store, "commit", "-q", "-a", "-m", "Two more")
    plane = on_either_store.start()
    runs, waits = plane.add("runs", orchestrator="vp-go"), plane.add("waits", orchestrator="vp-go")
    (grant,) = plane.poll("vp-go")
    refused = plane.ask("DELETE", "/api/vps/vp-go")
    assert problem(refused) == (409, "has_open_tasks")
    assert "2 open tasks" in refused.json()["detail"]
    for query, field in (
        ("reassign_to=vp-go", "reassign_to"),
        ("reassign_to=vp-none", "reassign_to"),
        ("reassign_to=vp-b&cancel_open=true", "cancel_open"),
    ):
        assert set(wrong(plane.ask("DELETE", f"/api/vps/vp-go?{query}"))) == {field}
    key = {"Idempotency-Key": "gone"}
    gone = plane.json("DELETE", "/api/vps/vp-go?reassign_to=vp-b&reason=Merged", headers=key)
    assert plane.json("DELETE", "/api/vps/vp-go?reassign_to=vp-b&reason=Merged", headers=key) == gone
    assert (gone["deleted"], gone["tasks"], gone["applied"]) == ("vp-go", {"reassigned": 2}, False)
    assert log(plane, "%s|%b").startswith("Remove orchestrator vp-go|Merged")
    for task in (runs, waits):
        now = plane.task(task["id"])
        assert (now["status"], now["orchestrator"]) == ("TODO", "vp-b")
    late = plane.ask("POST", f"/api/tasks/{runs['id']}/complete", json={"token": grant["lease"]["token"]})
    assert problem(late) == (409, "lease_lost")
    again = plane.json("DELETE", "/api/vps/vp-go")
    assert (again["changed"], again["commit"]) == (False, gone["commit"])
    ends = plane.add("ends", orchestrator="vp-end")
    gone = plane.json("DELETE", "/api/vps/vp-end?cancel_open=true")
    assert (gone["tasks"], plane.task(ends["id"])["status"]) == ({"cancelled": 1}, "CANCELLED")
    plane.publish()
    until(lambda: plane.ask("GET", "/api/vps/vp-end").status_code == 404, "it is gone")
    assert problem(plane.ask("DELETE", "/api/vps/vp-end")) == (404, "not_found")


def test_what_others_name_or_somebody_protects_stays(plane: ControlPlane) -> None:
    """409 with every place; and its keys go with what is deleted."""
    refused = plane.ask("DELETE", "/api/vps/vp-a?cancel_open=true")
    assert problem(refused) == (409, "referenced")
    assert "routing[1].to.orchestrator" in refused.json()["detail"]
    post(plane, "vp-safe", protect=True)
    assert problem(plane.ask("DELETE", "/api/vps/vp-safe")) == (409, "protected")
    post(plane, "vp-under", escalate_to=["vp-safe"])
    plane.publish()
    until(lambda: plane.json("GET", "/api/vps/vp-safe")["applied"], "it is in force")
    shown = plane.json("GET", "/api/vps/vp-safe")
    assert put(plane, "vp-safe", {**shown["spec"], "protect": False}, shown["version"]).status_code == 200
    still = plane.ask("DELETE", "/api/vps/vp-safe")
    assert problem(still) == (409, "protected")
    assert "apply" in still.json()["detail"]
    plane.publish()
    until(lambda: plane.json("GET", "/api/vps/vp-safe")["applied"], "it is lifted")
    refused = plane.ask("DELETE", "/api/vps/vp-safe")
    assert problem(refused) == (409, "referenced")
    assert "orchestrators.vp-under.escalate_to[0]" in refused.json()["detail"]
    minted = plane.json("POST", "/api/vps/vp-under/api-key", code=201)
    gone = plane.json("DELETE", "/api/vps/vp-under")
    assert minted["id"] not in (plane.home / "fleet.yaml").read_text()
    assert gone["files"] == ["fleet.yaml"]
    assert events(plane, "vp-under")[-1]["data"]["keys"] == [minted["id"]]
    assert plane.json("DELETE", "/api/vps/vp-safe")["changed"] is True


def test_many_at_once_all_land(plane: ControlPlane) -> None:
    """One commit each, one after the other; of the same name one wins."""
    before = int(git(plane, "rev-list", "--count", "HEAD"))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: post(plane, f"vp-many-{n}"), range(8)))
        same = list(pool.map(lambda _: plane.ask("POST", "/api/vps", json={"name": "vp-one", **NEW}), range(4)))
        keyed = list(
            pool.map(
                lambda _: plane.ask(
                    "POST", "/api/vps", json={"name": "vp-key", **NEW}, headers={"Idempotency-Key": "many"}
                ),
                range(4),
            )
        )
    assert len({one["commit"] for one in made}) == 8
    assert sorted(one.status_code for one in same) == [201, 409, 409, 409]
    assert {(one.status_code, one.json()["commit"]) for one in keyed} == {(201, keyed[0].json()["commit"])}
    assert int(git(plane, "rev-list", "--count", "HEAD")) == before + 10
    assert is_clean(plane)


@pytest.mark.parametrize("mode", ["propose", "refuse"])
def test_writes_may_be_proposed_or_refused(tmp_path: Path, mode: str) -> None:
    """A branch and its diff, and nothing else has changed; or 409."""
    plane = prepared(tmp_path / "home", control=f", writes: {mode}").start()
    try:
        before = head(plane)
        body = {"name": "vp-new", **NEW}
        spec = {**plane.json("GET", "/api/vps/vp-b")["spec"], "role": "Ops"}
        answers = (
            plane.ask("POST", "/api/vps?apply=true", json=body),
            plane.ask("PUT", "/api/vps/vp-b", json=spec, headers={"If-Match": "*"}),
            plane.ask("DELETE", "/api/vps/vp-b?cancel_open=true"),
        )
        assert (head(plane), is_clean(plane)) == (before, True)
        if mode == "refuse":
            assert [problem(one) for one in answers] == [(409, "writes_refused")] * 3
            return
        assert [one.status_code for one in answers] == [202] * 3, [one.text for one in answers]
        for one in answers:
            told = one.json()
            assert git(plane, "rev-parse", told["branch"]) == told["commit"]
            assert git(plane, "rev-parse", f"{told['branch']}~1") == before
            assert told["diff"].startswith("diff --git a/fleet.yaml")
        assert "vp-new" in answers[0].json()["diff"]
        (event,) = events(plane, "vp-new")
        assert (event["kind"], event["data"]["branch"]) == ("orchestrator_proposed", answers[0].json()["branch"])
    finally:
        plane.close()


def test_a_fleet_that_is_not_sound_is_not_edited(alone: ControlPlane) -> None:
    """409 with the diagnostics, here and where a plan is asked for; what is in force goes on."""
    plane = alone.start()
    file = plane.home / "fleet.yaml"
    file.write_text(file.read_text().replace("orchestrator: vp-a", "orchestrator: vp-aa", 1))
    git(plane, "commit", "-q", "-a", "-m", "A slip")
    asked = (
        plane.ask("POST", "/api/vps", json={"name": "vp-new", **NEW}),
        plane.ask("DELETE", "/api/vps/vp-b"),
        plane.ask("GET", "/api/fleet/plan"),
        plane.ask("POST", "/api/fleet/apply", json={}),
    )
    for answer in asked:
        assert problem(answer) == (409, "fleet_unsound")
        assert "did you mean vp-a?" in answer.json()["detail"]
    assert plane.json("GET", "/api/vps/vp-a")["id"] == "vp-a"


def test_without_git_nothing_is_written(control_plane: ControlPlane) -> None:
    """409 says what to do."""
    plane = control_plane.start()
    before = (plane.home / "fleet.yaml").read_text()
    assert problem(plane.ask("POST", "/api/vps", json={"name": "vp-new", **NEW})) == (409, "no_git")
    assert (plane.home / "fleet.yaml").read_text() == before


def test_the_plan_and_the_generations_over_http(plane: ControlPlane) -> None:
    """The plan that the command prints; what the control plane has; and what names no machine is told."""
    printed = subprocess.run(
        [FLEET, "plan", "--format", "json"], cwd=plane.home, capture_output=True, check=True, timeout=DEADLINE_S
    )
    answer = plane.ask("GET", "/api/fleet/plan", key="fleet:read")
    mine, theirs = answer.json(), httpx.Response(200, content=printed.stdout).json()
    assert answer.headers["content-type"].startswith("application/json")
    assert {**mine, "created_at": ""} == {**theirs, "created_at": ""}
    assert mine["revision"] == head(plane)
    assert set(wrong(plane.ask("GET", "/api/fleet/plan?only=m09"))) == {"only"}
    assert set(wrong(plane.ask("POST", "/api/fleet/apply", json={"only": ["m09"]}))) == {"only"}
    dry = plane.json("POST", "/api/fleet/apply", json={"dry_run": True})
    assert (dry["dry_run"], dry["plan"]["id"]) == (True, mine["id"])
    assert "to start" in dry["summary"]
    page = plane.json("GET", "/api/fleet/generations", key="fleet:read")
    (control,) = [one for one in page["data"] if one["target"] == "control-plane"]
    assert control["current"] == control["last_good"] == plane.json("GET", "/api/fleet")["generation"]
    assert control["generations"][0]["digest"] == control["current"]
    assert problem(plane.ask("POST", "/api/fleet/apply", key="fleet:read", json={})) == (403, "missing_scope")


def test_static_routes_go_before_names(plane: ControlPlane) -> None:
    """No orchestrator's name hides them."""
    for method, path in (("POST", "/api/vps/validate"), ("POST", "/api/orchestrators/validate")):
        assert plane.ask(method, path, json={"api_key": "x"}).status_code == 200
    assert plane.ask("GET", "/api/vps/conflicts").status_code == 200


def test_no_orchestrator_is_named_like_a_route(plane: ControlPlane) -> None:
    """It could not be asked for."""
    paths = plane.json("GET", "/schema/openapi.json", key=None)["paths"]
    words = {path.split("/")[3] for path in paths if re.match("/api/(vps|orchestrators)/[a-z]", path)}
    assert words == WORDS_OF_API
    for word in words:
        found = wrong(plane.ask("POST", "/api/vps", json={"name": word, **NEW}))
        assert "a word of the API's own" in found["name"]


def test_a_reason_cannot_pass_for_a_trailer(plane: ControlPlane) -> None:
    """Whoever reads the log by program reads what the control plane wrote."""
    forged = "It had to be.\n\nFleet-Key: k-00000000\nRequest-Id: mine\n---\n# end"
    answer = plane.ask(
        "POST", "/api/vps", params={"reason": forged}, json={"name": "vp-forged", **NEW}, key="fleet:write"
    )
    assert answer.status_code == 201, answer.text
    keys = log(plane, "%(trailers:key=Fleet-Key,valueonly)").split()
    assert [plane.declared[key]["owner"] for key in keys] == ["person:ada@example.org"]
    assert log(plane, "%(trailers:key=Request-Id,valueonly)") == answer.headers["x-request-id"]
    assert "It had to be." in log(plane, "%b")


def test_the_document_shows_what_an_orchestrator_is(plane: ControlPlane) -> None:
    """A generated client knows the words of fleet.yaml."""
    paths = plane.json("GET", "/schema/openapi.json", key=None)["paths"]
    body = paths["/api/vps"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"name", "charter"} == set(body["required"])
    assert {"charter_text", "sessions", "runner", "escalate_to"} <= set(body["properties"])
    assert body["additionalProperties"] is False
    answers = paths["/api/vps/{vp}"]["put"]["responses"]
    assert {"200", "202", "404", "409", "412", "422", "428"} <= set(answers)
    assert "requestBody" not in paths["/api/vps/{vp}"]["delete"]


def test_killed_at_any_moment_git_and_the_files_agree(alone: ControlPlane) -> None:
    """And the same request, sent again, ends what it began."""
    plane, dice = alone.start(), random.Random(5)  # noqa: S311 - a seed
    for number in range(6):
        body, key = {"name": f"vp-k{number}", **NEW}, {"Idempotency-Key": f"killed-{number}"}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(plane.ask, "POST", "/api/vps", json=body, headers=key)
            time.sleep(dice.uniform(0.0, 0.4))
            plane.stop(signal.SIGKILL)
            with suppress(httpx.TransportError):
                asked.result()
        plane.start()
        answer = plane.ask("POST", "/api/vps", json=body, headers=key)
        assert answer.status_code == 201, answer.text
        assert is_clean(plane)
        assert git(plane, "log", "--format=%s").count(f"Add orchestrator vp-k{number} ") == 1
    assert not check(plane.home / "fleet.yaml")[1]


NAMES = tuple(f"vp-h{number}" for number in range(4))
SPECS = st.fixed_dictionaries(
    {"charter": st.just("charters/vp.md"), "runner": st.just(RUNNER)},
    optional={
        "discipline": st.sampled_from(["eng", "ops", "legal"]),
        "role": st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30),
        "labels": st.dictionaries(st.sampled_from(["a", "b"]), st.text("xyz:#{}[]'\" é-", max_size=6), max_size=2),
        "sessions": st.fixed_dictionaries({}, optional={"max": st.integers(1, 100), "timeout": st.just("90s")}),
        "escalate_to": st.lists(st.sampled_from(["human:x", *NAMES[:2]]), max_size=2),
        "protect": st.booleans(),
    },
)
STEPS = st.lists(st.tuples(st.sampled_from(["POST", "PUT", "DELETE"]), st.sampled_from(NAMES), SPECS), max_size=6)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(steps=STEPS)
def test_whatever_is_asked_the_yaml_is_valid_and_says_what_the_api_says(
    plane: ControlPlane, steps: list[tuple[str, str, Answer]]
) -> None:
    """Any sequence: no 5xx, `fleet validate` accepts the files, and applied they read as the answers did."""
    said: dict[str, Answer | None] = {}
    for method, name, spec in steps:
        body = {"name": name, **spec}
        if method == "POST":
            answer = plane.ask("POST", "/api/vps", json=body)
        elif method == "PUT":
            answer = plane.ask("PUT", f"/api/vps/{name}", json=body, headers={"If-Match": "*"})
        else:
            answer = plane.ask("DELETE", f"/api/vps/{name}")
        assert answer.status_code < 500, answer.text
        if answer.status_code < 300:
            said[name] = None if method == "DELETE" else answer.json()["spec"]
    fleet, problems = check(plane.home / "fleet.yaml")
    assert not problems
    assert fleet is not None
    read = {name: one.model_dump(mode="json", by_alias=True) for name, one in fleet.file.orchestrators.items()}
    assert {name: read.get(name) for name in said} == said
    plane.publish()
    until(lambda: plane.json("GET", "/api/fleet/plan?only=m01")["targets"][0]["observed"] is not None, "it is seen")

    def shown() -> bool:
        now = {name: plane.ask("GET", f"/api/vps/{name}") for name in said}
        seen = {name: one.json()["spec"] if one.status_code == 200 else None for name, one in now.items()}
        return seen == said

    until(shown, "what is in force is what was said")
    assert is_clean(plane)
