"""PostgreSQL and Redis of one's own for `scripts/bench queue`: on free ports, in a folder of its own, ended after."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_sample import wait_for

COMMAND_TIMEOUT_S = 120.0
INSTALL_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
USER = "bench"


class Missing(Exception):
    """What a part needs is not here and can't be got; the text says what."""


class Postgres:
    """A cluster with the defaults: fsync and synchronous_commit are on."""

    def __init__(self, programs: Path, port: int) -> None:
        self._programs, self._port = programs, port

    def fresh(self, name: str) -> str:
        """A new, empty database of that name; its URL."""
        self._sql(f"drop database if exists {name} with (force)")
        self._sql(f"create database {name}")
        return f"postgresql://{USER}@127.0.0.1:{self._port}/{name}"

    def settled(self) -> None:
        """Write out what is dirty, so that one contestant's checkpoint is not paid by the next."""
        self._sql("checkpoint")

    def _sql(self, text: str) -> None:
        where = ["-h", "127.0.0.1", "-p", str(self._port), "-U", USER, "-d", "postgres"]
        quiet = {**os.environ, "PGOPTIONS": "-c client_min_messages=warning"}
        _run([str(self._programs / "psql"), "-qX", *where, "-c", text], env=quiet)


class Redis:
    """A server that appends each write to its file and syncs before it answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.url = f"redis://127.0.0.1:{port}/0"

    def fresh(self) -> str:
        """Empty it; its URL."""
        if self._said(b"FLUSHALL\r\n") != b"+OK\r\n":
            raise SystemExit("bench: redis could not be emptied")
        return self.url

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            return self._said(b"PING\r\n") == b"+PONG\r\n"
        except OSError:
            return False

    def _said(self, command: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self._port), timeout=STOP_TIMEOUT_S) as connection:
            connection.sendall(command)
            return connection.recv(100)


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """A running cluster under `folder`; Missing when there is no PostgreSQL."""
    programs = _postgres_programs()
    data, port = folder / "postgres", free_port()
    data.mkdir(mode=0o700)
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        as_user = {"user": "postgres", "group": "postgres", "extra_groups": [], "env": {**os.environ, "HOME": "/tmp"}}  # noqa: S108 (any folder it may enter)
        shutil.chown(data, "postgres", "postgres")
        folder.chmod(0o711)
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data}"
    control = [str(programs / "pg_ctl"), "-s", "-D", str(data)]
    _run([str(programs / "initdb"), "-D", str(data), "-U", USER, "-A", "trust", "-E", "UTF8"], **as_user)
    _run([*control, "-w", "-l", str(data / "log"), "-o", settings, "start"], **as_user)
    try:
        yield Postgres(programs, port)
    finally:
        _run([*control, "-w", "-m", "fast", "stop"], **as_user)


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[Redis]:
    """A running server under `folder`; Missing when there is no Redis."""
    program = shutil.which("redis-server")
    if program is None:
        _install("redis-server")
        program = shutil.which("redis-server")
    if program is None:
        raise Missing("redis-server is not on PATH")
    data, port = folder / "redis", free_port()
    data.mkdir()
    durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
    where = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(data)]
    with (data / "log").open("wb") as log:
        server = subprocess.Popen([program, *where, *durable], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        found = Redis(port)
        wait_for(found.answers, "redis answers")
        yield found
    finally:
        ended(server)


def ended(process: subprocess.Popen[Any]) -> None:
    """End a process that was started here."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _postgres_programs() -> Path:
    found = _newest_postgres()
    if found is None:
        _install("postgresql")
        found = _newest_postgres()
    if found is None:
        raise Missing("PostgreSQL's initdb is neither on PATH nor under /usr/lib/postgresql")
    return found


def _newest_postgres() -> Path | None:
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if packaged:
        return packaged[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).resolve().parent


def _install(package: str) -> None:
    """By apt, where that is ours to do; Missing where it is not."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Missing(f"{package} is not installed; on Debian: apt-get install {package}")
    print(f"bench: installing {package}", file=sys.stderr)
    quiet: dict[str, Any] = {
        "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        "timeout": INSTALL_TIMEOUT_S,
        "capture_output": True,
    }
    subprocess.run(["apt-get", "update", "-q"], check=False, **quiet)
    install = ["apt-get", "install", "-qy", "--no-install-recommends", package]
    done = subprocess.run(install, check=False, **quiet)
    if done.returncode:
        raise Missing(f"{package} could not be installed: {done.stderr.decode(errors='replace').strip()[-300:]}")


def _run(command: list[str], **more: Any) -> None:
    # Not captured by a pipe: a server that stays would hold it open.
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=COMMAND_TIMEOUT_S, check=False, **more
    )
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)} -> {done.returncode}")
