"""Where things stand on a machine: the one place that knows the names under its root.

<root>/generations/<digest>/   current -> generations/<digest>
<root>/journal.jsonl  lease.json  lease.lock
<root>/supervisor.sock  run/  log/  keys/  work/
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

MAX_SOCKET_PATH_BYTES = 100  # the kernel's own limit is 107; supervisord binds `<path>.<pid>` first
# Not where TMPDIR points: every process of the machine must find the same socket.
SHORT_SOCKETS = Path("/tmp")  # noqa: S108 - the name is a hash with our uid, and only a socket of ours is connected to
TEMPORARY_PREFIX = ".part-"
FOLDER_MODE, FILE_MODE, EXECUTABLE_MODE = 0o700, 0o600, 0o700


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths under one machine's root (absolute)."""

    root: Path

    @property
    def generations(self) -> Path:
        """The folder of all generations."""
        return self.root / "generations"

    def generation(self, digest: str) -> Path:
        """The folder of one generation."""
        return self.generations / digest

    @property
    def current(self) -> Path:
        """The link that names the current generation."""
        return self.root / "current"

    @property
    def journal(self) -> Path:
        """The steps of all applies."""
        return self.root / "journal.jsonl"

    @property
    def lease(self) -> Path:
        """Who may change this machine."""
        return self.root / "lease.json"

    @property
    def lock(self) -> Path:
        """Locked (flock) by whoever changes something right now."""
        return self.root / "lease.lock"

    @property
    def run(self) -> Path:
        """The daemons' status files and supervisord's pid file."""
        return self.root / "run"

    @property
    def log(self) -> Path:
        """What supervisord and the daemons log."""
        return self.root / "log"

    @property
    def keys(self) -> Path:
        """The daemons' own keys."""
        return self.root / "keys"

    @property
    def work(self) -> Path:
        """The session folders, `<orchestrator>/<task>.<attempt>/`."""
        return self.root / "work"

    @property
    def pid_file(self) -> Path:
        """Where supervisord says its pid."""
        return self.run / "supervisord.pid"

    @property
    def socket(self) -> Path:
        """Where supervisord listens: in the root, or under /tmp when that path is too long for one."""
        inside = self.root / "supervisor.sock"
        if len(os.fsencode(inside)) <= MAX_SOCKET_PATH_BYTES:
            return inside
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return SHORT_SOCKETS / f"fleet-{os.getuid()}-{name}.sock"

    def status_file(self, orchestrator: str) -> Path:
        """What a daemon says of itself."""
        return self.run / f"{orchestrator}.json"

    def key_file(self, orchestrator: str) -> Path:
        """A daemon's own key."""
        return self.keys / f"{orchestrator}.key"

    def create(self) -> None:
        """Make the root and the folder of generations, for their owner only."""
        self.root.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        self.root.chmod(FOLDER_MODE)
        self.generations.mkdir(mode=FOLDER_MODE, exist_ok=True)

    def create_for_programs(self) -> None:
        """Make the folders that programs need."""
        for folder in (self.run, self.log, self.keys, self.work):
            folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
