"""The real command line, in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import forked
from forked import FLEET

TIMEOUT_S = 60
Run = Callable[..., subprocess.CompletedProcess[str]]


def run_in(folder: Path) -> Run:
    """`run("plan", "--json", code=2)`: run fleet there, check the exit code and that a pipe gets no escape code."""

    def run(*args: str, code: int = 0, cwd: Path = folder, stdin: str = "", **env: str):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FLEET_") and k != "NO_COLOR"}
        done = forked.run(
            [FLEET, *args],
            cwd=cwd,
            env={**clean, **env},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == code, f"fleet {' '.join(args)} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "\x1b" not in done.stdout + done.stderr
        return done

    return run


FLEET_YAML = """\
# the fleet of a test
version: 1
fleet: test
machines:
  m01: {}
defaults:
  runner: {type: command, command: ["true"]}
orchestrators:
  vp-eng: {charter: charters/vp.md, discipline: engineering}
  vp-sec: {charter: charters/vp.md, discipline: security}
routing:
  - name: urgent
    when: task.priority == "CRITICAL"
    to: {orchestrator: vp-sec}
  - name: by-discipline
    when: has(task.discipline)
    to: {discipline: "{{ task.discipline }}"}
  - name: rest
    to: {orchestrator: vp-eng}
    tests:
      - task: {title: anything}
        expect: vp-eng
"""
