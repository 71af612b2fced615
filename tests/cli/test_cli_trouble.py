"""The command line in a bad place: stale files, broken specs, disks that can't be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Run

from orchestrator_fleet.cli.client import running
from orchestrator_fleet.reconcile.state import State

MINIMAL = "rollout: {min_healthy: 0s, healthy_deadline: 30s}\n"
LOCK = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.fixture
def applied(fleet_home: Path, run: Run) -> Iterator[Path]:
    """The small fleet, applied; whatever runs is ended, also with the fleet.yaml that a test leaves."""
    (fleet_home / "fleet.yaml").write_text((fleet_home / "fleet.yaml").read_text() + MINIMAL)
    run("apply", "--yes")
    yield fleet_home
    run("destroy", "--yes")


@pytest.mark.parametrize("pid", [1, -1, 0, 4_000_000_000_000, 10**30])
def test_a_serve_file_that_a_killed_control_plane_left_is_not_believed(tmp_path: Path, pid: int) -> None:
    """Its pid may be somebody else's by now, or no pid at all."""
    state = State(tmp_path / "fleet.yaml")
    state.dir.mkdir()
    state.serve_file.write_text(json.dumps({"pid": pid, "url": "http://127.0.0.1:9"}))
    assert running(state) is None
    state.serve_lock.touch()
    assert running(state) is None


def test_a_control_plane_that_runs_is_known_by_its_lock(tmp_path: Path) -> None:
    """For as long as it lives, and asking does not take the lock away."""
    state = State(tmp_path / "fleet.yaml")
    state.dir.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", LOCK, str(state.serve_lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        state.serve_file.write_text(json.dumps({"pid": holder.pid, "url": "http://127.0.0.1:9"}))
        for _ in range(2):
            told = running(state)
            assert told is not None
            assert (told.pid, told.url) == (holder.pid, "http://127.0.0.1:9")
        holder.kill()
    assert running(state) is None


def test_destroy_where_nothing_is_says_so_and_leaves_nothing(run: Run, fleet_home: Path) -> None:
    """No folder is left over from looking."""
    done = run("destroy", "--yes")
    assert done.stdout == "nothing was there to take down\n"
    assert done.stderr == ""
    outcomes = json.loads(run("destroy", "--yes", "--json").stdout)["outcomes"]
    assert {(o["result"], o["reason"]) for o in outcomes} == {("unchanged", "nothing was there")}
    assert not (fleet_home / ".fleet").exists()


@pytest.mark.supervisord
def test_a_second_destroy_says_that_nothing_was_there(run: Run, applied: Path) -> None:
    """The first one tells each target."""
    assert applied.exists()
    first = run("destroy", "--yes")
    assert "m01: destroyed" in first.stderr
    assert first.stdout.startswith("2 targets taken down")
    assert run("destroy", "--yes").stdout == "nothing was there to take down\n"


@pytest.mark.supervisord
@pytest.mark.parametrize("broken", ["machines: [\n", None])
def test_a_broken_spec_does_not_keep_alive_what_runs(run: Run, applied: Path, broken: str | None) -> None:
    """What stands on this host is taken down all the same, and why is told; then there is only the error."""
    pids = [p["pid"] for m in json.loads(run("status", "--json").stdout)["machines"] for p in m["programs"].values()]
    file = applied / "fleet.yaml"
    text = file.read_text()
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    done = run("destroy", "--yes")
    assert "fleet.yaml" in done.stderr
    assert "taking down what stands on this host" in done.stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (applied / ".fleet/machines").exists()
    again = run("destroy", "--yes", code=1)
    assert "fleet.yaml" in again.stderr
    file.write_text(text)


@pytest.mark.supervisord
def test_a_root_elsewhere_is_ended_when_its_machine_leaves_the_file(run: Run, applied: Path, tmp_path: Path) -> None:
    """fleet.yaml no longer says where it stood; what was applied does."""
    root, file = tmp_path / "elsewhere", applied / "fleet.yaml"
    text = file.read_text()
    file.write_text(text.replace("  m01: {}\n", f"  m01: {{}}\n  m02: {{root: {root}}}\n"))
    run("apply", "--yes")
    assert (root / "current").is_symlink()
    file.write_text(text)
    plan = json.loads(run("plan", "--json").stdout)
    assert ("m02", "prune") in {(a["target"], a["kind"]) for a in plan["actions"]}
    run("apply", "--yes")
    assert not root.exists()
    run("plan", "--exit-code")
    assert "m02" not in run("status").stdout


@pytest.mark.supervisord
def test_a_store_that_cannot_be_used_does_not_hide_what_was_applied(run: Run, fleet_home: Path) -> None:
    """The report is printed; the error says that the daemons' keys are missing, and an apply later brings them."""
    file = fleet_home / "fleet.yaml"
    file.write_text(file.read_text() + MINIMAL)
    store = fleet_home / ".fleet/store.sqlite"
    store.mkdir(parents=True)
    try:
        done = run("apply", "--yes", code=1)
        assert "2 applied" in done.stdout
        assert "the daemons' keys are not registered" in done.stderr
        store.rmdir()
        assert "keys registered" in run("apply", "--yes").stderr
    finally:
        run("destroy", "--yes")


def test_a_key_that_cannot_be_saved_is_printed_all_the_same(run: Run, fleet_home: Path) -> None:
    """Its hash is in fleet.yaml already: it must not be lost."""
    (fleet_home / "state").write_text("")  # a file where the folder should be
    done = run(
        "key",
        "create",
        "--owner",
        "person:me",
        "--scopes",
        "admin",
        "--save",
        code=1,
        FLEET_STATE=str(fleet_home / "state"),
    )
    assert done.stdout.startswith("fleet_k-")
    assert "not saved" in done.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_disk_that_cannot_be_written_is_no_bug_of_ours(run: Run, fleet_home: Path, options: tuple[str, ...]) -> None:
    """The file and the kernel's word for it."""
    (fleet_home / "state").write_text("")
    done = run("serve", "--port", "0", *options, code=1, FLEET_STATE=str(fleet_home / "state"))
    assert "bug" not in done.stderr
    assert str(fleet_home / "state") in done.stderr


def test_the_expression_library_comes_without_its_command_line(fleet_home: Path) -> None:
    """Its prompt toolkit would be a third of the time of every command."""
    script = (
        "import sys; from pathlib import Path; from orchestrator_fleet.cli.validate import check;"
        "assert check(Path(sys.argv[1]))[1] == []; assert 'cel.cel' in sys.modules;"
        "sys.exit(','.join(sorted({'prompt_toolkit', 'typer', 'pygments'} & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(fleet_home / "fleet.yaml")],
        env={k: v for k, v in os.environ.items() if not k.startswith("FLEET_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.strip() == ""
