"""A fleet folder in a git repository, as a person keeps it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator_fleet.reconcile.declare import Author, Change, Declaration, Declared, Edit, NewFile, declare
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.model import FleetFile

ME = Author(name="person:me", email="person.me@acme.invalid")
FLEET = """\
version: 1
fleet: acme
machines:
  m01: {slots: 900}   # this one

orchestrators:
  # The first there was.
  vp-a:
    charter: charters/a.md   # of all
    discipline: engineering

  vp-b: {charter: charters/a.md}   # short

keys:
  k-00000001:
    owner: person:ada   # asked for it
    sha256: "1111111111111111111111111111111111111111111111111111111111111111"
    scopes: [tasks:read]
"""
APART = FLEET.replace("fleet: acme\n", "fleet: acme\ninclude: [fleet.d/*.yaml]\n")


@dataclass
class GitHome:
    """A repository with a fleet in it. `under` is the fleet's folder inside."""

    top: Path
    fleet: str = FLEET
    under: str = "."
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.top.mkdir(parents=True, exist_ok=True)
        self.git("init", "-q", "-b", "main")
        self.git("config", "user.name", "Ada")
        self.git("config", "user.email", "ada@acme.test")
        every = {
            "charters/a.md": "You do what the task says.\n",
            ".gitignore": ".fleet/\n",
            "fleet.yaml": self.fleet,
            **self.files,
        }
        for name, text in every.items():
            self.write(name, text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "A fleet")

    @property
    def home(self) -> Path:
        """The fleet's folder."""
        return self.top / self.under

    @property
    def file(self) -> Path:
        """Its fleet.yaml."""
        return self.home / "fleet.yaml"

    def write(self, name: str, text: str) -> None:
        """Write a file of the fleet's folder."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())

    def git(self, *arguments: str, check: bool = True) -> str:
        """What git says."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        done = subprocess.run(
            ["git", *arguments], cwd=self.top, env=own, capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def head(self) -> str:
        """The commit that is checked out."""
        return self.git("rev-parse", "HEAD")

    def status(self) -> str:
        """What differs from HEAD, untracked files too."""
        return self.git("status", "--porcelain", "--untracked-files=all")

    def subjects(self) -> list[str]:
        """The log, the first commit first."""
        return self.git("log", "--reverse", "--format=%s").split("\n")

    def hook(self, name: str, script: str) -> None:
        """Put a hook in place."""
        path = self.top / ".git/hooks" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def loaded(self) -> FleetFile:
        """The fleet as it reads."""
        return load_fleet(self.file).file

    def declare(
        self,
        *edits: Edit | NewFile,
        make: Callable[[Declaration], Sequence[Edit | NewFile]] | None = None,
        subject: str | Callable[[Sequence[Change]], str] = "Change it",
        **more: Any,
    ) -> Declared:
        """Declare these edits, or what `make` makes."""
        return declare(self.file, make=make or (lambda _: edits), author=ME, subject=subject, **more)


def vp(name: str, value: Mapping[str, Any] | None = None, **more: Any) -> Edit:
    """An orchestrator as it is to read; by default one with the charter that is there."""
    return Edit(section="orchestrators", name=name, value=value or {"charter": "charters/a.md", **more})


def no_vp(name: str) -> Edit:
    """An orchestrator taken out."""
    return Edit(section="orchestrators", name=name, value=None)


def key(key_id: str, owner: str = "person:me", **more: Any) -> Edit:
    """A key."""
    number = key_id.removeprefix("k-")
    value = {"owner": owner, "sha256": number * 8, "scopes": ["admin"], **more}
    return Edit(section="keys", name=key_id, value=value)


def no_key(key_id: str) -> Edit:
    """A key taken out."""
    return Edit(section="keys", name=key_id, value=None)
