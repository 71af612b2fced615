"""The daemon and the real control plane, each a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import httpx
import pytest
from living_daemon import NAME, SH, LivingMachine, until

from orchestrator_fleet import keys
from orchestrator_fleet.clock import SystemClock
from orchestrator_fleet.orchestrators import notices
from orchestrator_fleet.store.daemon_keys import register_daemon_keys
from orchestrator_fleet.store.database import open_store

SERVE = (
    "import sys, pathlib; from orchestrator_fleet.api.serve import serve; serve(pathlib.Path(sys.argv[1]), None, None)"
)


class Plane:
    """A served fleet of one orchestrator, with a person's key."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.home, self.key = home, keys.mint()
        (home / "charters").mkdir(parents=True)
        (home / "charters" / "eng.md").write_text("---\nrole: VP\n---\nYou do what the task says.\n")
        (home / "fleet.yaml").write_text(
            f"""version: 1
fleet: acme
control_plane: {{url: "{self.url}"}}
machines: {{m01: {{}}}}
orchestrators:
  {NAME}: {{charter: charters/eng.md, discipline: engineering, runner: {{type: command, command: [sh, -c, "true"]}}}}
keys:
  {self.key.id}: {{owner: person:me, sha256: {self.key.sha256}, scopes: [admin], created: 2026-01-01T00:00:00Z}}
"""
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Serve, and wait until it is ready."""
        with (self.home / "serve.log").open("ab") as output:
            self.process = forked.Popen(
                [sys.executable, "-c", SERVE, str(self.home / "fleet.yaml")],
                cwd=self.home,
                env={"PATH": os.environ["PATH"], "HOME": str(self.home)},
                stdout=output,
                stderr=output,
            )
        until(self._ready, "the control plane is ready")

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "serve.log").read_text()
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2).is_success
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End it as a person would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(20)

    def http(self, method: str, path: str, body: Any = None) -> Any:
        """One request of the API; its answer."""
        bearer = {"Authorization": f"Bearer {self.key.text}"}
        answer = httpx.request(method, f"{self.url}/api{path}", json=body, headers=bearer, timeout=10)
        return answer.raise_for_status().json()

    def status_of(self, task: str) -> str:
        """The task's status."""
        status: str = self.http("GET", f"/tasks/{task}")["status"]
        return status


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Plane]:
    plane = Plane(tmp_path / "fleet")
    plane.start()
    yield plane
    plane.stop()


@pytest.fixture
def settled(tmp_path: Path, served: Plane) -> Iterator[LivingMachine]:
    """A machine whose daemon's key the control plane knows."""
    machine = LivingMachine(tmp_path / "m01", served.url)
    parsed = keys.parse(machine.key_file.read_text().strip())
    assert parsed is not None
    store = f"sqlite:///{served.home / '.fleet' / 'store.sqlite'}"
    register_daemon_keys(store, [(NAME, "m01", parsed[0], keys.digest(parsed[1]))])
    yield machine
    machine.close()


def test_a_task_goes_from_http_through_a_session_to_done(served: Plane, settled: LivingMachine) -> None:
    """With result, usage, charter version and log; then a cancel reaches a running session."""
    script = """case $(cat) in
    *quick*) echo hello; printf '{"result": {"ok": true}, "usage": {"usd": 0.25}}' > $FLEET_RESULT;;
    *) exec sleep 600;;
    esac"""
    settled.generation(command=(*SH, script))
    settled.online()
    quick = served.http("POST", "/tasks", {"title": "quick", "orchestrator": NAME})["id"]
    until(lambda: served.status_of(quick) == "DONE", "the task is done")
    task = served.http("GET", f"/tasks/{quick}")
    assert (task["result"], task["attempt"], task["charter_version"]) == ({"ok": True}, 1, "c1")
    slow = served.http("POST", "/tasks", {"title": "slow", "orchestrator": NAME})["id"]
    settled.running(slow)
    served.http("POST", f"/tasks/{slow}/cancel", {"reason": "changed my mind"})
    until(lambda: served.status_of(slow) == "CANCELLED", "the task is cancelled")
    until(lambda: list(settled.leftovers()) == [settled.daemons[0].pid], "its session is ended")


def test_a_task_outlives_a_killed_daemon_and_a_restarted_control_plane(served: Plane, settled: LivingMachine) -> None:
    """One attempt, one process, done once."""
    script = "echo x >> ../../../runs; while [ ! -e ../../../go ]; do sleep 0.05; done"
    settled.generation(command=(*SH, script))
    settled.online()
    task = served.http("POST", "/tasks", {"title": "long", "orchestrator": NAME})["id"]
    pid = settled.running(task)
    settled.daemons[-1].kill()
    settled.daemons[-1].wait(10)
    settled.online()
    served.stop()
    served.start()
    assert settled.record(task)["pid"] == pid
    (settled.root / "go").touch()
    until(lambda: served.status_of(task) == "DONE", "the task is done", 40)
    assert served.http("GET", f"/tasks/{task}")["attempt"] == 1
    assert (settled.root / "runs").read_text() == "x\n"


def test_what_an_orchestrator_is_told_is_kept_once_over_every_kill(served: Plane, settled: LivingMachine) -> None:
    """Of the daemon and of the control plane, while more is told all the time: in order, none lost, none twice."""
    settled.generation()
    settled.online()
    store = open_store(f"sqlite:///{served.home / '.fleet' / 'store.sqlite'}")
    told: list[str] = []

    def tell(conn: Any) -> list[str]:
        now_us = SystemClock().now_us()
        return [
            notices.tell(conn, orchestrator=NAME, kind="k", data={"text": "x" * 500}, actor="k-1", now_us=now_us)
            for _ in range(40)
        ]

    def kept() -> list[str]:
        try:
            text = (settled.root / "run" / f"{NAME}.inbox.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [line.split('"')[3] for line in text.splitlines()]

    for number in range(6):
        told += store.write_sync(tell)
        until(lambda number=number: len(kept()) > 40 * number, "some of them are kept")
        if number % 2:
            assert served.process is not None
            served.process.kill()
            served.process.wait(20)
            served.start()
        else:
            settled.daemons[-1].kill()
            settled.daemons[-1].wait(10)
            settled.online()
    until(lambda: len(kept()) >= len(told), "all are kept", 40)
    until(lambda: served.http("GET", f"/vps/{NAME}/inbox")["data"] == [], "all are delivered", 40)
    store.close()
    assert kept() == told
