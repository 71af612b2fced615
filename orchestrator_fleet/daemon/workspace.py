"""A session's workspace: a git tree of its own, cloned by the session itself before its command starts.

Because the clone runs inside the session, the session's time limit, a cancel and a restarted daemon all hold for
it as well. A clone that fails is a failed attempt with git's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.wire.documents import WorkspaceDoc

REPO = "repo"


class WorkspaceInvalid(FleetError):
    """The declared workspace can't be used on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Where the session works. `source` is what is cloned into `path`, None when the tree is used as it is."""

    path: Path
    source: str | None = None
    ref: str = ""
    local: bool = False


def choose(doc: WorkspaceDoc, *, folder: Path, fleet_home: Path) -> Workspace:
    """Where a session in `folder` works; raises WorkspaceInvalid."""
    local = not _is_remote(doc.repo)
    source = str(fleet_home / Path(doc.repo).expanduser()) if local else doc.repo
    if doc.ref.startswith("-"):
        raise WorkspaceInvalid(
            f"workspace.ref: got {doc.ref!r}, wanted a branch, tag or commit; change it in fleet.yaml"
        )
    if doc.isolate == "none":
        if not local:
            raise WorkspaceInvalid(
                f"workspace.isolate: none works in a folder of this machine, got {doc.repo!r}; use isolate: worktree"
            )
        return Workspace(path=Path(source))
    return Workspace(path=folder / REPO, source=source, ref=doc.ref, local=local)


def _is_remote(repo: str) -> bool:
    """As git tells them apart: a scheme, or a colon before the first slash (`git@host:path`)."""
    head = repo.partition("/")[0]
    return "://" in repo or ":" in head
