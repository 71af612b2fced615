"""A fleet that is changed over the API: how its git log reads, how it goes back, and how it applies itself."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from living_fleet import WORK, LivingFleet, living, until

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(400)]

Answer = dict[str, Any]
RUNNER = {"type": "command", "command": WORK}
NEW = {"charter": "charters/vp.md", "discipline": "new", "runner": RUNNER}


def git(fleet: LivingFleet, *words: str) -> str:
    """Git, as a person of no configuration."""
    who = ("-c", "user.name=me", "-c", "user.email=me@example.invalid", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(fleet.home), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def started(fleet: LivingFleet, *, control: str = "") -> LivingFleet:
    """In git, each orchestrator that comes in a file of its own, applied and served."""
    fleet.write_fleet(extra="include: [fleet.d/*.yaml]\n")
    file = fleet.home / "fleet.yaml"
    file.write_text(file.read_text().replace(f'{{url: "{fleet.url}"', f'{{url: "{fleet.url}"{control}'))
    (fleet.home / ".gitignore").write_text(".fleet/\nmarks/\nserve.log\n")
    fleet.make_key()
    git(fleet, "init", "-q", "-b", "main")
    git(fleet, "add", "-A")
    git(fleet, "commit", "-q", "-m", "A fleet")
    fleet.fleet("apply", "--yes")
    fleet.serve()
    fleet.wait_online()
    return fleet


@pytest.fixture
def manual(fleet: LivingFleet) -> LivingFleet:
    """One that applies what it is told to apply."""
    return started(fleet)


@pytest.fixture
def automatic(tmp_path: Path) -> Iterator[LivingFleet]:
    """One of one machine that applies each change by itself."""
    for fleet in living(tmp_path / "home", machines=1):
        yield started(fleet, control=", reconcile: auto, interval: 2s")


def put(fleet: LivingFleet, name: str, spec: Answer, query: str = "") -> Answer:
    """Change an orchestrator, whatever its version."""
    headers = {"Authorization": f"Bearer {fleet.key}", "If-Match": "*"}
    answer = httpx.put(f"{fleet.url}/api/vps/{name}{query}", json=spec, headers=headers, timeout=90)
    assert answer.status_code == 200, answer.text
    found: Answer = answer.json()
    return found


def read(fleet: LivingFleet) -> dict[str, Answer]:
    """What GET shows, by name."""
    return {vp["id"]: vp["spec"] for vp in fleet.http("GET", "/api/vps?limit=100")["data"]}


def applied(fleet: LivingFleet) -> None:
    """Apply over the API; afterwards nothing is left to do."""
    done = fleet.http("POST", "/api/fleet/apply", json={"allow_deletes": True})
    assert done["result"] in ("applied", "unchanged"), done
    plan = fleet.http("GET", "/api/fleet/plan")
    assert [action for action in plan["actions"] if action["kind"] != "no-op"] == []


def passes(fleet: LivingFleet) -> list[Answer]:
    """What the control plane's own passes came to, in order."""
    asked = "select kind, actor, data from events where kind in ('fleet_applied', 'fleet_not_applied') order by seq"
    with closing(sqlite3.connect(fleet.home / ".fleet/store.sqlite", timeout=20)) as store:
        return [
            {"kind": kind, "actor": actor, **json.loads(data)} for kind, actor, data in store.execute(asked).fetchall()
        ]


@dataclass
class Script:
    """Changes made over the API. `said`: the spec that the last answer had, by orchestrator."""

    fleet: LivingFleet
    said: dict[str, Answer] = field(default_factory=dict)

    def post(self, name: str, query: str = "", **fields: Any) -> None:
        made = self.fleet.http("POST", f"/api/vps{query}", json={"name": name, **NEW, **fields})
        self.said[name] = made["spec"]

    def change(self, name: str, query: str = "", **fields: Any) -> None:
        self.said[name] = put(self.fleet, name, {**self.said[name], **fields}, query)["spec"]

    def key(self, name: str, verb: str = "POST", path: str = "") -> str:
        return str(self.fleet.http(verb, f"/api/vps/{name}/api-key{path}").get("id", ""))

    def run(self) -> dict[str, str]:
        """All twenty; the ids of the keys that were made, by how."""
        self.said |= read(self.fleet)
        self.post("vp-qa")
        self.post("vp-docs", charter="charters/docs.md", charter_text="---\nrole: Writer\n---\nWrite it down.")
        self.post("vp-sec", "?apply=true", discipline="security")
        self.post("vp-data")
        self.change("vp-qa", sessions={"max": 4, "timeout": "30s"})
        self.change("vp-docs", "?reason=They%20asked%20for%20it.", labels={"team": "words"})
        ids = {"qa": self.key("vp-qa")}
        self.change("vp-sec", role="Guard", labels={"team": "safe"}, escalate_to=["human:oncall"])
        self.change("vp-1-1", role="First")
        self.change("vp-2-2", labels={"shift": "night"})
        ids["turned"] = self.key("vp-qa", path="/rotate")
        ids["sec"] = self.key("vp-sec")
        self.change("vp-sec", discipline="safety")
        self.key("vp-sec", "DELETE")
        self.post("vp-ops")
        self.change("vp-ops", escalate_to=["vp-qa"])
        self.change("vp-data", sessions={"max": 3, "timeout": "30s"})
        self.fleet.http("DELETE", "/api/vps/vp-data?reason=Nobody%20uses%20it")
        self.said.pop("vp-data")
        self.change("vp-ops", labels={"team": "ops"})
        self.change("vp-docs", role="Editor")
        return ids


