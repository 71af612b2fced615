"""The commands that need nothing but files: init, validate, schema, route explain."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from command_line import Run

from orchestrator_fleet.cli.init import _name_of
from orchestrator_fleet.cli.validate import github
from orchestrator_fleet.errors import Diagnostic


def test_init_makes_a_fleet_that_is_valid(run: Run, tmp_path: Path) -> None:
    """With its routing test passed, and every file it names."""
    written = json.loads(run("init", "--json").stdout)["written"]
    assert set(written) == {
        "fleet.yaml",
        "charters/engineering.md",
        "scripts/agents/hello.py",
        ".github/workflows/fleet.yml",
        ".gitignore",
    }
    assert "1 routing test" in run("validate").stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and re.search(r"@[A-Z]+@", path.read_text())]


def test_inits_workflow_plans_pull_requests_and_applies_merges(run: Run, tmp_path: Path) -> None:
    """Both validate first."""
    run("init")
    jobs = yaml.safe_load((tmp_path / ".github/workflows/fleet.yml").read_text())["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert any("fleet validate --format github" in line for line in commands["plan"])
    assert any("fleet plan" in line for line in commands["plan"])
    assert commands["apply"][-1] == "fleet apply --yes"


def test_init_refuses_a_folder_that_has_a_fleet(run: Run, fleet_home: Path) -> None:
    """Exit 3, and nothing is written."""
    before = (fleet_home / "fleet.yaml").read_text()
    assert "nothing was written" in run("init", code=3).stderr
    assert (fleet_home / "fleet.yaml").read_text() == before
    assert not (fleet_home / ".github").exists()


def test_init_keeps_what_is_there(run: Run, tmp_path: Path) -> None:
    """A .gitignore of one's own stays, and the missing line is named."""
    (tmp_path / ".gitignore").write_text("mine\n")
    text = run("init").stdout
    assert (tmp_path / ".gitignore").read_text() == "mine\n"
    assert "add `.fleet/` to .gitignore" in text


def test_init_makes_the_folder_it_is_given(run: Run, tmp_path: Path) -> None:
    """And names the fleet after it, unless told."""
    run("init", "My Team")
    assert "\nfleet: my-team\n" in (tmp_path / "My Team/fleet.yaml").read_text()
    run("init", "other", "--name", "acme")
    assert "\nfleet: acme\n" in (tmp_path / "other/fleet.yaml").read_text()
    run("init", "third", "--name", "Not A Name", code=64)


@pytest.mark.parametrize(
    ("folder", "name"), [("acme", "acme"), ("My Fleet!", "my-fleet"), ("42", "my-fleet"), ("a" * 80, "a" * 63)]
)
def test_a_folders_name_becomes_a_fleets_name(folder: str, name: str) -> None:
    """Whatever it is."""
    assert _name_of(Path("/x") / folder) == name


def test_validate_prints_every_error_at_once(run: Run, fleet_home: Path) -> None:
    """With line and column, and exit 1."""
    text = (fleet_home / "fleet.yaml").read_text()
    (fleet_home / "fleet.yaml").write_text(
        text.replace("charters/vp.md", "charters/vpp.md", 1).replace("discipline: sec", "discipline: Sec")
    )
    lines = run("validate", code=1).stderr.splitlines()
    assert len(lines) >= 2
    assert all(re.match(r"fleet\.yaml:\d+:\d+: ", line) for line in lines)
    assert any("did you mean charters/vp.md" in line for line in lines)


def test_validate_runs_the_routing_tests(run: Run, fleet_home: Path) -> None:
    """One that fails is an error with what came instead."""
    text = (fleet_home / "fleet.yaml").read_text()
    (fleet_home / "fleet.yaml").write_text(text.replace("expect: vp-eng", "expect: vp-sec"))
    assert "vp-eng" in run("validate", code=1).stderr
    answer = json.loads(run("validate", "--format", "json", code=1).stdout)
    assert answer["valid"] is False
    assert len(answer["diagnostics"]) == 1


