"""What the benchmarks share: a copy of the sample fleet in a temporary folder, and how figures are printed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HOME = Path(__file__).resolve().parent.parent
FLEET = str(Path(sys.executable).with_name("fleet"))
PARTS = ("fleet.yaml", "charters", "templates", "scripts")
COMMAND_TIMEOUT_S = 300.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


class SampleFleet:
    """A copy of the sample fleet on a port of its own; leaving the context ends and removes everything."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fleet-bench-")
        self.home = Path(self._folder.name)
        self._server: subprocess.Popen[bytes] | None = None
        for part in PARTS:
            source = HOME / part
            if source.is_dir():
                shutil.copytree(source, self.home / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                shutil.copy(source, self.home / part)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        spec = (self.home / "fleet.yaml").read_text(encoding="utf-8")
        moved, count = re.subn(r"http://127\.0\.0\.1:\d+", self.url, spec)
        if not count:
            raise SystemExit("bench: the sample's fleet.yaml names no control_plane.url to move to a free port")
        (self.home / "fleet.yaml").write_text(moved, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop_serving()
        self.fleet("destroy", "--yes", "--data")
        self._folder.cleanup()

    def fleet(self, *arguments: str) -> str:
        """Run the CLI; its stdout. Ends the benchmark when it fails."""
        done = subprocess.run(
            [FLEET, *arguments],
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"bench: fleet {' '.join(arguments)} -> {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def serve(self) -> int:
        """Start the control plane and wait until it is ready; its pid."""
        log = (self.home / "serve.log").open("wb")
        self._server = subprocess.Popen([FLEET, "serve"], cwd=self.home, stdout=log, stderr=log)
        wait_for(lambda: answers(f"{self.url}/readyz"), "the control plane is ready")
        return self._server.pid

    def stop_serving(self) -> None:
        """End the control plane, if it was started."""
        if self._server is None:
            return
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait(STOP_TIMEOUT_S)
        self._server = None

    def status(self) -> dict[str, Any]:
        """`fleet status --json`."""
        status: dict[str, Any] = json.loads(self.fleet("status", "--json"))
        return status


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - always our own http://127.0.0.1
            return bool(answer.status == 200)  # noqa: PLR2004 - HTTP's own number
    except (urllib.error.URLError, OSError):
        return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Look until it is so; end the benchmark after START_TIMEOUT_S."""
    end = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"bench: not within {START_TIMEOUT_S:g} s: {what}")
        time.sleep(0.05)


def timed(action: Callable[[], object], *, times: int) -> list[float]:
    """Wall seconds of `times` runs."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return taken


def arguments(description: str) -> argparse.Namespace:
    """The command line that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    return parser.parse_args()


def report(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print rows with the same columns, as a table or as JSON."""
    if as_json:
        print(json.dumps({"cores": os.cpu_count(), "python": sys.version.split()[0], "rows": rows}, indent=2))
        return
    columns = list(rows[0])
    lines = [columns, *([f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def figures(what: str, taken: Sequence[float]) -> dict[str, Any]:
    """One row of wall times."""
    return {
        "what": what,
        "median_s": statistics.median(taken),
        "min_s": min(taken),
        "max_s": max(taken),
        "runs": len(taken),
    }
