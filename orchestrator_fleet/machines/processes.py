"""The processes of a machine, found in /proc.

What belongs to a machine is known by the environment it was started with (`FLEET_ROOT`, `FLEET_PROGRAM`,
`FLEET_RESULT`), never by a command's name.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from orchestrator_fleet.pids import Process, boot_id, identify, is_alive

POLL_S = 0.01
KILL_WAIT_S = 5.0
_PROC = Path("/proc")
_GROUP = 2  # field of /proc/<pid>/stat after the command's name


def _stat(pid: int) -> list[str]:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def environment(pid: int) -> dict[str, str]:
    """What the process was started with; empty when it is gone or another user's."""
    try:
        data = (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in data.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def arguments(pid: int) -> list[str]:
    """Its command line; empty when it is gone."""
    try:
        return [os.fsdecode(part) for part in (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")]
    except OSError:
        return []


def leads_its_group(pid: int) -> bool:
    """Whether it is its process group's leader, as every direct child of supervisord and every session is."""
    fields = _stat(pid)
    return bool(fields) and int(fields[_GROUP]) == pid


def find(wanted: Callable[[int, dict[str, str]], bool]) -> list[Process]:
    """Every process but this one that `wanted(pid, environment)` accepts."""
    found = []
    for pid in _pids():
        variables = environment(pid)
        if variables and pid != os.getpid() and wanted(pid, variables) and (process := identify(pid)) is not None:
            found.append(process)
    return found


def _pids() -> Iterator[int]:
    for entry in os.scandir(_PROC):
        if entry.name.isdigit():
            yield int(entry.name)


def supervisords(root: Path) -> list[Process]:
    """Every supervisord that was started for this root, answering or not."""
    return find(
        lambda pid, env: (
            env.get("FLEET_ROOT") == str(root)
            and "FLEET_PROGRAM" not in env
            and "supervisor.supervisord" in arguments(pid)
        )
    )


def daemons(root: Path) -> list[Process]:
    """Every program that a supervisord of this root started: each leads a group of its own."""
    return find(lambda pid, env: env.get("FLEET_ROOT") == str(root) and "FLEET_PROGRAM" in env and leads_its_group(pid))


def leftovers(root: Path) -> list[Process]:
    """Whatever else was started for this root, such as a git that a daemon ran."""
    return find(lambda _, env: env.get("FLEET_ROOT") == str(root))


def of_sessions(folder: Path) -> list[Process]:
    """Every process of the sessions whose folders stand under `folder`."""
    prefix = f"{folder}/"
    return find(lambda _, env: env.get("FLEET_RESULT", "").startswith(prefix))


def end(targets: Iterable[Process], *, term_s: float) -> list[Process]:
    """TERM, wait up to `term_s`, KILL; those that are still there (in the kernel's uninterruptible sleep, say)."""
    alive = _signal(list(targets), signal.SIGTERM)
    alive = _signal(wait_gone(alive, timeout_s=term_s), signal.SIGKILL)
    return wait_gone(alive, timeout_s=KILL_WAIT_S)


def _signal(targets: list[Process], number: signal.Signals) -> list[Process]:
    alive = [process for process in targets if is_alive(process)]
    for process in alive:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
    return alive


def wait_gone(targets: list[Process], *, timeout_s: float) -> list[Process]:
    """Wait until none is left; those that still are after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    alive = [process for process in targets if is_alive(process)]
    while alive and time.monotonic() < deadline:
        time.sleep(POLL_S)
        alive = [process for process in alive if is_alive(process)]
    return alive


def own_name() -> str:
    """This process, as others on the same kernel can look it up: boot, pid namespace, pid, start time."""
    me = identify(os.getpid())
    return f"{_kernel()}/{me.pid}/{me.start_ticks}" if me is not None and _kernel() else ""


def is_known_dead(name: str) -> bool:
    """Whether `own_name()` of a process shows that it runs no more; False when we can't know (another kernel)."""
    kernel, _, rest = name.partition("/")
    pid, _, ticks = rest.partition("/")
    if not kernel or kernel != _kernel() or not pid.isdigit() or not ticks.isdigit():
        return False
    return not is_alive(Process(int(pid), int(ticks)))


def _kernel() -> str:
    try:
        namespace = (_PROC / "self/ns/pid").readlink().name
    except OSError:
        return ""
    boot = boot_id()
    return f"{boot}+{namespace}" if boot else ""
