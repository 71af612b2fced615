"""The shell doors: they say how they are used, and setup does nothing twice."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent.parent
DOORS = ["scripts/setup", "scripts/demo", "scripts/test", "scripts/check", "scripts/bench", "scripts/lock", ".ci/run"]


@pytest.mark.parametrize("door", DOORS)
def test_a_door_is_executable_and_valid_bash(door: str) -> None:
    """Also in a fresh clone: git keeps the mode."""
    assert os.access(HOME / door, os.X_OK)
    subprocess.run(["bash", "-n", str(HOME / door)], check=True)
    assert (HOME / door).read_text().splitlines()[0] == "#!/usr/bin/env bash"


@pytest.mark.parametrize("door", ["scripts/setup", "scripts/demo", "scripts/check", "scripts/bench"])
def test_a_wrong_argument_is_64_with_the_usage(door: str) -> None:
    """Before anything is installed or started."""
    done = subprocess.run([str(HOME / door), "--no-such"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 64
    assert f"usage: {door}" in done.stderr


def _clone_of_setup(folder: Path) -> Path:
    """A folder with setup and what it reads, and an environment that looks installed."""
    (folder / "scripts").mkdir()
    (folder / ".venv/bin").mkdir(parents=True)
    for part in ("scripts/setup", "scripts/requirements.lock", "pyproject.toml"):
        (folder / part).write_bytes((HOME / part).read_bytes())
    (folder / "scripts/setup").chmod(0o755)
    for program in ("python", "fleet"):
        (folder / ".venv/bin" / program).write_text('#!/bin/sh\necho "$@" >>"$(dirname "$0")/called"\n')
        (folder / ".venv/bin" / program).chmod(0o755)
    return folder


def _setup(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(folder / "scripts/setup"), *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_setup_installs_once_and_again_only_when_something_changed(tmp_path: Path) -> None:
    """Its memory is a digest of pyproject.toml and the pins."""
    folder = _clone_of_setup(tmp_path)
    called = folder / ".venv/bin/called"
    assert "installing" in _setup(folder, "--dev").stdout
    assert "--constraint scripts/requirements.lock --editable .[dev]" in called.read_text()
    called.unlink()
    start = time.monotonic()
    for arguments in (["--dev"], []):
        done = _setup(folder, *arguments)
        assert (done.returncode, done.stdout) == (0, "")
    assert not called.exists()
    assert time.monotonic() - start < 5
    (folder / "scripts/requirements.lock").write_text("changed==1\n")
    assert "installing" in _setup(folder).stdout


def test_setup_for_use_is_not_enough_for_dev(tmp_path: Path) -> None:
    """The other way round it is."""
    folder = _clone_of_setup(tmp_path)
    _setup(folder)
    assert "installing .[dev]" in _setup(folder, "--dev").stdout
    assert _setup(folder).stdout == ""


def test_setup_says_what_is_missing_when_there_is_no_python(tmp_path: Path) -> None:
    """With a way to name one."""
    folder = _clone_of_setup(tmp_path)
    (folder / ".venv/bin/python").unlink()
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "sha256sum", "cut", "git", "id", "env"):
        (tools / tool).symlink_to(
            subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        )
    done = _setup(folder, PATH=str(tools))
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
