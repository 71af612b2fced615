"""One machine's supervisord: asked over its unix socket, started and ended when need be.

The client is xmlrpc's own over a socket with a timeout; supervisor's transport has none and costs 0.1 s to import.
"""

from __future__ import annotations

import http.client
import os
import socket
import stat
import subprocess
import time
import xmlrpc.client
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from orchestrator_fleet import pids
from orchestrator_fleet.machines import processes
from orchestrator_fleet.machines.declined import FAILED, NOT_RUNNING, Declined
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.render.bundle import SUPERVISORD_CONF

CALL_TIMEOUT_S = 5.0
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0  # a program has `stopwaitsecs` (10 s) before supervisord kills it
TERM_S = 10.0  # the same, of one that is restarted
SHUTDOWN_TIMEOUT_S = 20.0
POLL_S = 0.005
MAX_ERROR_TEXT = 2_000
UMASK = "077"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INHERITED = ("HOME", "LANG", "TZ")

RUNNING = "RUNNING"
ENDED_STATES = frozenset({"STOPPED", "EXITED", "FATAL"})
LIVING_STATES = frozenset({"STARTING", "RUNNING", "BACKOFF", "STOPPING"})
_BAD_NAME, _ALREADY_STARTED, _NOT_RUNNING, _ALREADY_ADDED = 10, 60, 70, 90  # supervisor.xmlrpc.Faults


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path, self._timeout_s = path, timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(str(self._path))


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__()
        self._path, self._timeout_s = path, timeout_s

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if self._connection is not None and self._connection[1] is not None:
            return self._connection[1]
        connection = _Connection(self._path, self._timeout_s)
        self._connection = (host, connection)
        return connection


