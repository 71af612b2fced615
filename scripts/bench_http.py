"""The HTTP API beside bare handlers that answer the same JSON on the same server (uvicorn, uvloop, httptools).

Ours is a real `fleet serve` with keys, scopes and the log of requests on; a bare handler has none of it. Keep-alive
connections, each with one request in flight; contestants in turn, the median of the rounds. `share` is requests a
second as a share of bare Litestar's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from bench_http_apps import READ, WRITE
from bench_queue_peers import percentile
from bench_sample import SampleFleet, answers, report, wait_for

CONNECTIONS = 16
APPS = Path(__file__).with_name("bench_http_apps.py")
PEERS = ("fastapi", "uvicorn", "httptools", "uvloop")
INSTALL_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 10.0
NEW_TASK = {"title": "Say hello", "priority": "LOW"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked again and again: whose server, what for, and the bytes of it."""

    who: str
    what: str
    port: int
    data: bytes


@dataclass(slots=True)
class Taken:
    """Figures of one request, a value for each round."""

    per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)


class _Asker(asyncio.Protocol):
    """One keep-alive connection: sends the request, and as soon as its answer is whole, sends it again."""

    def __init__(self, data: bytes, until: float) -> None:
        self._data, self._until = data, until
        self._got, self._sent_at = b"", 0.0
        self.took_s: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._data)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, found, body = self._got.partition(b"\r\n\r\n")
        if not found:
            return
        low = head.lower()
        length = int(low.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(body) < length:
            return
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
            self.over.set_exception(SystemExit(f"bench: {self._got[:500]!r}"))
            return
        now = time.perf_counter()
        self.took_s.append(now - self._sent_at)
        self._got = b""
        if now < self._until:
            self._ask()
        elif not self.over.done():
            self.over.set_result(None)
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(exc or ConnectionError("the server hung up"))


async def _load(request: Request, seconds: float) -> tuple[float, list[float]]:
    """(requests a second, milliseconds of each in order)."""
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    askers = []
    for _ in range(CONNECTIONS):
        _, asker = await loop.create_connection(
            lambda: _Asker(request.data, begun + seconds), "127.0.0.1", request.port
        )
        askers.append(asker)
    await asyncio.gather(*(asker.over for asker in askers))
    took_s = [one for asker in askers for one in asker.took_s]
    return len(took_s) / (time.perf_counter() - begun), sorted(one * 1000 for one in took_s)


def _bytes(method: str, path: str, *, key: str = "", body: Any = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key or 'none'}"]
    if data:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


def _ask(url: str, key: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=10) as answer:  # noqa: S310 (ours)
        return json.load(answer)


def _peer_python() -> Path:
    """A Python with FastAPI, kept for the next run."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "orchestrator-fleet" / f"bench-http-{sys.version_info.major}.{sys.version_info.minor}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"bench: installing FastAPI into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=INSTALL_TIMEOUT_S)
        install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-input", *PEERS]
        subprocess.run(install, check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S)
        ready.touch()
    return python


@contextlib.contextmanager
def _bare(framework: str, python: str, told: Path) -> Iterator[int]:
    """A bare handler's server; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen([python, str(APPS), framework, str(port), str(told)])
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}{READ}"), f"{framework} is ready")
        yield port
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def _contestants(folder: Path) -> Iterator[list[Request]]:
    """All servers up; the requests to compare."""
    with SampleFleet() as sample, contextlib.ExitStack() as bare:
        created = json.loads(sample.fleet("key", "create", "--owner", "service:bench", "--scopes", "admin", "--json"))
        key = created["key"]
        sample.serve()
        port = int(sample.url.rpartition(":")[2])
        task = _ask(f"{sample.url}/api/tasks", key, NEW_TASK)
        one, many = f"/api/tasks/{task['id']}", "/api/vps?limit=100"
        found = [
            Request(who="ours", what="GET one task", port=port, data=_bytes("GET", one, key=key)),
            Request(who="ours", what="GET /vps (16)", port=port, data=_bytes("GET", many, key=key)),
            Request(who="ours", what="POST task", port=port, data=_bytes("POST", "/api/tasks", key=key, body=NEW_TASK)),
        ]
        for name, path in (("GET one task", one), ("GET /vps (16)", many)):
            told = folder / f"{path.split('?')[0].rpartition('/')[2]}.json"
            told.write_text(json.dumps({"read": _ask(sample.url + path, key), "written": task}))
            for who, framework in (("Litestar, bare", "litestar"), ("FastAPI, bare", "fastapi")):
                python = sys.executable if framework == "litestar" else str(_peer_python())
                at = bare.enter_context(_bare(framework, python, told))
                found.append(Request(who=who, what=name, port=at, data=_bytes("GET", READ)))
                if name == "GET one task":
                    write = _bytes("POST", WRITE, body=NEW_TASK)
                    found.append(Request(who=who, what="POST task", port=at, data=write))
        yield found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="one short round")
    given = parser.parse_args()
    rounds, seconds = (1, 1.0) if given.quick else (5, 3.0)
    with tempfile.TemporaryDirectory(prefix="fleet-bench-http-") as folder, _contestants(Path(folder)) as requests:
        taken = {(request.what, request.who): Taken() for request in requests}
        for _ in range(rounds):
            for request in requests:
                per_s, took_ms = uvloop.run(_load(request, seconds))
                one = taken[request.what, request.who]
                one.per_s.append(per_s)
                one.p50_ms.append(percentile(took_ms, 0.5))
                one.p99_ms.append(percentile(took_ms, 0.99))
    rows = []
    for (what, who), one in sorted(taken.items()):
        bare = statistics.median(taken[what, "Litestar, bare"].per_s)
        rows.append(
            {
                "what": what,
                "who": who,
                "per_s": round(statistics.median(one.per_s)),
                "p50_ms": statistics.median(one.p50_ms),
                "p99_ms": statistics.median(one.p99_ms),
                "share": statistics.median(one.per_s) / bare,
            }
        )
    report(rows, as_json=given.json)


if __name__ == "__main__":
    main()
