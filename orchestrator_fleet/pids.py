"""Who a process is, as the kernel tells it.

A pid alone is no identity, as numbers come again; a pid with its start time is, within one boot.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_STATE, _START_TICKS = 0, 19  # fields of /proc/<pid>/stat after the command's name
_GONE_STATES = "ZXx"


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """One process: its pid and the clock tick, since boot, at which it started."""

    pid: int
    start_ticks: int


def identify(pid: int) -> Process | None:
    """Who has this pid now; None when nobody does. A zombie counts as nobody."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None


def parse_stat(text: str) -> Process | None:
    """The process in a line of /proc/<pid>/stat; None for a zombie and for anything that is no such line."""
    pid, _, rest = text.partition(" ")
    fields = rest.rpartition(")")[2].split()
    try:
        if fields[_STATE] in _GONE_STATES:
            return None
        return Process(pid=int(pid), start_ticks=int(fields[_START_TICKS]))
    except (IndexError, ValueError):
        return None


def is_alive(process: Process) -> bool:
    """Whether exactly this process still runs."""
    return identify(process.pid) == process


def boot_id() -> str:
    """This boot of this machine; empty where the kernel doesn't tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
