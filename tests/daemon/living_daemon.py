"""A machine's folder with generations in it, and real daemon processes that live by them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from orchestrator_fleet import keys
from orchestrator_fleet.wire.documents import OrchestratorDoc, RunnerDoc, WorkspaceDoc, encode

NAME = "vp-eng"
DEADLINE_S = 20.0
SH = ("/bin/sh", "-c")


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until the condition is true and return its value; fail naming what was waited for."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {deadline_s:g} s: {what}")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class LivingMachine:
    """One machine's root. Daemons started here, and all their sessions, end with it."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.output = root / "daemon.log"
        (root / "keys").mkdir(parents=True)
        self.key_file.write_text(keys.mint().text + "\n")

    @property
    def key_file(self) -> Path:
        """The daemon's key."""
        return self.root / "keys" / f"{NAME}.key"

    def generation(
        self,
        digest: str = "1" * 64,
        *,
        command: tuple[str, ...] = (*SH, "true"),
        runner: RunnerDoc | None = None,
        secrets: dict[str, str] | None = None,
        charter: str = "c1",
        sessions_max: int = 2,
        timeout_s: float = 60.0,
        memory: int | None = None,
        workspace: WorkspaceDoc | None = None,
        assets: dict[str, str] | None = None,
        url: str = "",
    ) -> str:
        """Write a generation and make it current."""
        doc = OrchestratorDoc(
            name=NAME,
            fleet="acme",
            machine="m01",
            discipline="engineering",
            role="VP",
            labels={},
            control_url=url or self.url,
            charter_version=charter,
            runner=runner or RunnerDoc(type="command", command=command, secrets=secrets or {}),
            sessions_max=sessions_max,
            session_timeout_s=timeout_s,
            session_memory_bytes=memory,
            workspace=workspace,
            spec={},
            assets=assets or {},
        )
        folder = self.root / "generations" / digest / "orchestrators" / NAME
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "orchestrator.json").write_bytes(encode(doc))
        self.switch(digest)
        return digest

    def switch(self, digest: str) -> None:
        """Make a generation current, in one rename."""
        part = self.root / ".current"
        part.symlink_to(Path("generations") / digest)
        part.replace(self.root / "current")

    def start(self, **environ: str) -> subprocess.Popen[bytes]:
        """Start a daemon as supervisord does."""
        return self._start([sys.executable, "-m", "orchestrator_fleet.daemon", NAME], environ)

    def start_under_a_shell(self) -> subprocess.Popen[bytes]:
        """Start a process that starts the daemon, and waits for it as supervisord does."""
        return self._start([*SH, f"{sys.executable} -m orchestrator_fleet.daemon {NAME} & wait"], {})

    def _start(self, argv: list[str], environ: dict[str, str]) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "LANG": "C.UTF-8",
            "FLEET_ROOT": str(self.root),
            "FLEET_HOME": str(self.root),
            "FLEET_MACHINE": "m01",
            "FLEET_PROGRAM": "p1",
            "SURPLUS": "must not reach a session",
            **environ,
        }
        with self.output.open("ab") as output:
            daemon = subprocess.Popen(
                argv,
                env=environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.daemons.append(daemon)
        return daemon

    def online(self, **environ: str) -> subprocess.Popen[bytes]:
        """Start a daemon and wait until its link is up."""
        daemon = self.start(**environ)
        until(lambda: self.status().get("pid") == daemon.pid and self.status()["link"] == "connected", "the link is up")
        return daemon

    def status(self) -> dict[str, Any]:
        """What the status file says; empty when there is none."""
        try:
            found: dict[str, Any] = json.loads((self.root / "run" / f"{NAME}.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def session(self, task: str, attempt: int = 1) -> Path:
        """The attempt's folder."""
        return self.root / "work" / NAME / f"{task}.{attempt}"

    def record(self, task: str, attempt: int = 1) -> dict[str, Any]:
        """The attempt's session.json; empty when there is none."""
        try:
            found: dict[str, Any] = msgspec.json.decode((self.session(task, attempt) / "session.json").read_bytes())
        except FileNotFoundError:
            return {}
        return found

    def running(self, task: str) -> int:
        """The pid of the task's session, once it runs."""
        pid: int = until(lambda: self.record(task).get("pid"), f"{task} runs")
        return pid

    def leftovers(self) -> Iterator[int]:
        """Every process that was started under this root."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes()
            except OSError:
                continue
            if str(self.root).encode() in environ and is_running(int(folder.name)):
                yield int(folder.name)

    def close(self) -> None:
        """End every process that was started here."""
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.kill()
            daemon.wait(10)
        for pid in self.leftovers():
            os.kill(pid, signal.SIGKILL)
