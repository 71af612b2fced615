"""A small real fleet in a temporary folder, driven only through its doors: the CLI, HTTP, and signals.

Nothing here imports the product: what these tests hold is what a user holds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

FLEET = [str(Path(sys.executable).with_name("fleet"))]
DEADLINE_S = 60.0

WORKER = """
import json, os, pathlib, sys, time
task = json.load(sys.stdin)
meta = task["metadata"]
folder = pathlib.Path(meta["marks"])
(folder / f"started-{task['id']}.{os.environ['FLEET_ATTEMPT']}").write_text(str(os.getpid()))
print("working on", task["title"], flush=True)
time.sleep(float(meta.get("sleep_s", 0)))
(folder / f"ended-{task['id']}.{os.environ['FLEET_ATTEMPT']}").write_text("x")
json.dump({"result": {"title": task["title"]}, "usage": {"input_tokens": 3, "output_tokens": 5, "usd": 0.01}},
          open(os.environ["FLEET_RESULT"], "w"))
sys.exit(int(meta.get("exit", 0)))
"""

WORK = ["python3", "scripts/worker.py"]
ROUTING = """\
routing:
  - name: by-discipline
    when: has(task.discipline)
    to: {discipline: "{{ task.discipline }}"}
  - name: rest
    to: {orchestrator: vp-1-1}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll a condition until it is true; fail with what was waited for."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {deadline_s:g} s: {what}")


@dataclass
class LivingFleet:
    """A fleet folder, its control plane and the processes that came of them."""

    home: Path
    machines: int = 2
    per_machine: int = 2
    port: int = field(default_factory=free_port)
    key: str = ""
    server: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        (self.home / "charters").mkdir(parents=True)
        (self.home / "scripts").mkdir()
        (self.home / "marks").mkdir()
        (self.home / "scripts/worker.py").write_text(WORKER)
        self.write_charter("vp", "You do what the task says.")
        self.write_fleet()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def orchestrators(self) -> list[str]:
        return [f"vp-{m}-{n}" for m in range(1, self.machines + 1) for n in range(1, self.per_machine + 1)]

    def write_charter(self, name: str, prose: str) -> None:
        (self.home / f"charters/{name}.md").write_text(f"---\nrole: VP\n---\n{prose}\n")

    def write_fleet(self, *, command: dict[str, list[str]] | None = None, extra: str = "") -> None:
        """(Re)write fleet.yaml, keeping its keys."""
        kept = ""
        file = self.home / "fleet.yaml"
        if file.exists() and "\nkeys:" in file.read_text():
            kept = "keys:" + file.read_text().split("\nkeys:", 1)[1].split("\nrouting:", 1)[0] + "\n"
        machines = "\n".join(f"  m{n:02d}: {{}}" for n in range(1, self.machines + 1))
        commands = command or {}
        orchestrators = "\n".join(
            f"  {name}:\n    charter: charters/vp.md\n    discipline: d{name[-1]}\n"
            f"    machine: m{int(name.split('-')[1]):02d}\n"
            f"    runner: {{type: command, command: {json.dumps(commands.get(name, WORK))}}}"
            for name in self.orchestrators
        )
        file.write_text(
            textwrap.dedent(f"""\
            version: 1
            fleet: test
            control_plane: {{url: "{self.url}"}}
            rollout: {{min_healthy: 0s, healthy_deadline: 30s}}
            defaults:
              sessions: {{max: 2, timeout: 30s}}
              retry: {{max_attempts: 10, backoff: 100ms, backoff_max: 1s}}
            machines:
            """)
            + f"{machines}\norchestrators:\n{orchestrators}\n{extra}{kept}"
            + ROUTING
        )

    def fleet(self, *args: str, code: int | None = 0, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the CLI here; `code` None takes any exit code."""
        env = {**os.environ, "FLEET_KEY": self.key} if self.key else dict(os.environ)
        done = subprocess.run(
            [*FLEET, *args], cwd=self.home, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert code is None or done.returncode == code, (
            f"fleet {' '.join(args)} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def json(self, *args: str, code: int | None = 0) -> Any:
        return json.loads(self.fleet(*args, "--json", code=code).stdout)

    def make_key(self) -> None:
        self.key = self.json("key", "create", "--owner", "person:me", "--scopes", "admin")["key"]

    def serve(self) -> None:
        log = (self.home / "serve.log").open("ab")
        self.server = subprocess.Popen([*FLEET, "serve"], cwd=self.home, stdout=log, stderr=log)

        def ready() -> bool:
            assert self.server is not None
            assert self.server.poll() is None, (self.home / "serve.log").read_text()
            try:
                return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
            except httpx.TransportError:
                return False

        until(ready, "the control plane is ready", 30)

    def http(self, method: str, path: str, **kwargs: Any) -> Any:
        answer = httpx.request(
            method, self.url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=30, **kwargs
        )
        assert answer.status_code < 400, f"{method} {path} -> {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def add_task(self, title: str, **fields: Any) -> dict[str, Any]:
        metadata = {"marks": str(self.home / "marks"), **fields.pop("metadata", {})}
        task: dict[str, Any] = self.http("POST", "/api/tasks", json={"title": title, "metadata": metadata, **fields})
        return task

    def task(self, task_id: str) -> dict[str, Any]:
        task: dict[str, Any] = self.http("GET", f"/api/tasks/{task_id}")
        return task

    def wait_done(self, ids: list[str], deadline_s: float = DEADLINE_S) -> list[dict[str, Any]]:
        def all_done() -> list[dict[str, Any]] | None:
            tasks = [self.task(i) for i in ids]
            return tasks if all(t["status"] == "DONE" for t in tasks) else None

        done: list[dict[str, Any]] = until(all_done, f"{len(ids)} tasks are DONE", deadline_s)
        return done

    def wait_online(self) -> None:
        def online() -> bool:
            data = self.http("GET", "/api/vps?limit=100")["data"]
            return len(data) == len(self.orchestrators) and all(vp["status"] == "ONLINE" for vp in data)

        until(online, "every orchestrator is ONLINE", 30)

    def programs(self) -> dict[str, int]:
        """Orchestrator -> pid of its daemon, as the machines tell."""
        status = self.json("status")
        return {
            name: program["pid"]
            for machine in status["machines"]
            for name, program in machine["programs"].items()
            if program["state"] == "RUNNING"
        }

    def supervisords(self) -> dict[str, int]:
        return {machine["name"]: machine["supervisord_pid"] for machine in self.json("status")["machines"]}

    def kill_server(self) -> None:
        assert self.server is not None
        self.server.send_signal(signal.SIGKILL)
        self.server.wait(10)

    def starts_and_ends(self) -> tuple[list[str], list[str]]:
        names = sorted(p.name for p in (self.home / "marks").iterdir())
        return [n for n in names if n.startswith("started-")], [n for n in names if n.startswith("ended-")]

    def close(self) -> None:
        """End all that was started, by pid."""
        if self.server is not None and self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
            try:
                self.server.wait(15)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait(10)
        self.fleet("destroy", "--yes", code=None)


def living(home: Path, **kwargs: Any) -> Iterator[LivingFleet]:
    fleet = LivingFleet(home, **kwargs)
    try:
        yield fleet
    finally:
        fleet.close()


def processes_under(root: Path) -> list[int]:
    """Pids whose environment or command line names this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            text = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"{root}/.fleet".encode() in text:
            found.append(int(entry.name))
    return found