def test_twenty_changes_read_like_a_good_history_and_each_can_go_back(manual: LivingFleet) -> None:
    """Subjects, authors, files; then reverts out of the middle, applied; then all of it, back to the first commit."""
    fleet, script = manual, Script(manual)
    first = git(fleet, "rev-parse", "HEAD")
    ids, said = script.run(), script.said

    subjects = git(fleet, "log", "--reverse", "--format=%s", f"{first}..").splitlines()
    assert [subjects[n] for n in (0, 1, 2, 4, 5, 6, 7, 8)] == [
        "Add orchestrator vp-qa (new)",
        "Add orchestrator vp-docs (new)",
        "Add orchestrator vp-sec (security)",
        "Change vp-qa: sessions.max 2 -> 4",
        "Change vp-docs: labels.team added",
        f"Create key {ids['qa']} of vp-qa",
        "Change vp-sec: escalate_to changed, labels.team added, role added",
        "Change vp-1-1: role added",
    ]
    assert len(subjects) == 20
    assert subjects[17] == "Remove orchestrator vp-data"
    assert all(key_id in " ".join(subjects) for key_id in ids.values())
    assert max(map(len, subjects)) <= 72
    assert set(git(fleet, "log", "--format=%an|%ae", f"{first}..").splitlines()) == {"person:me|person.me@test.invalid"}
    assert "They asked for it." in git(fleet, "log", "--format=%b", f"{first}..")
    for commit in git(fleet, "rev-list", f"{first}..").splitlines():
        files = git(fleet, "show", "--format=", "--name-only", commit).splitlines()
        is_docs = git(fleet, "log", "-1", "--format=%s", commit) == "Add orchestrator vp-docs (new)"
        assert len(files) == (2 if is_docs else 1), files

    applied(fleet)
    assert read(fleet) == said
    until(
        lambda: all(vp["status"] == "ONLINE" for vp in fleet.http("GET", "/api/vps?limit=100")["data"]),
        "all that is new is ONLINE",
    )
    pids = fleet.programs()

    # Out of the middle, with others after it in the same files.
    commits = git(fleet, "rev-list", "--reverse", f"{first}..").splitlines()
    for number, name, is_back in (
        (8, "vp-1-1", lambda spec: spec["role"] is None),
        (9, "vp-2-2", lambda spec: spec["labels"] == {}),
        (12, "vp-sec", lambda spec: spec["discipline"] == "security" and spec["role"] == "Guard"),
        (17, "vp-data", lambda spec: spec["sessions"]["max"] == 3),
    ):
        git(fleet, "revert", "--no-edit", commits[number])
        applied(fleet)
        now = read(fleet)
        assert is_back(now[name]), (subjects[number], now[name])
        assert {other: spec for other, spec in now.items() if other != name} == {
            other: spec for other, spec in said.items() if other != name
        }
        said[name] = now[name]
    assert pids.items() <= fleet.programs().items(), "none of that restarts a daemon"

    # All of it, newest first.
    for commit in git(fleet, "rev-list", f"{first}..").splitlines():
        git(fleet, "revert", "--no-edit", commit)
        fleet.fleet("validate")
    assert git(fleet, "diff", first, "HEAD") == ""
    applied(fleet)
    assert set(read(fleet)) == set(fleet.orchestrators) == set(fleet.programs())


