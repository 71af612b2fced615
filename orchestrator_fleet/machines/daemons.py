"""What a daemon leaves on its machine: its status file and its own key."""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator_fleet import keys
from orchestrator_fleet.machines import durable
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.wire.machine import DaemonKey

MAX_STATUS_BYTES = 64 << 10


class Status(msgspec.Struct, kw_only=True, frozen=True):
    """The part of `run/<orchestrator>.json` that an observer needs; the daemon writes more."""

    pid: int
    generation: str = ""
    charter_version: str = ""
    link: str = "unknown"
    link_detail: str = ""
    sessions: int = 0


_status_decoder = msgspec.json.Decoder(Status)


def status(layout: Layout, orchestrator: str, *, pid: int) -> Status | None:
    """What the daemon says of itself; None when the file is missing, garbage, or another process's than `pid`."""
    data = _read(layout.status_file(orchestrator))
    try:
        said = _status_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return said if pid and said.pid == pid else None


def key(layout: Layout, orchestrator: str) -> DaemonKey | None:
    """The public half of the daemon's key; None when it has none that can be used."""
    parsed = keys.parse(_read(layout.key_file(orchestrator)).decode("ascii", errors="replace").strip())
    return DaemonKey(id=parsed[0], sha256=keys.digest(parsed[1])) if parsed is not None else None


def ensure_key(layout: Layout, orchestrator: str) -> bool:
    """Mint the daemon's key if it has none that can be used; whether one was made."""
    if key(layout, orchestrator) is not None:
        return False
    durable.replace(layout.key_file(orchestrator), f"{keys.mint().text}\n".encode())
    return True


def forget(layout: Layout, orchestrator: str) -> None:
    """Remove what stays of an orchestrator that no longer lives here. Its session folders stay for people to read."""
    for path in (layout.status_file(orchestrator), layout.run / f"{orchestrator}.lock", layout.key_file(orchestrator)):
        path.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_STATUS_BYTES)
    except OSError:
        return b""
