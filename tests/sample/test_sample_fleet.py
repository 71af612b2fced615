"""The sample fleet is what it says it is: 16 machines, real charters, rules that reach everybody, tasks for all."""

from __future__ import annotations

import json
import subprocess
from collections import Counter

import pytest
from sample_repository import AGENTS, HOME

from orchestrator_fleet.cli import submission
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.model import CommandRunner, Fleet
from orchestrator_fleet.spec.schema import json_schema
from orchestrator_fleet.tasks.routing import Router

FLEET_FILE = HOME / "fleet.yaml"
SCHEMA = HOME / "orchestrator_fleet/spec/fleet.schema.json"
TASKS = HOME / "scripts/demo-tasks.json"
MIN_CHARTER_LINES, MAX_CHARTER_LINES = 15, 40


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return load_fleet(FLEET_FILE)


def test_it_has_the_size_that_it_promises(fleet: Fleet) -> None:
    """16 local machines in zones, one canary, 14 or more orchestrators of six or more disciplines."""
    machines = fleet.file.machines
    assert list(machines) == [f"m{n:02d}" for n in range(1, 17)]
    assert {machine.address for machine in machines.values()} == {"local"}
    assert [name for name, machine in machines.items() if machine.labels["tier"] == "canary"] == ["m01"]
    assert len({machine.labels["zone"] for machine in machines.values()}) == 4
    orchestrators = fleet.file.orchestrators.values()
    assert len(orchestrators) >= 14
    assert len({one.discipline for one in orchestrators}) >= 6
    assert {one.machine is None for one in orchestrators} == {True, False}


def test_every_machine_gets_a_bundle_and_every_orchestrator_a_place(fleet: Fleet) -> None:
    """Placement works out, prompts render with the fleet's own template."""
    desired = render(fleet)
    assert set(desired.machines) == set(fleet.file.machines)
    prompts = {
        path: data.decode()
        for bundle in desired.machines.values()
        for path, data in bundle.files.items()
        if path.endswith("/charter.md")
    }
    assert len(prompts) == len(fleet.file.orchestrators)
    assert all("## How you report" in text and "None" not in text for text in prompts.values())


def test_every_charter_is_one_orchestrators_own_and_says_something(fleet: Fleet) -> None:
    """Typed front matter with safety rules, limits and objectives; prose of a readable length."""
    used = Counter(one.charter for one in fleet.file.orchestrators.values())
    assert set(used.values()) == {1}
    assert {f"charters/{path.name}" for path in (HOME / "charters").glob("*.md")} == set(used)
    for path, charter in fleet.charters.items():
        front = charter.front
        said = (front.role, front.identity.name, front.responsibilities, front.constraints, front.safety.always_reject)
        assert all(said), path
        assert None not in (front.objectives.completion_rate, front.limits.sessions), path
        lines = (HOME / path).read_text().count("\n")
        assert MIN_CHARTER_LINES <= lines <= MAX_CHARTER_LINES, path


def test_routing_tests_pass_and_every_rule_but_the_random_one_has_some(fleet: Fleet) -> None:
    """As `fleet validate` runs them."""
    assert Router.of_spec(fleet.file.model_dump(mode="json", by_alias=True)).run_tests() == []
    assert [rule.name for rule in fleet.file.routing if not rule.tests and rule.strategy != "weighted"] == []


def test_every_agent_works_for_somebody(fleet: Fleet) -> None:
    """No script without an orchestrator; each travels with what it imports."""
    runners = [one.runner for one in fleet.file.orchestrators.values()]
    commands = [runner for runner in runners if isinstance(runner, CommandRunner)]
    assert len(commands) == len(runners)
    scripts = {f"scripts/agents/{path.name}" for path in AGENTS.glob("*.py") if path.name != "report.py"}
    assert {element for runner in commands for element in runner.command if element.endswith(".py")} == scripts
    assert all("scripts/agents/report.py" in runner.files for runner in commands)


def test_the_demos_tasks_reach_every_orchestrator(fleet: Fleet) -> None:
    """44 or more, on scopes that exist, in an order in which they can be created."""
    tasks = submission.parse(TASKS.read_text(), name=TASKS.name)
    assert len(tasks) >= 44
    router = Router.of_spec(fleet.file.model_dump(mode="json", by_alias=True))
    load, sent = Counter[str](), Counter[str]()
    for task in tasks:
        assert (HOME / task["metadata"]["scope"]).exists(), task
        fields = {name: value for name, value in task.items() if name not in ("ref", "after")}
        decision = router.route({"tags": [], "priority": "MEDIUM", **fields}, load=load, sent=sent)
        assert decision.orchestrator is not None, task
        load[decision.orchestrator] += 1
        sent[str(decision.rule)] += 1
    assert set(load) == set(fleet.file.orchestrators)
    assert sum(bool(task.get("after")) for task in tasks) >= 3
    work = [(task["title"], json.dumps(task["metadata"], sort_keys=True)) for task in tasks]
    assert len(set(work)) == len(work), "two tasks are the same"


def test_the_schema_that_the_first_line_names_is_current() -> None:
    """`fleet schema > orchestrator_fleet/spec/fleet.schema.json` brings it up to date."""
    first = FLEET_FILE.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA.relative_to(HOME)}"
    assert json.loads(SCHEMA.read_text()) == json_schema()


def test_git_holds_no_key_of_the_sample() -> None:
    """The demo's own goes to a file that git ignores."""
    assert "\nkeys:" not in FLEET_FILE.read_text()
    ignored = subprocess.run(["git", "-C", str(HOME), "check-ignore", "-q", "fleet.d/local-keys.yaml"], check=False)
    assert ignored.returncode == 0, ".gitignore needs a line: fleet.d/local-keys.yaml"