def test_apply_true_starts_and_ends_daemons(manual: LivingFleet) -> None:
    """The answer comes when it is done; two at once take turns; and a server that is restarted finds its port free."""
    fleet = manual
    with ThreadPoolExecutor(2) as pool:
        made = list(
            pool.map(
                lambda name: fleet.http("POST", "/api/vps?apply=true", json={"name": name, **NEW}), ("vp-x", "vp-y")
            )
        )
    for one in made:
        assert (one["applied"], one["applying"], one["apply"]["problem"]) == (True, False, None), one
        assert one["machine"] in ("m01", "m02")
    assert {one["apply"]["result"] for one in made} <= {"applied", "unchanged"}
    assert {"vp-x", "vp-y"} <= set(fleet.programs())
    task = fleet.add_task("hello", orchestrator="vp-x")["id"]
    assert fleet.wait_done([task])[0]["orchestrator"] == "vp-x"
    changed = put(fleet, "vp-x", {**NEW, "discipline": "old"}, "?apply=true")
    assert (changed["applied"], read(fleet)["vp-x"]["discipline"]) == (True, "old")
    open_task = fleet.add_task("never", orchestrator="vp-y", available_at="2099-01-01T00:00:00Z")["id"]
    gone = fleet.http("DELETE", "/api/vps/vp-y?apply=true&reassign_to=vp-x")
    assert (gone["applied"], gone["tasks"]) == (True, {"reassigned": 1})
    assert fleet.task(open_task)["orchestrator"] == "vp-x"
    assert "vp-y" not in fleet.programs()
    assert {one["actor"] for one in passes(fleet)} == {own_key(fleet)}
    supervisords = fleet.supervisords()
    fleet.kill_server()
    fleet.serve()
    assert fleet.supervisords() == supervisords
    page = fleet.http("GET", "/api/fleet/generations")["data"]
    assert [one["target"] for one in page] == ["control-plane", "m01", "m02"]
    assert all(one["current"] == one["last_good"] == one["generations"][0]["digest"] for one in page)


def own_key(fleet: LivingFleet) -> str:
    found = re.search(r"k-[0-9a-f]{8}", fleet.key)
    assert found is not None
    return found[0]


def test_an_automatic_fleet_follows_git(automatic: LivingFleet) -> None:
    """What the API commits, what a person commits, and what drifts; a bad generation once, until it is corrected."""
    fleet = automatic
    made = fleet.http("POST", "/api/vps", json={"name": "vp-new", **NEW})
    assert (made["applied"], made["apply"]["problem"]) == (True, None), made
    assert "vp-new" in fleet.programs()

    file = fleet.home / "fleet.yaml"
    sound = file.read_text()
    file.write_text(sound.replace("discipline: d2", "discipline: d7", 1))
    git(fleet, "commit", "-q", "-a", "-m", "d7")
    until(lambda: read(fleet)["vp-1-2"]["discipline"] == "d7", "a person's commit is in force")

    os.kill(fleet.supervisords()["m01"], signal.SIGKILL)
    until(lambda: fleet.programs().keys() == {"vp-1-1", "vp-1-2", "vp-new"}, "what died is brought back")

    file.write_text(sound.replace("discipline: d2", "discipline: d8", 1).replace("orchestrators:", "orchestrator:"))
    until(lambda: "fleet_unsound" in (fleet.home / "serve.log").read_text(), "a slip is told")
    assert read(fleet)["vp-1-2"]["discipline"] == "d7"

    hasty = sound.replace("min_healthy: 0s, healthy_deadline: 30s", "min_healthy: 0s, healthy_deadline: 1ms")
    hasty = hasty.replace("discipline: d2", "discipline: d8", 1).replace('["python3", ', '["python3", "-u", ', 1)
    file.write_text(hasty)
    git(fleet, "commit", "-q", "-a", "-m", "Too hasty")
    until(lambda: passes(fleet)[-1]["result"] in ("failed", "rolled_back"), "no machine is healthy so soon")
    until(lambda: "refused this generation before" in passes(fleet)[-1]["problem"], "it is not tried again")
    journal, told = fleet.home / ".fleet/machines/m01/journal.jsonl", len(passes(fleet))
    tried = journal.read_text()
    git(fleet, "commit", "-q", "--allow-empty", "-m", "Nothing else")
    git(fleet, "revert", "--no-edit", "HEAD~1")
    until(lambda: passes(fleet)[-1]["kind"] == "fleet_applied", "the correction is applied")
    assert len(passes(fleet)) == told + 1, "nothing was told twice"
    bad = [entry["digest"] for entry in map(json.loads, tried.splitlines()) if entry["step"] == "rejected"]
    assert not [one for one in journal.read_text()[len(tried) :].splitlines() if any(digest in one for digest in bad)]
    until(lambda: fleet.http("GET", "/api/fleet/plan")["summary"]["unchanged"] == 1, "nothing is left to do")
    assert read(fleet)["vp-1-2"]["discipline"] == "d7"
    assert {one["actor"] for one in passes(fleet)} == {own_key(fleet), "system"}


def test_killed_in_a_pass_it_goes_on_after_its_start(automatic: LivingFleet) -> None:
    """Nobody repeats the request: what git says is reached all the same."""
    fleet = automatic
    for number in range(3):
        name = f"vp-k{number}"
        before = git(fleet, "rev-parse", "HEAD")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(fleet.http, "POST", "/api/vps", json={"name": name, **NEW})
            until(lambda before=before: git(fleet, "rev-parse", "HEAD") != before, "it is committed")
            fleet.kill_server()
            with suppress(httpx.HTTPError):
                asked.result()
        fleet.serve()
        until(lambda name=name: name in read(fleet) and name in fleet.programs(), "it runs")
    plan = fleet.http("GET", "/api/fleet/plan")
    assert [action for action in plan["actions"] if action["kind"] != "no-op"] == []
