"""What every agent of the sample fleet shares: read the task, look at its repository, write the result.

An agent is any command. It finds the task as JSON on stdin, its repository in `workspace`, and writes
`{"result": ..., "usage": ...}` to the file that $FLEET_RESULT names. Standard library only, so that it runs on any
machine with Python 3.11.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, NoReturn

MAX_FINDINGS = 50
MAX_FILE_BYTES = 1 << 20
MAX_TASK_BYTES = 4 << 20
MAX_TOLD = 200
GIT_TIMEOUT_S = 30
EXIT_FAILED_FOR_GOOD = 78  # the task itself is wrong: trying again can't help


REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A task's repository and the part of it that is asked about (`metadata.scope`, a folder or file in it)."""

    repository: Path
    scope: str
    metadata: dict[str, Any]

    def files(self, *suffixes: str) -> Iterator[tuple[str, str]]:
        """(path, text) of every tracked text file in scope with one of the suffixes; with none, of every one."""
        for path in self.git("ls-files", "-z", "--", self.scope).split("\0"):
            file = self.repository / path
            if not path or (suffixes and file.suffix not in suffixes) or file.is_symlink() or not file.is_file():
                continue
            if file.stat().st_size > MAX_FILE_BYTES:
                continue
            try:
                yield path, file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue

    def modules(self) -> Iterator[tuple[str, ast.Module, str]]:
        """(path, syntax tree, text) of every Python file in scope that parses."""
        for path, text in self.files(".py"):
            try:
                yield path, ast.parse(text), text
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue  # not Python, or too deep for the parser

    def project(self) -> dict[str, Any]:
        """The table `project` of pyproject.toml; the task fails for good where there is none."""
        try:
            read = tomllib.loads((self.repository / "pyproject.toml").read_text(encoding="utf-8"))
            return dict(read["project"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            stop(f"pyproject.toml: wanted a table `project`, got {type(error).__name__}: {error}")

    def installed(self) -> dict[str, Distribution]:
        """What is installed for the project, by normalized name.

        A session runs under the machine's own Python, so this looks where the project's packages are: in `.venv` of the
        repository, or of the one that it was cloned from when that is on this machine.
        """
        origin = self.git("config", "--default", "", "--get", "remote.origin.url").strip()
        places = [
            str(found)
            for home in (self.repository, Path(origin))
            if home.is_absolute()
            for found in home.glob(".venv/lib/python3*/site-packages")
        ]
        return {normal(found.metadata["Name"] or ""): found for found in distributions(path=places)}

    def git(self, *arguments: str) -> str:
        """What git prints; the task fails for good where it can't be asked."""
        command = ["git", "--literal-pathspecs", "-C", str(self.repository), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=GIT_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            stop(f"{' '.join(command)}: {error}")
        return done.stdout.decode("utf-8", errors="replace")


@dataclass(slots=True, kw_only=True)
class Report:
    """What an agent found. `numbers` is the summary; `findings` are lines a person acts on, worst first."""

    headline: str
    numbers: dict[str, Any] = field(default_factory=dict)
    findings: Sequence[str | dict[str, Any]] = ()


def stop(problem: str) -> NoReturn:
    """End the attempt for good, with the reason on stderr."""
    print(problem, file=sys.stderr)
    sys.exit(EXIT_FAILED_FOR_GOOD)


def read_work() -> Work:
    """The task on stdin, checked."""
    try:
        task = json.loads(sys.stdin.buffer.read(MAX_TASK_BYTES))
        asked = dict(task.get("metadata") or {})
        repository = Path(str(task["workspace"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        stop(f"stdin: wanted a task as JSON with `workspace`, got {type(error).__name__}: {str(error)[:MAX_TOLD]}")
    if not (repository / ".git").exists():
        stop(f"workspace: {str(repository)[:MAX_TOLD]!r} is not a git repository")
    scope = str(asked.get("scope", "."))
    if not _is_inside(repository, scope):
        stop(f"metadata.scope: got {scope[:MAX_TOLD]!r}, wanted a folder or file of the repository")
    return Work(repository=repository, scope=scope, metadata=asked)


def _is_inside(repository: Path, scope: str) -> bool:
    try:
        inside = (repository / scope).resolve()
        return inside.is_relative_to(repository.resolve()) and inside.exists()
    except (OSError, ValueError):  # no path can be so long, or have this in it
        return False


def run(agent: Callable[[Work], Report]) -> None:
    """Do the work and leave the result where the daemon looks for it."""
    report = agent(read_work())
    result = {
        "headline": report.headline,
        **report.numbers,
        "findings": list(report.findings[:MAX_FINDINGS]),
        "findings_total": len(report.findings),
    }
    print(report.headline)
    for finding in result["findings"]:
        print("-", finding if isinstance(finding, str) else json.dumps(finding, sort_keys=True))
    target = os.environ.get("FLEET_RESULT")
    if target:
        Path(target).write_text(json.dumps({"result": result}), encoding="utf-8")


def name_of(requirement: str) -> str:
    """`Foo.bar[x]>=1` -> `foo-bar`."""
    match = REQUIREMENT.match(requirement)
    return normal(match[0]) if match else requirement


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def plural(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun[:-1]}ies" if noun.endswith("y") else f"{count} {noun}s"
