"""Runs other queues for `scripts/bench queue`: their environment, their processes, what their tasks left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_queue_apps import MARK
from bench_queue_servers import Missing

PINS = (
    "huey==3.5.4",
    "persist-queue==1.1.0",
    "celery[redis]==5.7.0",
    "kombu==5.7.0",
    "redis==8.1.0",
    "procrastinate==3.10.0",
    "pgqueuer[asyncpg]==1.6.0",
    "psycopg[binary,pool]==3.3.9",
    "asyncpg==0.32.0",
)
INSTALL_TIMEOUT_S = 900.0
COMMAND_TIMEOUT_S = 300.0
FIRST_MARK_TIMEOUT_S = 30.0
LOOK_S = 0.05
END_S = 8.0
_ENTRY = "import bench_queue_apps as apps; apps.main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One task as it ran; monotonic seconds."""

    number: int
    started_at: float
    enqueued_at: float


def environment() -> Path:
    """The peers' Python, in a virtual environment that is kept for the next run; Missing when it can't be made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join([version, *PINS]).encode()).hexdigest()[:12]
    folder = cache / "orchestrator-fleet" / f"bench-peers-{digest}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"bench: installing the peers into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", *PINS]
        done = subprocess.run(install, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
        if done.returncode:
            raise Missing(f"pip could not install the peers: {done.stderr.strip()[-300:]}")
        ready.touch()
    return python


class Peer:
    """One queue of QUEUES. `fresh_url` empties what is under it and answers where that is."""

    def __init__(self, key: str, *, python: Path, folder: Path, fresh_url: Callable[[], str]) -> None:
        self._key, self._python, self._fresh_url = key, python, fresh_url
        self._marks = folder / "marks" / key
        self._log = folder / f"{key}.log"
        self._env: dict[str, str] = {}

    def fresh(self) -> None:
        """Begin anew, with an empty queue."""
        shutil.rmtree(self._marks, ignore_errors=True)
        self._marks.mkdir(parents=True)
        self._env = {
            **os.environ,
            "BENCH_QUEUE": self._key,
            "BENCH_URL": self._fresh_url(),
            "BENCH_MARKS": str(self._marks),
            "PYTHONPATH": str(Path(__file__).parent),
        }
        self._told("fresh")

    def enqueue(self, count: int, callers: int) -> float:
        """Put `count` tasks (and one more); tasks a second."""
        per_s: float = json.loads(self._told("enqueue", str(count), str(callers)))["per_s"]
        return per_s

    def drain(self, count: int, *, workers: int, cap_s: float) -> float:
        """Let `workers` run what is queued; tasks a second, from the first start to the last within `cap_s`."""
        with self._working(workers):
            self._wait(1, FIRST_MARK_TIMEOUT_S)
            self._wait(count, cap_s)
        started = sorted(ran.started_at for ran in self._ran())
        if len(started) < 2:  # noqa: PLR2004 (an interval has two ends)
            raise SystemExit(f"bench: {self._key} ran {len(started)} tasks; its log is {self._log.read_text()[-2000:]}")
        return (len(started) - 1) / (started[-1] - started[0])

    def latencies_ms(self, rate: float, seconds: float, *, workers: int) -> list[float]:
        """From the call that puts a task to its start, at a steady rate on an idle queue; milliseconds, sorted."""
        with self._working(workers):
            putting = self._popen("pace", str(rate), str(seconds), stdout=subprocess.PIPE)
            told, _ = putting.communicate(timeout=seconds + COMMAND_TIMEOUT_S)
            self._wait(json.loads(told)["count"] + 1, FIRST_MARK_TIMEOUT_S)
        return sorted((ran.started_at - ran.enqueued_at) * 1000 for ran in self._ran() if ran.number >= 0)

    @contextlib.contextmanager
    def _working(self, workers: int) -> Iterator[None]:
        process = self._popen("work", str(workers), stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            _end_group(process)

    def _wait(self, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._count() < count and time.monotonic() < end:
            time.sleep(LOOK_S)

    def _count(self) -> int:
        return sum(file.stat().st_size for file in self._marks.iterdir()) // MARK.size

    def _ran(self) -> list[Ran]:
        found = []
        for file in self._marks.iterdir():
            whole = file.read_bytes()
            for number, started_at, enqueued_at in MARK.iter_unpack(whole[: len(whole) // MARK.size * MARK.size]):
                found.append(Ran(number=number, started_at=started_at, enqueued_at=enqueued_at))
        return found

    def _told(self, *arguments: str) -> str:
        process = self._popen(*arguments, stdout=subprocess.PIPE)
        told, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
        if process.returncode:
            raise SystemExit(f"bench: {self._key} {' '.join(arguments)}: {self._log.read_text()[-2000:]}")
        return str(told)

    def _popen(self, *arguments: str, stdout: Any) -> subprocess.Popen[str]:
        command = [str(self._python), "-c", _ENTRY, self._key, *arguments]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                env=self._env,
                cwd=self._marks,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                text=True,
                start_new_session=True,
            )


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a worker and its children: the process group that it was started as."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + END_S
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(LOOK_S)
    process.wait(END_S)


def percentile(values: list[float], share: float) -> float:
    """Of sorted values; 0.5 is the median."""
    return statistics.median(values) if share == 0.5 else values[min(len(values) - 1, int(len(values) * share))]  # noqa: PLR2004
