"""plan, apply, status and destroy on one real machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import FLEET, Run

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(180)]


@pytest.fixture
def home(fleet_home: Path, run: Run) -> Iterator[Path]:
    """The small fleet, quick to confirm; whatever runs is ended."""
    file = fleet_home / "fleet.yaml"
    file.write_text(f"{file.read_text()}rollout: {{min_healthy: 0s, healthy_deadline: 30s, max_deletes: 10%}}\n")
    yield fleet_home
    run("destroy", "--yes")


def _pids(run: Run) -> dict[str, int]:
    machines = json.loads(run("status", "--json").stdout)["machines"]
    return {name: program["pid"] for machine in machines for name, program in machine["programs"].items()}


def test_plan_tells_by_exit_code_only_when_asked(run: Run, home: Path) -> None:
    """0 without --exit-code, 2 with it; nothing is created by looking."""
    assert "2 to start" in run("plan").stdout
    run("plan", "--exit-code", code=2)
    plan = json.loads(run("plan", "--json").stdout)
    assert {a["subject"] for a in plan["actions"] if a["kind"] == "start"} == {"vp-eng", "vp-sec"}
    assert run("plan", "--format", "markdown").stdout.startswith("### ")
    assert not (home / ".fleet/machines/m01/generations").exists()


def test_apply_needs_a_yes_where_nobody_can_be_asked(run: Run, home: Path) -> None:
    """64, naming the option; nothing is done."""
    assert "--yes" in run("apply", code=64).stderr
    assert "--yes" in run("destroy", code=64).stderr
    assert not (home / ".fleet").exists()


def test_apply_does_the_plan_tells_how_it_goes_and_what_came_of_it(run: Run, home: Path) -> None:
    """Lines on stderr meanwhile, a table at the end; the second time nothing."""
    done = run("apply", "--yes")
    assert "m01: applied" in done.stderr
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line.startswith(("m01 ", "contr"))}
    assert rows["m01"] == "applied"
    before = _pids(run)
    assert set(before) == {"vp-eng", "vp-sec"}
    again = json.loads(run("apply", "--yes", "--json").stdout)
    assert {outcome["result"] for outcome in again["outcomes"]} == {"unchanged"}
    assert _pids(run) == before
    run("plan", "--exit-code")
    assert "m01" in run("status").stdout
    assert (home / ".fleet/machines/m01/current").is_symlink()


def test_a_saved_plan_is_applied_or_refused(run: Run, home: Path) -> None:
    """Exactly it; once something moved it is stale, and says so."""
    assert "fleet apply plan.json" in run("plan", "-o", "plan.json").stdout
    run("apply", "plan.json", "--yes")
    error = json.loads(run("apply", "plan.json", "--yes", "--json", code=3).stderr)["error"]
    assert error["code"] == "stale_plan"
    (home / "plan.json").write_text("{}")
    assert "fleet plan -o" in run("apply", "plan.json", "--yes", code=1).stderr
    run("apply", "none.json", "--yes", code=1)
    run("apply", "plan.json", "--only", "m01", "--yes", code=64)


def test_only_names_machines_that_exist(run: Run, home: Path) -> None:
    """Another is a usage error that names them."""
    assert home.exists()
    assert "m01" in run("plan", "--only", "m09", code=64).stderr
    run("apply", "--only", "m01", "--yes")


def test_too_many_deletes_are_refused_until_allowed(run: Run, home: Path) -> None:
    """max_deletes, lifted for once by --allow-deletes."""
    run("apply", "--yes")
    text = (home / "fleet.yaml").read_text()
    (home / "fleet.yaml").write_text(text.replace("vp-eng", "vp-a").replace("vp-sec", "vp-b"))
    assert "--allow-deletes" in run("plan", code=3).stderr
    run("apply", "--yes", "--allow-deletes")
    assert set(_pids(run)) == {"vp-a", "vp-b"}


def test_a_key_made_after_an_apply_works_at_once_and_leaves_nothing_to_do(run: Run, home: Path) -> None:
    """It is published to the control plane alone."""
    run("apply", "--yes")
    current = (home / ".fleet/control/current").readlink()
    run("key", "create", "--owner", "person:me", "--scopes", "admin")
    assert (home / ".fleet/control/current").readlink() != current
    run("plan", "--exit-code")


def test_destroy_leaves_data_only_when_asked_for(run: Run, home: Path) -> None:
    """--data removes the store; a saved key is kept."""
    run("key", "create", "--owner", "person:me", "--scopes", "admin", "--save")
    run("apply", "--yes")
    pids = _pids(run).values()
    run("destroy", "--yes")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert (home / ".fleet/store.sqlite").exists()
    run("destroy", "--yes", "--data")
    assert [path.name for path in (home / ".fleet").iterdir()] == ["key"]


def test_ctrl_c_while_watching_is_130(run: Run, home: Path) -> None:
    """Without a traceback."""
    run("apply", "--yes")
    with subprocess.Popen(
        [FLEET, "status", "--watch", "--interval", "0.2", "--json"],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("FLEET_")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here; a shell that starts us in the background has it ignored
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert [json.loads(watching.stdout.readline())["fleet"] for _ in range(2)] == ["test", "test"]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 130
        assert watching.stderr.read() == "interrupted\n"
