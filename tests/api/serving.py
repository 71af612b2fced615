"""A real control plane: its own process, its own store, a free port of this machine, keys of every kind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import httpx
import msgspec

from orchestrator_fleet import keys
from orchestrator_fleet.store.daemon_keys import register_daemon_keys

DEADLINE_S = 20.0
# A client of its own for each request would load the certificates of the world, 20 ms; servers come and go, so no
# connection is kept.
CLIENT = httpx.Client(trust_env=False, timeout=DEADLINE_S, limits=httpx.Limits(max_keepalive_connections=0))
SERVE = """
import sys
from pathlib import Path
from orchestrator_fleet.api.serve import serve
serve(Path(sys.argv[1]), None, None)
"""
PUBLISH = """
import asyncio, sys
from pathlib import Path
from orchestrator_fleet.machines.local import LocalTransport
from orchestrator_fleet.reconcile.control import publish
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.load import load_fleet
file = Path(sys.argv[1])
state = State(file)
transport = LocalTransport("control-plane", state.control_root, state.home)
asyncio.run(publish(transport, render(load_fleet(file)).control, holder="test"))
"""
SCOPED = ("tasks:read", "tasks:write", "tasks:work", "fleet:read", "history:sql", "admin")


def until(condition: Callable[[], Any], what: str) -> Any:
    """Look until a condition holds; fail with what was waited for."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {DEADLINE_S:g} s: {what}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class ControlPlane:
    """A fleet folder and the `fleet serve` of it. `keys`: a key's text by its name, which is its scope or its owner.

    `store` is the URL of the live database; the file in its state folder unless told otherwise.
    """

    home: Path
    port: int = field(default_factory=free_port)
    keys: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    store: str = ""
    declared: dict[str, dict[str, Any]] = field(default_factory=dict)
    orchestrators: dict[str, str] = field(default_factory=lambda: {"vp-a": "eng", "vp-b": "ops"})
    routing: str = (
        '  - {name: by-discipline, when: has(task.discipline), to: {discipline: "{{ task.discipline }}"}}\n'
        "  - {name: rest, to: {orchestrator: vp-a}}\n"
    )

    def __post_init__(self) -> None:
        self.store = self.store or f"sqlite:///{self.state}/store.sqlite"
        (self.home / "charters").mkdir(parents=True)
        (self.home / "charters/vp.md").write_text("---\nrole: VP\n---\nDo what the task says.\n")
        for scope in SCOPED:
            self.declare(scope, owner="person:me", scopes=[scope])
        for name in self.orchestrators:
            self.declare(name, owner=name, scopes=["tasks:work", "tasks:read"])
        self.write()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def state(self) -> Path:
        """Its state folder."""
        return Path(os.environ.get("FLEET_STATE") or self.home / ".fleet")

    def declare(self, name: str, *, owner: str, scopes: list[str], **fields: str) -> None:
        """Make a key and put its hash among the declared ones."""
        minted = keys.mint()
        self.keys[name] = minted.text
        self.declared[minted.id] = {"owner": owner, "sha256": minted.sha256, "scopes": scopes, **fields}

    def write(self) -> None:
        """(Re)write fleet.yaml."""
        vps = "".join(
            f"  {name}: {{charter: charters/vp.md, discipline: {trade}, labels: {{trade: {trade}}},"
            " runner: {type: command, command: [python3, -V]}}\n"
            for name, trade in self.orchestrators.items()
        )
        declared = "".join(f"  {name}: {msgspec.json.encode(key).decode()}\n" for name, key in self.declared.items())
        (self.home / "fleet.yaml").write_text(
            f'version: 1\nfleet: test\ncontrol_plane: {{url: "{self.url}"}}\nmachines: {{m01: {{}}}}\n'
            "defaults: {sessions: {max: 100}, retry: {max_attempts: 2, backoff: 50ms, backoff_max: 50ms, jitter: 0}}\n"
            f"orchestrators:\n{vps}keys:\n{declared}routing:\n{self.routing}"
        )

    def publish(self) -> None:
        """Apply the control plane's part of fleet.yaml, as `fleet apply` does."""
        command = [sys.executable, "-c", PUBLISH, str(self.home / "fleet.yaml")]
        forked.run(command, check=True, timeout=DEADLINE_S)

    def daemon_key(self, orchestrator: str, machine: str = "m01") -> str:
        """Make a daemon's key known, as `fleet apply` does, and answer it."""
        minted = keys.mint()
        self.keys[f"daemon:{orchestrator}"] = minted.text
        register_daemon_keys(self.store, [(orchestrator, machine, minted.id, minted.sha256)])
        return minted.text

    def popen(self, script: str = SERVE) -> subprocess.Popen[bytes]:
        """Start a server process; nothing is awaited."""
        with (self.home / "serve.log").open("ab") as log:
            return forked.Popen(
                [sys.executable, "-c", script, str(self.home / "fleet.yaml")],
                stdout=log,
                stderr=log,
                env={**os.environ, "FLEET_STORE": self.store},
            )

    def start(self) -> ControlPlane:
        """Start it and wait until it is ready."""
        self.process = self.popen()
        return self.ready()

    def ready(self) -> ControlPlane:
        """Wait until it is, after `popen`."""
        until(self._ready, "the control plane is ready")
        return self

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        with contextlib.suppress(httpx.TransportError):
            return CLIENT.get(f"{self.url}/readyz", timeout=2).status_code == 200
        return False

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return (self.home / "serve.log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        return self.process.wait(DEADLINE_S)

    def ask(self, method: str, path: str, *, key: str | None = "admin", **kwargs: Any) -> httpx.Response:
        """A request with the key of that name; None asks without a key."""
        headers = {} if key is None else {"Authorization": f"Bearer {self.keys[key]}"}
        headers |= kwargs.pop("headers", {})
        return CLIENT.request(method, self.url + path, headers=headers, **kwargs)

    def json(self, method: str, path: str, *, code: int = 200, **kwargs: Any) -> Any:
        """The decoded answer of a request that must have this status."""
        answer = self.ask(method, path, **kwargs)
        assert answer.status_code == code, f"{method} {path} -> {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def add(self, title: str = "t", **fields: Any) -> dict[str, Any]:
        """Create a task."""
        task: dict[str, Any] = self.json("POST", "/api/tasks", code=201, json={"title": title, **fields})
        return task

    def poll(self, orchestrator: str = "vp-a", **fields: Any) -> list[dict[str, Any]]:
        """Claim over HTTP."""
        claimed: list[dict[str, Any]] = self.json(
            "POST", "/api/tasks/poll", json={"orchestrator": orchestrator, **fields}
        )["data"]
        return claimed

    def task(self, task_id: str) -> dict[str, Any]:
        """A task as it is now."""
        task: dict[str, Any] = self.json("GET", f"/api/tasks/{task_id}")
        return task

    def close(self) -> None:
        """End it, if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)
