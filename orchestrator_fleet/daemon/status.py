"""The daemon's status file, `run/<name>.json`: what the machine's observer reads.

Written at start and when something in it changes, never by the clock: an idle daemon writes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from orchestrator_fleet import log
from orchestrator_fleet.clock import Clock

CONNECTED, CONNECTING, UNAUTHORIZED, REFUSED = "connected", "connecting", "unauthorized", "refused"

_log = log.get(__name__)


class Status(msgspec.Struct, kw_only=True, frozen=True):
    """What the file says.

    `generation` and `charter_version` are empty until there is one. `problem` is why the current generation isn't
    the one in use; empty when it is.
    """

    pid: int
    started_us: int
    program: str
    generation: str
    charter_version: str
    link: str
    link_detail: str
    sessions: int
    problem: str
    at_us: int


class StatusFile:
    """Keeps the file equal to what was last told."""

    def __init__(self, path: Path, *, program: str, clock: Clock) -> None:
        self._path, self._clock = path, clock
        now = clock.now_us()
        self._status = Status(
            pid=os.getpid(),
            started_us=now,
            program=program,
            generation="",
            charter_version="",
            link=CONNECTING,
            link_detail="starting",
            sessions=0,
            problem="",
            at_us=now,
        )

    def write(self) -> None:
        """Put it on disk in one rename; readers never see half of it. A disk that can't take it stops no work."""
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.write_bytes(msgspec.json.encode(self._status) + b"\n")
            part.replace(self._path)
        except OSError as error:
            _log.error("the status file can't be written", problem=str(error))

    def note(self, **changes: str | int) -> None:
        """Change some fields; the file is written only if one of them is new."""
        changed = msgspec.structs.replace(self._status, **changes)
        if changed != self._status:
            self._status = msgspec.structs.replace(changed, at_us=self._clock.now_us())
            self.write()