class Supervisord:
    """A supervisord that answers. Every call raises Declined when it hangs, is gone, or says no."""

    def __init__(self, path: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._proxy = xmlrpc.client.ServerProxy(
            "http://localhost/RPC2", transport=_Transport(path, timeout_s), allow_none=True
        )
        self.pid: int = self._call("getPID")

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._proxy.supervisor, name)(*arguments)
        except TimeoutError as error:
            raise Declined(
                FAILED,
                f"supervisord at {self._path} is alive but did not answer {name} within {self._timeout_s:g} s; "
                "let it go on (SIGCONT) or kill it, then apply again",
            ) from error
        except (xmlrpc.client.ProtocolError, http.client.HTTPException) as error:
            raise Declined(FAILED, f"supervisord at {self._path} answered {name} with no XML-RPC: {error}") from error

    def _refused(self, name: str, fault: xmlrpc.client.Fault) -> Declined:
        return Declined(FAILED, f"supervisord refused {name}: {fault.faultString}")

    def close(self) -> None:
        """Close the connection."""
        self._proxy("close")()

    def programs(self) -> dict[str, dict[str, Any]]:
        """Name -> supervisord's own information of every process."""
        return {info["name"]: info for info in self._call("getAllProcessInfo")}

    def reload(self) -> tuple[list[str], list[str], list[str]]:
        """Read the files of the current generation; the programs added, changed and removed. Nothing else changes."""
        try:
            added, changed, removed = self._call("reloadConfig")[0]
        except xmlrpc.client.Fault as fault:
            raise self._refused("the generation's configuration", fault) from fault
        return added, changed, removed

    def take_out(self, names: list[str]) -> None:
        """Stop programs, all at once, and take them out. Those it doesn't know are out already.

        Asked to wait, supervisord answers once a second; so it is told not to, and watched.
        """
        known = self.programs()
        going = [name for name in names if name in known]
        for name in going:
            self._tolerating(_NOT_RUNNING, "stopProcess", name, False)
        self._watch(lambda: self._living(going), f"stop of {', '.join(going)}", timeout_s=STOP_TIMEOUT_S)
        for name in going:
            self._tolerating(_BAD_NAME, "removeProcessGroup", name)

    def _living(self, names: list[str]) -> list[str]:
        known = self.programs()
        return [name for name in names if name in known and known[name]["statename"] in LIVING_STATES]

    def _watch(self, living: Callable[[], list[str]], what: str, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while left := living():
            if time.monotonic() > deadline:
                raise Declined(FAILED, f"{what}: {', '.join(left)} still runs after {timeout_s:g} s")
            time.sleep(POLL_S)

    def put_in(self, name: str) -> None:
        """Add a program of the configuration last read; it starts by itself."""
        self._tolerating(_ALREADY_ADDED, "addProcessGroup", name)

    def restart(self, names: Collection[str]) -> dict[str, int]:
        """End programs' processes and have others run in their place; name -> pid, 0 where supervisord tries again.

        A process that runs is only told to end, and that another follows is supervisord's own doing: so nothing stays
        down when whoever asked for it is killed in between. Raises Declined, with nothing done, for a name it lacks.
        """
        waiting = self._pids(names)
        for name in waiting:
            self._tolerating(_NOT_RUNNING, "signalProcess", name, "TERM")
        began, again, killed = time.monotonic(), dict[str, int](), False
        while True:
            again |= {name: pid for name, old in waiting.items() if (pid := self._successor(name, old)) is not None}
            waiting = {name: old for name, old in waiting.items() if name not in again}
            took_s = time.monotonic() - began
            if not waiting:
                return {name: again[name] for name in names}
            if took_s > STOP_TIMEOUT_S:
                raise Declined(FAILED, f"{', '.join(waiting)}: not started again within {STOP_TIMEOUT_S:g} s")
            if took_s > TERM_S and not killed:
                killed = True
                for name in waiting:
                    self._tolerating(_NOT_RUNNING, "signalProcess", name, "KILL")
            time.sleep(POLL_S)

    def _pids(self, names: Collection[str]) -> dict[str, int]:
        known = self.programs()
        unknown = sorted(set(names) - known.keys())
        if unknown:
            raise Declined(
                NOT_RUNNING, f"supervisord has no {', '.join(unknown)}; `fleet apply` brings what is declared"
            )
        return {name: int(known[name]["pid"]) for name in names}

    def _successor(self, name: str, old: int) -> int | None:
        """The pid of the process that runs instead of `old`; None while there is none. What has ended is started."""
        info = self.programs().get(name, {"pid": 0, "statename": "gone"})
        if info["pid"] and info["pid"] != old:
            return int(info["pid"])
        if info["statename"] in ENDED_STATES:
            self._tolerating(_ALREADY_STARTED, "startProcess", name, False)
        return 0 if info["statename"] == "BACKOFF" else None

    def hang_up(self, name: str) -> None:
        """Tell a program to read its files again."""
        self._tolerating(_NOT_RUNNING, "signalProcess", name, "HUP")

    def _tolerating(self, fault_code: int, method: str, *arguments: Any) -> None:
        """Call; a fault that says that it is so already is as good as done."""
        try:
            self._call(method, *arguments)
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != fault_code:
                raise self._refused(f"{method} {arguments[0]}", fault) from fault

    def shut_down(self) -> None:
        """Ask it to end its programs and itself; returns before it has."""
        self._call("shutdown")


def connect(layout: Layout) -> Supervisord | None:
    """The machine's supervisord; None when nobody listens. Raises Declined when somebody does and hangs."""
    path = layout.socket
    try:
        seen = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(seen.st_mode) or seen.st_uid != os.getuid():
        raise Declined(FAILED, f"{path} is not a socket of ours; move it away")
    try:
        return Supervisord(path)
    except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError, FileNotFoundError):
        return None


