"""The demo on a clone: every task DONE, nothing dirty, nothing left."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent.parent
FLEET = str(Path(sys.executable).with_name("fleet"))
TIMEOUT_S = 200

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(600)]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of this repository, with what is not committed here yet, on a free port."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(HOME), str(clone)], check=True, timeout=60)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=HOME, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (HOME / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / name, clone / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    text = (clone / "fleet.yaml").read_text()
    (clone / "fleet.yaml").write_text(re.sub(r"http://127\.0\.0\.1:\d+", url, text))
    identity = ("-c", "user.name=A Test", "-c", "user.email=test@example.com")
    subprocess.run(["git", "add", "--all"], cwd=clone, check=True)
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "As it stands"], cwd=clone, check=True)
    return clone


def _in(clone: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLEET_")}
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def _demo(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """scripts/demo without its setup: this environment is the one it would make."""
    return _in(clone, sys.executable, "scripts/demo_run.py", *arguments)


def _processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that were started with this folder in their environment or arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                told = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
            except OSError:  # it has just ended
                continue
            if f"{folder}/.fleet".encode() in told:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_the_demo_does_every_task_twice_over_and_leaves_nothing(clone: Path) -> None:
    """Run, look, run again, stop, stop again."""
    try:
        first = _demo(clone)
        assert first.returncode == 0, first.stdout + first.stderr
        done = re.search(r"all (\d+) tasks are DONE", first.stdout)
        assert done is not None
        assert int(done[1]) >= 40
        assert _in(clone, FLEET, "plan", "--exit-code").returncode == 0, _in(clone, FLEET, "plan").stdout
        assert _in(clone, "git", "status", "--porcelain").stdout == ""
        again = _demo(clone)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "No changes" in again.stdout
        count = _in(clone, FLEET, "sql", "select status, count(*) from tasks group by 1", "--format", "csv").stdout
        assert count.splitlines()[1:] == [f"DONE,{2 * int(done[1])}"]
    finally:
        stopped = _demo(clone, "--stop")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert _processes_of(clone) == []
    assert not (clone / ".fleet/machines").exists()
    assert _demo(clone, "--stop").returncode == 0
    assert _in(clone, "git", "status", "--porcelain").stdout == ""


def test_a_demo_that_fails_says_where_the_logs_are(clone: Path) -> None:
    """1, here because the spec is broken."""
    (clone / "fleet.yaml").write_text("version: 9\n")
    failed = _demo(clone)
    assert failed.returncode == 1
    assert "logs: " in failed.stderr
