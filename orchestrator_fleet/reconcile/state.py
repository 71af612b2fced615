"""Where a fleet's run-time files stand: `.fleet/` beside fleet.yaml, or the folder that FLEET_STATE names.

FLEET_STORE=postgresql://... (or sqlite:///...) names another live database than fleet.yaml does.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.reconcile import applied

EXEC_TIMEOUT_S = 10.0
MAX_REFERENCE_BYTES = 64 << 10
LOCAL = "local"


class State:
    """The paths of one fleet's run-time files. Making one touches no disk."""

    def __init__(self, fleet_file: Path) -> None:
        self.fleet_file = fleet_file.resolve()
        self.home = self.fleet_file.parent
        named = os.environ.get("FLEET_STATE")
        self.dir = Path(named).resolve() if named else self.home / ".fleet"

    @property
    def machines(self) -> Path:
        """The folder of all local machines' roots."""
        return self.dir / "machines"

    def machine_root(self, name: str) -> Path:
        """A local machine's root, where fleet.yaml names no other."""
        return self.machines / name

    @property
    def control_root(self) -> Path:
        """What the control plane works by: a root with generations and no supervisord."""
        return self.dir / "control"

    @property
    def store(self) -> Path:
        """The live database, unless fleet.yaml names another."""
        return self.dir / "store.sqlite"

    def store_url(self, store: str) -> str:
        """`control_plane.store` as a URL: `sqlite` is the file here, anything else a reference to be resolved here.

        FLEET_STORE in the environment goes before it. Raises FleetError when the reference leads nowhere.
        """
        named = os.environ.get("FLEET_STORE") or store
        if named == "sqlite":
            return f"sqlite:///{self.store}"
        return named if "://" in named else resolve(named, home=self.home)

    @property
    def history(self) -> Path:
        """The DuckDB file of everything that happened."""
        return self.dir / "history.duckdb"

    @property
    def history_folder(self) -> Path:
        """The archive of old history."""
        return self.dir / "history"

    @property
    def key_file(self) -> Path:
        """The key that clients started here use."""
        return self.dir / "key"

    @property
    def serve_file(self) -> Path:
        """Pid and URL of the `fleet serve` that runs here."""
        return self.dir / "serve.json"

    @property
    def serve_lock(self) -> Path:
        """Locked (flock) by the `fleet serve` that runs here, for as long as it lives."""
        return self.dir / "serve.lock"

    @property
    def log(self) -> Path:
        """The folder of logs."""
        return self.dir / "log"

    def local_roots(self) -> dict[str, Path]:
        """Machines that have a root on this host, declared or not: one of these, or where a fleet.yaml put it."""
        elsewhere = {
            name: Path(machine.root)
            for one in reversed(applied.read(self.control_root))
            for name, machine in one.spec.machines.items()
            if machine.address == LOCAL and machine.root is not None and is_name(name)
        }
        here = self.machines.iterdir() if self.machines.is_dir() else ()
        roots = elsewhere | {path.name: path for path in here if is_name(path.name)}
        return {name: roots[name] for name in sorted(roots) if roots[name].is_dir()}


def resolve(reference: str, *, home: Path) -> str:
    """What `env:NAME`, `file:PATH` (relative to the fleet folder) or `exec:COMMAND` leads to; raises FleetError."""
    kind, _, rest = reference.partition(":")
    if kind == "env":
        if rest not in os.environ:
            raise FleetError(f"{reference}: the environment has no {rest}; set it and try again")
        return os.environ[rest]
    if kind == "file":
        path = home / Path(rest).expanduser()
        try:
            with path.open("rb") as file:
                return file.read(MAX_REFERENCE_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise FleetError(f"{reference}: can't be read: {error}; write the value there") from error
    if kind == "exec":
        return _executed(reference, rest.split(), home)
    raise FleetError(f"got {kind!r}, wanted a reference: env:NAME, file:PATH or exec:COMMAND")


def _executed(reference: str, command: list[str], home: Path) -> str:
    try:
        done = subprocess.run(command, cwd=home, capture_output=True, timeout=EXEC_TIMEOUT_S, check=True)
        return done.stdout[:MAX_REFERENCE_BYTES].decode().strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError, IndexError) as error:
        raise FleetError(f"{reference}: the command gave no value: {error}") from error