def ensure(layout: Layout, *, variables: Mapping[str, str], python: str) -> tuple[Supervisord, bool]:
    """The machine's supervisord, and whether it was started just now.

    What a killed one left behind (its programs, its socket and pid file) is ended and removed first, so that no
    program ever runs twice.
    """
    answering = connect(layout) or _awaited(layout)
    if answering is not None:
        return answering, False
    processes.end(processes.supervisords(layout.root), term_s=SHUTDOWN_TIMEOUT_S)
    left = processes.end(processes.daemons(layout.root), term_s=STOP_TIMEOUT_S)
    if left:
        raise Declined(
            FAILED, f"programs of a dead supervisord can't be ended: pid {', '.join(str(p.pid) for p in left)}"
        )
    _remove_traces(layout)
    return _start(layout, variables=variables, python=python), True


def _remove_traces(layout: Layout) -> None:
    for stale in (layout.socket, layout.pid_file):
        stale.unlink(missing_ok=True)


def _awaited(layout: Layout) -> Supervisord | None:
    """One that is just starting (an apply that was killed had started it); None if there is none, or it stays deaf."""
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while processes.supervisords(layout.root) and time.monotonic() < deadline:
        if (answering := connect(layout)) is not None:
            return answering
        time.sleep(POLL_S)
    return None


def _start(layout: Layout, *, variables: Mapping[str, str], python: str) -> Supervisord:
    configuration = layout.current / SUPERVISORD_CONF
    command = [python, "-m", "supervisor.supervisord", "-m", UMASK, "-c", str(configuration)]
    try:
        done = subprocess.run(
            command,
            env=dict(variables),
            cwd=layout.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=START_TIMEOUT_S,
            umask=int(UMASK, 8),
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Declined(
            FAILED, f"supervisord did not start within {START_TIMEOUT_S:g} s: {_said(error.stderr)}"
        ) from error
    if done.returncode != 0:
        said = _said(done.stderr or done.stdout)
        raise Declined(FAILED, f"supervisord did not start, exit code {done.returncode}: {said}")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if (answering := connect(layout)) is not None:
            return answering
        time.sleep(POLL_S)
    raise Declined(FAILED, f"supervisord started but does not listen at {layout.socket}; see {layout.log}")


def _said(output: bytes | None) -> str:
    text = (output or b"").decode("utf-8", errors="replace").strip()
    return text[-MAX_ERROR_TEXT:] or "it said nothing"


def environment(
    *, root: Path, socket_path: Path, python: str, home: Path, machine: str, declared: Collection[str] = ()
) -> dict[str, str]:
    """What supervisord starts with: built from nothing, so that no secret of the caller's reaches a program.

    But for those `declared`: a runner's `env:NAME` is resolved by its daemon, from what was there at this start.
    """
    kept = {name: os.environ[name] for name in (*sorted(declared), *INHERITED) if name in os.environ}
    return {
        **kept,
        "PATH": os.environ.get("PATH", DEFAULT_PATH),
        "FLEET_ROOT": str(root),
        "FLEET_SOCKET": str(socket_path),
        "FLEET_PYTHON": python,
        "FLEET_HOME": str(home),
        "FLEET_MACHINE": machine,
    }


def end(layout: Layout) -> list[pids.Process]:
    """End supervisord and its programs, hanging or not; the processes that could not be ended.

    A supervisord that was killed leaves its socket, perhaps outside the root, and its pid file: they go as well.
    """
    found = processes.supervisords(layout.root)
    if found and _asked_to_shut_down(layout):
        processes.wait_gone(found, timeout_s=SHUTDOWN_TIMEOUT_S)
    left = processes.end(processes.supervisords(layout.root), term_s=0)
    left += processes.end(processes.daemons(layout.root), term_s=STOP_TIMEOUT_S)
    if not left:
        _remove_traces(layout)
    return left


def _asked_to_shut_down(layout: Layout) -> bool:
    """Stop the programs all at once, then shut down: by itself, supervisord ends one a second."""
    try:
        answering = connect(layout)
        if answering is None:
            return False
        answering.take_out(list(answering.programs()))
        answering.shut_down()
    except (Declined, OSError, xmlrpc.client.Error):
        return False  # it hangs, or a program does: they are killed next
    return True
