"""When a process ends, and how to end it with all it started.

Ends are learned from a pidfd (at once, for children and strangers alike), or by looking each `POLL_S` where the kernel
gives none.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from orchestrator_fleet.pids import Process, is_alive

POLL_S = 0.2


async def ended(process: Process) -> None:
    """Return as soon as the process runs no more."""
    descriptor = _open_pidfd(process.pid)
    if descriptor is None:
        while is_alive(process):  # noqa: ASYNC110 - there is nobody to tell us
            await asyncio.sleep(POLL_S)
        return
    try:
        if is_alive(process):
            await _readable(descriptor)
    finally:
        os.close(descriptor)


def _open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None for an old kernel or a process already gone."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    seen: asyncio.Future[None] = loop.create_future()

    def note() -> None:
        if not seen.done():
            seen.set_result(None)

    loop.add_reader(descriptor, note)
    try:
        await seen
    finally:
        loop.remove_reader(descriptor)


def signal_group(leader: Process, number: signal.Signals) -> None:
    """Signal every process of the group `leader` leads; nothing happens if it is gone already."""
    if is_alive(leader):
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, number)


def sweep(mark: str) -> int:
    """Kill every process that has `mark` (`NAME=value`) in the environment it was started with; how many those were.

    This finds what left the session's process group (`setsid`, double forks) and what stayed behind when the
    group's leader was killed. Processes of other users can't be read and are not ours.
    """
    wanted, killed = mark.encode(), 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid() and _has_in_environment(entry.path, wanted):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(entry.name), signal.SIGKILL)
                killed += 1
    return killed


def _has_in_environment(folder: str, wanted: bytes) -> bool:
    try:
        return wanted in Path(folder, "environ").read_bytes().split(b"\0")
    except OSError:
        return False