def test_a_routing_test_that_fails_is_told_at_its_place(run: Run, fleet_home: Path) -> None:
    """The line of what it expects, in the file that has it."""
    (fleet_home / "fleet.yaml").write_text("include: [more.yaml]\n" + (fleet_home / "fleet.yaml").read_text())
    more = """\
routing:
  - name: late
    when: "false"
    to: {orchestrator: vp-eng}
    tests:
      - {task: {title: a, discipline: security}, expect: vp-sec}
      - task: {title: b}
        expect: vp-sec
"""
    text = (fleet_home / "fleet.yaml").read_text()
    (fleet_home / "fleet.yaml").write_text(text.replace("  - name: rest\n", "  - name: rest\n    when: 1 == 1\n"))
    (fleet_home / "more.yaml").write_text(more)
    lines = run("validate", code=1).stderr.splitlines()
    told = "the test task goes to vp-eng by rest (the only one it means), wanted vp-sec"
    assert lines == [
        f"more.yaml:8:17: routing[3].tests[1].expect: {told}; `fleet route explain` shows what each rule says"
    ]


def test_route_explain_tells_each_rule_and_how_one_of_several_is_chosen(run: Run, fleet_home: Path) -> None:
    """For people and, with --json, for programs."""
    text = (fleet_home / "fleet.yaml").read_text()
    anybody = "routing:\n  - {name: anybody, when: task.title == 'x', to: {labels: {team: x}}, strategy: round-robin}\n"
    text = text.replace("charters/vp.md,", "charters/vp.md, labels: {team: x},")
    (fleet_home / "fleet.yaml").write_text(text.replace("routing:\n", anybody))
    told = run("route", "explain", "--title", "x").stdout
    assert "-> vp-eng (by anybody: turn 1: one after the other of 2)" in told
    assert "round-robin among vp-eng, vp-sec: one after the other, in the order of their names" in told
    assert "not asked: an earlier rule matched" in told
    answer = json.loads(run("--json", "route", "explain", "--discipline", "security").stdout)
    assert (answer["orchestrator"], answer["rule"], answer["strategy"]) == ("vp-sec", "by-discipline", "least-loaded")
    assert answer["considered"][-1] == {
        "rule": "by-discipline",
        "matched": True,
        "reason": "the only one it means",
        "strategy": "least-loaded",
        "among": ["vp-sec"],
    }
    assert answer["considered"][0]["matched"] is False


def test_validate_annotates_pull_requests(run: Run, fleet_home: Path) -> None:
    """GitHub's commands on stdout, the file named from where the command runs."""
    (fleet_home / "fleet.yaml").write_text("version: 2\n")
    lines = run("validate", "--format", "github", "-f", f"{fleet_home.name}/fleet.yaml", code=1, cwd=fleet_home.parent)
    assert f"::error file={fleet_home.name}/fleet.yaml,line=1,col=" in lines.stdout


def test_an_annotation_escapes_what_github_reads(monkeypatch, tmp_path: Path) -> None:
    """Nobody's text becomes a command."""
    monkeypatch.chdir(tmp_path)
    problem = Diagnostic(file="a,b.yaml", line=3, column=1, path="x:y", problem="50%\n::add-mask::x", hint="no")
    assert github(problem, folder=tmp_path) == (
        "::error file=a%2Cb.yaml,line=3,col=1,title=x%3Ay::50%25%0A::add-mask::x; no"
    )


def test_validate_of_no_file_says_what_to_do(run: Run) -> None:
    """`fleet init`, or -f."""
    assert "fleet init" in run("validate", code=1).stderr


def test_schema_is_json_schema(run: Run) -> None:
    """It describes what the file has."""
    schema = json.loads(run("schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {"machines", "orchestrators", "routing"} <= set(schema["properties"])


def test_route_explain_says_why_of_each_rule(run: Run, fleet_home: Path) -> None:
    """Those before the match, the match, and those not asked."""
    assert fleet_home.exists()
    lines = run("route", "explain", "--discipline", "security").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["urgent", "no"], ["by-discipline", "matched"], ["rest", "-"]]
    assert lines[-1].startswith("-> vp-sec (by by-discipline")


def test_route_explain_in_json(run: Run, fleet_home: Path) -> None:
    """Priority, tags and metadata count too."""
    assert fleet_home.exists()
    answer = json.loads(run("route", "explain", "--priority", "critical", "--json").stdout)
    assert (answer["orchestrator"], answer["rule"]) == ("vp-sec", "urgent")
    assert [c["rule"] for c in answer["considered"]] == ["urgent"]


def test_route_explain_of_a_task_nobody_gets_is_1(run: Run, fleet_home: Path) -> None:
    """With the reason."""
    assert fleet_home.exists()
    assert "-> nobody" in run("route", "explain", "--orchestrator", "vp-none", code=1).stdout
