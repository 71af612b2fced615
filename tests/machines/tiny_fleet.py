"""Machines under test: small bundles, real roots, and a way to ask that reads well."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from orchestrator_fleet import pids
from orchestrator_fleet.clock import SECOND_US, FrozenClock, SystemClock
from orchestrator_fleet.machines import processes, supervisord
from orchestrator_fleet.machines.fake import FakeTransport
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.machines.local import LocalTransport
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.render.bundle import Bundle, bundle
from orchestrator_fleet.render.program import SUPERVISORD
from orchestrator_fleet.wire.documents import sha256
from orchestrator_fleet.wire.machine import (
    Acquire,
    Answer,
    Confirm,
    Destroy,
    Done,
    Leased,
    Observe,
    Observed,
    Refusal,
    Request,
    Stage,
    Switch,
)

DAEMON = Path(__file__).with_name("tiny_daemon.py")
WAIT_S = 20.0
T = TypeVar("T")


def tiny_bundle(
    programs: Mapping[str, str], *, charter: str = "one", machine: str = "m1", files: Mapping[str, bytes] | None = None
) -> Bundle:
    """A machine's bundle: `programs` maps a name to its behaviour. `charter` changes a file and nothing else."""
    contents = {"supervisord.conf": SUPERVISORD.encode(), **(files or {})}
    digests = {}
    for name, behaviour in programs.items():
        command = f"%(ENV_FLEET_PYTHON)s -S -E {DAEMON} {name}"
        digests[name] = sha256(f"{command} {behaviour}".encode())[:16]
        contents[f"programs/{name}.conf"] = (
            f"[program:{name}]\ncommand={command}\ndirectory=%(ENV_FLEET_ROOT)s\n"
            f'environment=FLEET_PROGRAM="{digests[name]}"\nstartsecs=0\nautorestart=true\nstopwaitsecs=2\n'
            f"redirect_stderr=true\nstdout_logfile=%(ENV_FLEET_ROOT)s/log/{name}.log\n"
        ).encode()
        contents[f"orchestrators/{name}/behaviour"] = behaviour.encode()
        contents[f"orchestrators/{name}/charter.md"] = charter.encode()
    return bundle(target=machine, fleet="tiny", files=contents, programs=digests)


def control_only(text: str = "one") -> Bundle:
    """A bundle with no programs and no supervisord."""
    return bundle(target="control-plane", fleet="tiny", files={"control.json": text.encode()}, programs={})


@dataclass
class Machine:
    """One machine and the token it was last leased under."""

    transport: Transport
    root: Path | None = None
    token: int = 0

    @property
    def layout(self) -> Layout:
        """The paths under its root."""
        assert self.root is not None
        return Layout(self.root)

    def ask(self, request: Request, *, timeout_s: float = 60) -> Answer:
        """One request, one answer."""
        return asyncio.run(self.transport.call(request, timeout_s=timeout_s))

    def done(self, request: Request) -> Done:
        """Ask for what must be done."""
        answer = self.ask(request)
        assert isinstance(answer, Done), answer
        return answer

    def refused(self, request: Request) -> Refusal:
        """Ask for what must be refused."""
        answer = self.ask(request)
        assert isinstance(answer, Refusal), answer
        return answer

    def look(self, *, documents: bool = False) -> Observed:
        """Observe it."""
        answer = self.ask(Observe(documents=documents))
        assert isinstance(answer, Observed), answer
        return answer

    def lease(self, holder: str = "me", ttl_s: float = 60) -> int:
        """Take the lease and keep its token."""
        answer = self.ask(Acquire(holder=holder, ttl_s=ttl_s))
        assert isinstance(answer, Leased), answer
        self.token = answer.token
        return answer.token

    def stage(self, what: Bundle, *, blobs: Mapping[str, bytes] | None = None) -> Done:
        """Stage a bundle, with all its files or with `blobs`."""
        return self.done(staging(what, self.token, blobs=blobs))

    def switch(self, what: Bundle, **steps: Any) -> Done:
        """Make a staged bundle current."""
        return self.done(Switch(token=self.token, digest=what.digest, **steps))

    def confirm(self, what: Bundle) -> Done:
        """Call a bundle healthy."""
        return self.done(Confirm(token=self.token, digest=what.digest))

    def bring(self, what: Bundle, **steps: Any) -> Observed:
        """Lease, stage, switch, wait until every program is up on it, confirm."""
        self.lease()
        self.stage(what)
        self.switch(what, **steps)
        seen = self.until_up(what)
        self.confirm(what)
        return seen

    def until_up(self, what: Bundle) -> Observed:
        """Wait until every program is up on a bundle."""

        def up() -> Observed | None:
            seen = self.look()
            return seen if is_up(seen, what) else None

        return until(up, f"up on {what.digest[:12]}")

    def pids(self) -> dict[str, int]:
        """Program -> pid, as supervisord tells."""
        return {name: program.pid for name, program in self.look().programs.items()}

    def age_s(self, program: str) -> float:
        """How long a program's process has run, in seconds."""
        return time.time() - self.look().programs[program].since_us / SECOND_US

    def processes(self) -> list[int]:
        """Every process that was started for this root."""
        assert self.root is not None
        return [process.pid for process in processes.leftovers(self.root)]


def staging(what: Bundle, token: int, *, blobs: Mapping[str, bytes] | None = None) -> Stage:
    sent = {sha256(data): data for data in what.files.values()} if blobs is None else dict(blobs)
    return Stage(token=token, digest=what.digest, manifest=what.manifest_bytes, blobs=sent)


def is_up(seen: Observed, what: Bundle) -> bool:
    programs = seen.programs
    return (
        seen.current == what.digest
        and programs.keys() == what.manifest.programs.keys()
        and all(
            p.state == "RUNNING" and p.program == what.manifest.programs[n] and p.generation == what.digest
            for n, p in programs.items()
        )
    )


def until(condition: Callable[[], T | None], what: str, deadline_s: float = WAIT_S) -> T:
    """Poll until there is a value; fail with what was waited for."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {deadline_s:g} s: {what}")


def local_machine(root: Path, name: str = "m1") -> Machine:
    return Machine(transport=LocalTransport(name, root, root.parent, clock=SystemClock()), root=root)


def fake_machine(name: str = "m1") -> Machine:
    return Machine(transport=FakeTransport(name, clock=FrozenClock()))


def end(machine: Machine) -> None:
    """End whatever a test left, by pid, however broken the root is; the machine itself is asked first."""
    if machine.root is None:
        return
    answer = machine.ask(Acquire(holder="the end of the test", ttl_s=60))
    if isinstance(answer, Leased):
        machine.ask(Destroy(token=answer.token))
    supervisord.end(machine.layout)
    processes.end(processes.leftovers(machine.root), term_s=0)
    machine.layout.socket.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    return pids.identify(pid) is not None
