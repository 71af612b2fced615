"""What a storm over the task system needs: control planes that can be killed, clocks that jump, workers with a ledger.

creators ─▶ control plane(s) ◀─ pollers, daemons      all of them real processes
                 │                   │
              events              ledger               the two witnesses that `audit` compares
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import httpx
from living_fleet import until
from serving import CLIENT, SERVE, ControlPlane, free_port

from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.daemon_keys import register_daemon_keys
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.wire.documents import OrchestratorDoc, RunnerDoc, encode

HERE = Path(__file__).parent
LIBFAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
AUTOPSY_CHARS = 3_000
SERVE_AT = SERVE.replace("None, None", "None, int(sys.argv[2])")
SESSION = """
import json, os, sys, time
task = json.load(sys.stdin)
attempt = int(os.environ["FLEET_ATTEMPT"])
ledger = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
def write(step):
    line = {"at": time.monotonic(), "pid": os.getpid(), "step": step, "task": task["id"], "attempt": attempt}
    os.write(ledger, json.dumps(line).encode() + b"\\n")
    os.fsync(ledger)
write("started")
time.sleep(float(task["metadata"].get("sleep_s", 0)))
write("complete?")
json.dump({"result": {"attempt": attempt, "pid": os.getpid()}}, open(os.environ["FLEET_RESULT"], "w"))
"""


class MovedClock:
    """The wall clock of the processes started with `environ`: the machine's, moved by so many seconds.

    libfaketime reads the file again a second later at the latest; monotonic clocks and file times are left alone, as
    when a machine's clock is set.
    """

    def __init__(self, file: Path, *, moves: bool) -> None:
        self.file, self.moves, self.moved_s = file, moves, 0
        self.move_to(0)

    @property
    def environ(self) -> dict[str, str]:
        """For a process that is to live by this clock."""
        if not self.moves or LIBFAKETIME is None:
            return {}
        return {
            "LD_PRELOAD": str(LIBFAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def move_to(self, seconds: int) -> None:
        """Jump."""
        part = self.file.with_suffix(".part")
        part.write_text(f"{seconds:+d}\n")
        part.replace(self.file)
        self.moved_s = seconds


@dataclass
class Server:
    """One `fleet serve` of a plane, with a state folder, a port and a clock of its own."""

    plane: ControlPlane
    clock: MovedClock
    state: Path
    port: int
    store: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def store_url(self) -> str:
        """What it writes to."""
        return self.store or f"sqlite:///{self.state}/store.sqlite"

    def start(self) -> None:
        """Start it; `wait` waits until it is ready."""
        environ = {**os.environ, **self.clock.environ, "FLEET_STATE": str(self.state)}
        if self.store:
            environ["FLEET_STORE"] = self.store
        with (self.plane.home / f"serve-{self.port}.log").open("ab") as log:
            self.process = forked.Popen(
                [sys.executable, "-c", SERVE_AT, str(self.plane.home / "fleet.yaml"), str(self.port)],
                stdout=log,
                stderr=log,
                env=environ,
            )

    def wait(self) -> Server:
        """Until it is ready."""
        until(self._ready, "the control plane is ready")
        return self

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.plane.home / f"serve-{self.port}.log").read_text()[-4000:]
        with contextlib.suppress(httpx.TransportError):
            return CLIENT.get(f"{self.url}/readyz", timeout=2).status_code == 200
        return False

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal and wait for its end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(20)


class Daemon:
    """A real daemon of one orchestrator, whose sessions write to the ledger."""

    def __init__(self, root: Path, name: str, *, key: str, url: str, ledger: Path, sessions_max: int) -> None:
        self.root, self.name = root, name
        (root / "keys").mkdir(parents=True)
        (root / f"keys/{name}.key").write_text(key + "\n")
        script = root / "session.py"
        script.write_text(SESSION)
        doc = OrchestratorDoc(
            name=name,
            fleet="test",
            machine="m01",
            discipline="ops",
            role="VP",
            labels={},
            control_url=url,
            charter_version="c1",
            runner=RunnerDoc(
                type="command", command=(sys.executable, "-I", "-S", str(script), str(ledger)), secrets={}
            ),
            sessions_max=sessions_max,
            session_timeout_s=60.0,
            session_memory_bytes=None,
            workspace=None,
            spec={},
            assets={},
        )
        folder = root / f"generations/{'1' * 64}/orchestrators/{name}"
        folder.mkdir(parents=True)
        (folder / "orchestrator.json").write_bytes(encode(doc))
        (root / "current").symlink_to(Path("generations") / ("1" * 64))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """As supervisord does."""
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.root), "LANG": "C.UTF-8"}
        environ |= {"FLEET_ROOT": str(self.root), "FLEET_HOME": str(self.root), "FLEET_MACHINE": "m01"}
        environ |= {"FLEET_PROGRAM": "p1", "PYTHONFAULTHANDLER": "1"}
        with (self.root / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator_fleet.daemon", self.name],
                env=environ,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """Kill -9, its sessions live on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def sessions(self) -> list[int]:
        """Pids of what runs under it."""
        found = []
        for name in os.listdir("/proc"):  # noqa: PTH208 (a tenth of the time of Path.iterdir)
            if name.isdigit():
                with contextlib.suppress(OSError):
                    if str(self.root / "session.py").encode() in Path("/proc", name, "cmdline").read_bytes():
                        found.append(int(name))
        return found

    def close(self) -> None:
        """End it and all its sessions."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass
class Storm:
    """Everything that lives in one storm, and what was done to it."""

    plane: ControlPlane
    servers: list[Server]
    ledger: Path
    dice: random.Random
    pollers: list[tuple[str, subprocess.Popen[bytes]]] = field(default_factory=list)
    daemons: list[Daemon] = field(default_factory=list)
    created: dict[str, str] = field(default_factory=dict)
    killed_at: dict[int, float] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    store: Store | None = None

    @property
    def store_url(self) -> str:
        """The one store."""
        return self.servers[0].store_url

    def start_poller(self, orchestrator: str) -> None:
        """One more worker process."""
        command = [sys.executable, "-I", "-S", str(HERE / "poller.py"), str(self.ledger), orchestrator]
        command += [str(self.dice.randrange(1 << 30)), *(server.url for server in self.servers)]
        with (self.plane.home / "pollers.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={"FLEET_KEY": self.plane.keys["admin"], "PATH": ""}
            )
        self.pollers.append((orchestrator, process))

    def add_daemon(self, name: str, *, sessions_max: int = 3) -> None:
        """A real daemon; its key is made known to the store."""
        self.plane.keys[f"daemon:{name}"] = text = _daemon_key(self.store_url, name)
        daemon = Daemon(
            self.plane.home.parent / f"machine-{name}",
            name,
            key=text,
            url=self.servers[len(self.daemons) % len(self.servers)].url,
            ledger=self.ledger,
            sessions_max=sessions_max,
        )
        self.daemons.append(daemon)

    def kill_poller(self) -> None:
        """Kill -9 one, by preference in the middle of a task, and start another."""
        at_work = self._at_work()
        busy = [at for at, (_, process) in enumerate(self.pollers) if process.pid in at_work]
        which = self.dice.choice(busy) if busy else self.dice.randrange(len(self.pollers))
        orchestrator, process = self.pollers.pop(which)
        assert process.poll() is None, f"a poller ended: {(self.plane.home / 'pollers.log').read_text()[-2000:]}"
        process.kill()
        self.killed_at[process.pid] = time.monotonic()
        process.wait(10)
        self.start_poller(orchestrator)

    def _at_work(self) -> set[int]:
        """Pids whose newest step was not an end."""
        newest = {line["pid"]: line["step"] for line in self.lines()}
        return {pid for pid, step in newest.items() if not step.endswith("!") and step != "refused"}

    def kill_daemon(self) -> None:
        """Kill -9 one, start it again."""
        daemon = self.dice.choice(self.daemons)
        daemon.kill()
        daemon.start()

    def kill_session(self) -> None:
        """Kill -9 a session, if one runs."""
        sessions = self.dice.choice(self.daemons).sessions()
        if sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.dice.choice(sessions), signal.SIGKILL)

    def kill_server(self) -> None:
        """Kill -9 one, start it again."""
        server = self.dice.choice(self.servers)
        server.end(signal.SIGKILL)
        server.start()
        server.wait()

    def jump(self) -> None:
        """Set the clock of one server, forward or back, by up to an hour."""
        clock = self.dice.choice(self.servers).clock
        clock.move_to(self.dice.choice((0, 3, -3, 40, -40, 900, -900, 3600, -3600)))

    def create(self, number: int, **fields: Any) -> str:
        """Make a task however often it takes; exactly one comes of it."""
        key = {"Authorization": f"Bearer {self.plane.keys['admin']}", "Idempotency-Key": f"create-{number}"}
        while True:
            server = self.servers[number % len(self.servers)]
            try:
                answer = CLIENT.post(f"{server.url}/api/tasks", json={"title": f"t{number}", **fields}, headers=key)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code == 201:
                task: str = answer.json()["id"]
                self.created[f"t{number}"] = task
                return task
            if answer.status_code not in (500, 503):
                raise AssertionError(answer.text)

    def read(self, fn: Any) -> Any:
        """Look into the store itself."""
        self.store = self.store or open_store(self.store_url)
        return self.store.read_sync(fn)

    def events(self) -> list[Event]:
        """All that happened, in order."""

        def everything(conn: Any) -> list[Event]:
            found: list[Event] = []
            while more := outbox.read_after(conn, found[-1].seq or 0 if found else 0, 1000):
                found += more
            return found

        events: list[Event] = self.read(everything)
        return events

    def lines(self) -> list[dict[str, Any]]:
        """The ledger."""
        return [json.loads(line) for line in self.ledger.read_bytes().splitlines()]

    def autopsy(self) -> list[str]:
        """What each daemon was doing, or how it ended: those that live write their stacks into their logs, and end."""
        found = []
        for daemon in self.daemons:
            assert daemon.process is not None
            code = daemon.process.poll()
            if code is None:
                daemon.process.send_signal(signal.SIGABRT)
                daemon.process.wait(10)
            log = (daemon.root / "daemon.log").read_text(errors="replace")[-AUTOPSY_CHARS:]
            found.append(f"{daemon.name}: {'lives' if code is None else f'ended with {code}'}: {log}")
        return found

    def close(self) -> None:
        """End all of it."""
        for _, process in self.pollers:
            process.kill()
            process.wait(10)
        for daemon in self.daemons:
            daemon.close()
        for server in self.servers:
            server.end()
        if self.store is not None:
            self.store.close()


def _daemon_key(store_url: str, name: str) -> str:
    from orchestrator_fleet import keys  # noqa: PLC0415

    minted = keys.mint()
    register_daemon_keys(store_url, [(name, "m01", minted.id, minted.sha256)])
    return minted.text


@contextlib.contextmanager
def storm(
    folder: Path,
    *,
    pollers: dict[str, int],
    daemons: Sequence[str] = (),
    seed: int,
    stores: Sequence[str] = ("",),
    extra: str = "",
    clocks_move: bool = False,
) -> Iterator[Storm]:
    """A served plane (one `fleet serve` for each of `stores`, a URL each; "" is SQLite) with its workers running."""
    home = folder / "home"
    plane = ControlPlane(home, orchestrators={**dict.fromkeys(pollers, "eng"), **dict.fromkeys(daemons, "ops")})
    text = (home / "fleet.yaml").read_text()
    wanted = "defaults: {sessions: {max: 50}, retry: {max_attempts: 100, backoff: 50ms, backoff_max: 200ms}}\n"
    (home / "fleet.yaml").write_text(re.sub(r"(?m)^defaults: .*\n", wanted + extra, text))
    servers = []
    for number, store in enumerate(stores):
        state = home / f".fleet-{number}"
        state.mkdir()
        servers.append(
            Server(
                plane=plane,
                clock=MovedClock(folder / f"clock-{number}", moves=clocks_move),
                state=state,
                port=plane.port if number == 0 else free_port(),
                store=store,
            )
        )
    ledger = folder / "ledger"
    ledger.touch()
    one = Storm(plane=plane, servers=servers, ledger=ledger, dice=random.Random(seed))  # noqa: S311 - a test's dice
    try:
        for server in servers:
            server.start()
            server.wait()
        for name in daemons:
            one.add_daemon(name)
            one.daemons[-1].start()
        for name, count in pollers.items():
            for _ in range(count):
                one.start_poller(name)
        yield one
    finally:
        one.close()


class Creators:
    """A few threads that make tasks while the storm goes on."""

    def __init__(self, one: Storm, *, many: int, over_s: float, threads: int = 3) -> None:
        self.problem: BaseException | None = None
        self._one, self._many, self._over_s = one, many, over_s
        self._threads = [threading.Thread(target=self._run, args=(n, threads), daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _run(self, mine: int, of: int) -> None:
        dice = random.Random(mine)  # noqa: S311 - a test's dice
        names = list(self._one.plane.orchestrators)
        before: list[str] = []
        began = time.monotonic()
        try:
            for number in range(mine, self._many, of):
                time.sleep(max(0.0, began + self._over_s * number / self._many - time.monotonic()))
                fields: dict[str, Any] = {
                    "orchestrator": dice.choice(names),
                    "priority": dice.choice(("CRITICAL", "HIGH", "MEDIUM", "LOW")),
                    "metadata": {"sleep_s": dice.choice((0, 0.1, 0.4)), "repo": f"r{dice.randrange(4)}"},
                }
                if before and dice.random() < 0.3:
                    fields["depends_on"] = dice.sample(before, min(len(before), dice.randint(1, 3)))
                before.append(self._one.create(number, **fields))
        except BaseException as problem:  # noqa: BLE001 - told by join
            self.problem = problem

    def join(self, deadline_s: float) -> None:
        """Wait until all are made."""
        for thread in self._threads:
            thread.join(deadline_s)
            assert not thread.is_alive(), "tasks are still being made"
        if self.problem is not None:
            raise self.problem
