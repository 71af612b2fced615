"""Processes of ours that start at once: forked from one that has imported everything, once for each pytest worker.

A `fleet serve` imports for a second what its test then uses for a tenth of one. `Popen` and `run` are subprocess's, for
command lines that are Python of ours: `fleet ...`, `python -m module ...`, `python -c script ...`. What they start is a
process of its own, as real as any: own pid, session, environment and files, ended by signals. Other command lines, and
those with LD_PRELOAD, go to subprocess as they are.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

PRELOADED = (
    "orchestrator_fleet.api.app",
    "orchestrator_fleet.api.serve",
    "orchestrator_fleet.cli.apply",
    "orchestrator_fleet.cli.client",
    "orchestrator_fleet.cli.key",
    "orchestrator_fleet.cli.main",
    "orchestrator_fleet.cli.plan",
    "orchestrator_fleet.cli.sql",
    "orchestrator_fleet.cli.status",
    "orchestrator_fleet.cli.store",
    "orchestrator_fleet.cli.task",
    "orchestrator_fleet.cli.vp",
    "orchestrator_fleet.daemon.engine",
    "orchestrator_fleet.reconcile.control",
    "orchestrator_fleet.reconcile.fleet",
    "orchestrator_fleet.store.daemon_keys",
    "psycopg",
    "rich.console",
)
FLEET = str(Path(sys.executable).with_name("fleet"))
MAX_REQUEST = 150_000
_STANDARD = 3


def can_fork(args: Any, env: dict[str, str] | None) -> bool:
    """Whether this command line is Python of ours."""
    if not isinstance(args, list) or "LD_PRELOAD" in (os.environ if env is None else env):
        return False
    return args[0] == FLEET or (args[0] == sys.executable and len(args) > 1 and args[1] in ("-c", "-m"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """One process to be started."""

    args: list[str]
    cwd: str
    env: dict[str, str]
    new_session: bool


class _Mother:
    """The process that forks the others: of this process, started when it is first needed."""

    _one: _Mother | None = None

    def __init__(self) -> None:
        self._socket, hers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(hers.fileno())],
            pass_fds=[hers.fileno()],
            stdin=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith(("FLEET_", "PYTEST_"))},
            start_new_session=True,
        )
        self._owner = os.getpid()
        hers.close()

    @classmethod
    def here(cls) -> _Mother:
        """The one of this process."""
        if cls._one is None or cls._one._owner != os.getpid():
            cls._one = _Mother()
        return cls._one

    def ask(self, order: _Order, files: list[int]) -> int:
        """The pid of the process that she forked. She ends when this process does."""
        socket.send_fds(self._socket, [msgspec.json.encode(order)], files)
        said = self._socket.recv(8)
        if not said:
            raise RuntimeError(f"the process that forks the others has ended: {self._process.wait(10)}")
        return int.from_bytes(said, "big")


class Popen(subprocess.Popen):
    """A `subprocess.Popen` whose process is forked, where it can be."""

    _status = -1

    def _execute_child(self, args: Any, *given: Any) -> None:  # its arguments are CPython's own business
        names = list(inspect.signature(super()._execute_child).parameters)[1:]
        asked = dict(zip(names, given, strict=True))
        if not can_fork(args, asked["env"]) or asked["preexec_fn"] or asked["pass_fds"] or asked["shell"]:
            super()._execute_child(args, *given)
            return
        pipes = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
        self._status, told = os.pipe()
        order = _Order(
            args=[os.fspath(a) for a in args],
            cwd=os.fspath(asked["cwd"] or Path.cwd()),
            env=dict(os.environ if asked["env"] is None else asked["env"]),
            new_session=asked["start_new_session"],
        )
        self.pid = _Mother.here().ask(order, [n if pipe < 0 else pipe for n, pipe in enumerate(pipes)] + [told])
        self._child_created = True
        os.close(told)
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))

    def _try_wait(self, wait_flags):
        if self._status < 0:
            return super()._try_wait(wait_flags)
        if wait_flags and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        said = os.read(self._status, 8)
        os.close(self._status)
        self._status = -1
        return self.pid, int.from_bytes(said, "big") if said else signal.SIGKILL

    def _internal_poll(self, _deadstate=None, **_kwargs):
        if self._status < 0:
            return self.returncode if not self._child_created else super()._internal_poll(_deadstate)
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def run(args, *, input=None, capture_output=False, timeout=None, check=False, **kwargs):  # noqa: A002 - subprocess's
    """`subprocess.run`, of a process that is forked where it can be."""
    if input is not None:
        kwargs["stdin"] = subprocess.PIPE
    if capture_output:
        kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(args, **kwargs) as process:
        try:
            stdout, stderr = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)
    if check:
        done.check_returncode()
    return done


# -- the process that forks ----------------------------------------------------------------------------------------


def _forking(asked: socket.socket) -> _Order:
    """Fork whoever is ordered, and tell how they end. Returns in each child, with its order; ends with our owner."""
    waking, woken = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    living: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([asked, waking], [], [])
        if waking in ready:
            os.read(waking, 4096)
            _tell_ends(living)
        if asked not in ready:
            continue
        data, files, _, _ = socket.recv_fds(asked, MAX_REQUEST, _STANDARD + 1)
        if not data:
            os._exit(0)
        order = msgspec.json.decode(data, type=_Order)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in (asked.detach(), waking, woken, *living.values()):
                os.close(descriptor)
            _become(order, files)
            return order
        living[pid] = files[_STANDARD]
        for descriptor in files[:_STANDARD]:
            os.close(descriptor)
        asked.send(pid.to_bytes(8, "big"))


def _tell_ends(living: dict[int, int]) -> None:
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        told = living.pop(pid)
        with suppress(BrokenPipeError):
            os.write(told, status.to_bytes(8, "big"))
        os.close(told)


def _become(order: _Order, files: list[int]) -> None:
    """Take on the session, folder, environment and files of the one that was ordered."""
    if order.new_session:
        os.setsid()
    for number, descriptor in enumerate(files[:_STANDARD]):
        os.dup2(descriptor, number)
    for descriptor in files:
        os.close(descriptor)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.env)
    random.seed()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1 if os.isatty(1) else -1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _run(args: list[str]) -> None:
    """What the interpreter, or the console script, does with this command line."""
    sys.path[0] = ""
    if args[0] == FLEET:
        sys.argv = args
        from orchestrator_fleet.cli.main import main  # noqa: PLC0415

        main()
    elif args[1] == "-m":
        sys.argv = args[2:]
        sys.modules.pop(args[2], None)
        runpy.run_module(args[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *args[3:]]
        script = types.ModuleType("__main__")
        sys.modules["__main__"] = script
        exec(compile(args[2], "<string>", "exec"), script.__dict__)  # noqa: S102


def _code_of(args: list[str]) -> int:
    """Run it; the exit code that the interpreter would end with."""
    try:
        _run(args)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        sys.stderr.write(f"{stop.code}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(code: int) -> None:
    """What the interpreter does at its end, but for taking every module apart, which takes longer than most tests."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    for _name in PRELOADED:
        with suppress(ImportError):  # a command line that needs it says so itself
            __import__(_name)
    gc.collect()
    gc.freeze()
    _end(_code_of(_forking(socket.socket(fileno=int(sys.argv[1]))).args))
