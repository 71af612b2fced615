"""What was committed here and no apply has brought yet: so that who changes it again reads what the files have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Spec = Mapping[str, Any]
Stamp = tuple[int, int, int] | None


class Pending:
    """Specs of orchestrators by name, good for as long as nobody else has touched the files that they stand in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._specs: dict[str, Spec] = {}
        self._files: dict[str, Stamp] = {}

    def over(self, in_force: Mapping[str, Spec]) -> Mapping[str, Spec]:
        """What is in force, with what is not yet."""
        if not self._specs:
            return in_force
        self.look()
        self._specs = {name: spec for name, spec in self._specs.items() if in_force.get(name) != spec}
        return {**in_force, **self._specs}

    def look(self) -> None:
        """Forget all of it when somebody has edited the files, or moved HEAD: they read otherwise now."""
        if any(self._stamp(file) != stamp for file, stamp in self._files.items()):
            self._specs, self._files = {}, {}

    def committed(self, files: Iterable[str]) -> None:
        """These files are as a commit of ours has left them."""
        self._files |= {file: self._stamp(file) for file in files}

    def put(self, name: str, spec: Spec | None) -> None:
        """This is what the files have of an orchestrator; None: nothing any more."""
        self._specs.pop(name, None)
        if spec is not None:
            self._specs[name] = spec

    def _stamp(self, file: str) -> Stamp:
        try:
            stat = (self._folder / file).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns
