"""The generation a daemon works by: its orchestrator's documents under `<root>/current`.

A generation that is missing or broken never takes away what works: the last good one stays, and `problem` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.wire.documents import OrchestratorDoc

MAX_DOCUMENT_BYTES = 4 << 20


class GenerationBroken(FleetError):
    """The current generation can't be used; apply the fleet again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generation as this daemon sees it. `folder` is absolute and names the digest, never `current`."""

    digest: str
    folder: Path
    doc: OrchestratorDoc

    @property
    def assets(self) -> Path:
        """Where the files that travel along with runners stand."""
        return self.folder / "assets"


def current_digest(root: Path) -> str | None:
    """What `<root>/current` names, None when there is no such link."""
    try:
        return (root / "current").readlink().name
    except OSError:
        return None


def read(root: Path, name: str) -> Generation:
    """The current generation's documents of orchestrator `name`; raises GenerationBroken."""
    digest = current_digest(root)
    if digest is None:
        raise GenerationBroken(f"{root / 'current'}: there is no current generation; run `fleet apply`")
    folder = root / "generations" / digest
    path = folder / "orchestrators" / name / "orchestrator.json"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DOCUMENT_BYTES)
        doc = msgspec.json.decode(data, type=OrchestratorDoc)
    except OSError as error:
        raise GenerationBroken(f"{path}: can't be read: {error.strerror}; run `fleet apply`") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise GenerationBroken(f"{path}: is not what this version reads: {error}; run `fleet apply`") from error
    if doc.name != name:
        raise GenerationBroken(f"{path}: names {doc.name!r}, wanted {name!r}; run `fleet apply`")
    return Generation(digest=digest, folder=folder, doc=doc)


class Reader:
    """Follows `<root>/current`.

    `good` is the last generation that could be read, `problem` why a newer one couldn't.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root, self._name = root, name
        self._seen: str | None = None
        self.good: Generation | None = None
        self.problem = ""

    def refresh(self, *, force: bool = False) -> bool:
        """Read again if the link names another generation (or always); whether `good` or `problem` changed."""
        digest = current_digest(self._root)
        if digest == self._seen and self.good is not None and not force:
            return False
        before = (self.good, self.problem)
        self._seen = digest
        try:
            self.good, self.problem = read(self._root, self._name), ""
        except GenerationBroken as error:
            self.problem = str(error)
        return (self.good, self.problem) != before
