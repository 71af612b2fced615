"""The files of a generation that programs read.

`manifest.json` names every other file with its SHA-256; the SHA-256 of its own bytes is the generation's
digest. All documents are written by `encode`, so equal values are equal bytes everywhere.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

MANIFEST = "manifest.json"
CONTROL = "control.json"


class RunnerDoc(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What a session is. `command` has `{assets}/...` where an element names a file that travels along."""

    type: str
    command: tuple[str, ...] = ()
    model: str = ""
    secrets: dict[str, str] = {}


class WorkspaceDoc(msgspec.Struct, kw_only=True, frozen=True):
    """The repository that sessions work on; `isolate` is `worktree` or `none`."""

    repo: str
    ref: str
    isolate: str


class OrchestratorDoc(msgspec.Struct, kw_only=True, frozen=True):
    """`orchestrators/<name>/orchestrator.json`: what a daemon re-reads without a restart.

    Limits are those in force: the smaller of fleet.yaml and the charter; None is without limit. `spec` is its part
    of fleet.yaml with defaults merged, `charter` the charter's front matter. `assets`: path -> SHA-256 of the files
    that travel along.
    """

    name: str
    fleet: str
    machine: str
    discipline: str
    role: str
    labels: dict[str, str]
    control_url: str
    charter_version: str
    runner: RunnerDoc
    sessions_max: int
    session_timeout_s: float
    session_memory_bytes: int | None
    workspace: WorkspaceDoc | None
    spec: dict[str, Any]
    tokens_per_hour: int | None = None
    usd_per_day: float | None = None
    charter: dict[str, Any] = {}
    assets: dict[str, str] = {}


class Manifest(msgspec.Struct, kw_only=True, frozen=True):
    """`manifest.json`: our inventory of one generation.

    `files`: path -> SHA-256. `programs`: orchestrator -> digest of all that must restart its daemon.
    `protected`: orchestrators that may not be deleted until a later generation lifts it.
    """

    target: str
    fleet: str
    files: dict[str, str]
    programs: dict[str, str]
    protected: tuple[str, ...] = ()


class InForce(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What one orchestrator may use: the smaller of what fleet.yaml and its charter declare; None is without limit.

    A default that nobody wrote is the daemon's own, and binds no client that polls.
    """

    sessions: int | None = None
    tokens_per_hour: int | None = None


class ControlDoc(msgspec.Struct, kw_only=True, frozen=True):
    """`control.json`: what the control plane works by.

    `spec` is the whole fleet.yaml, defaults merged, as JSON; `placements`: orchestrator -> machine;
    `charters`: orchestrator -> charter version; `limits`: orchestrator -> those in force under its charter.
    """

    fleet: str
    spec: dict[str, Any]
    placements: dict[str, str]
    charters: dict[str, str]
    limits: dict[str, InForce] = {}


_encoder = msgspec.json.Encoder(order="deterministic")


def encode(document: Any) -> bytes:
    """The one JSON of a value: sorted keys, no spaces, a newline at the end."""
    return _encoder.encode(document) + b"\n"


def sha256(data: bytes) -> str:
    """The SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()
