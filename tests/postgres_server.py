"""A real PostgreSQL of the tests' own: durable as in earnest, small, and gone with the process that started it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from orchestrator_fleet.store.database import open_store
from orchestrator_fleet.store.schema import REVISION, metadata

DEADLINE_S = 30.0
MAX_CONNECTIONS = 60
PEOPLE = ("postgres", "nobody")
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "16MB",
    "max_connections": str(MAX_CONNECTIONS),
    "max_wal_size": "64MB",
    "min_wal_size": "32MB",
    "checkpoint_timeout": "1h",
    "deadlock_timeout": "100ms",
    "log_min_messages": "warning",
}
_OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
_TABLES = [table.name for table in reversed(metadata.sorted_tables) if table.name != "alembic_version"]
_EMPTY = (
    "SET statement_timeout = '5s'; SET lock_timeout = '1s'; BEGIN;"  # noqa: S608 (the names of our own tables)
    + "".join(f"DELETE FROM {name};" for name in _TABLES)  # noqa: S608 (as above)
    + f"UPDATE alembic_version SET version_num = '{REVISION}';"  # noqa: S608 (as above)
    + "SELECT setval('events_seq_seq', 1, false), setval('attempt_log_seq_seq', 1, false); COMMIT"
)


def programs() -> Path | None:
    """The folder of initdb and postgres; None when PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found:
        return found[-1]
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class PostgresServer:
    """A server on a temporary cluster.

    `lent()` is a database with our tables and nothing in them, for a while; `empty()` one without tables, for ever.
    """

    def __init__(self) -> None:
        folder = programs()
        assert folder is not None, "PostgreSQL is not installed; scripts/setup --dev does it"
        self._bin = folder
        self._user = _unprivileged()
        # Not under pytest's own folder: the user that the server runs as must get there.
        self.folder = Path(tempfile.mkdtemp(prefix="fleet-pg-"))
        self.own(self.folder)
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        self._free: list[str] = []
        data = str(self.folder / "data")
        self._run("initdb", "-D", data, "-U", "fleet", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        self.start()
        self._sql("CREATE DATABASE template")
        open_store(self.url("template")).close()

    def url(self, database: str, *, host: str | None = None) -> str:
        """Its URL: by the socket, unless a host is given."""
        return f"postgresql://fleet@/{database}?host={host or self.folder}&port={self.port}"

    @contextmanager
    def lent(self) -> Iterator[str]:
        """The URL of a database as this version makes it.

        The next one may get the same, emptied: that takes 10 ms, a new one 100.
        """
        url = self._free.pop() if self._free else self._make("TEMPLATE template")
        yield url
        if self._emptied(url):
            self._free.append(url)

    def empty(self) -> str:
        """The URL of a new database without a table."""
        return self._make("TEMPLATE template0")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        argv = [str(self._bin / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder)]
        argv += ["-p", str(self.port), "-h", "127.0.0.1"]
        argv += [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._as_user(argv), stdout=log, stderr=log, cwd="/")
        until = time.monotonic() + DEADLINE_S
        while True:
            try:
                self._sql("SELECT 1")
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < until, (self.folder / "log").read_text()
                time.sleep(0.02)
            else:
                return

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT: at once and in order. SIGQUIT: as if it had crashed."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(DEADLINE_S)
            self._process = None

    def close(self) -> None:
        """Stop it, and take its files away."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self, how: str) -> str:
        self._made += 1
        name = f"t{self._made}"
        self._sql(f"CREATE DATABASE {name} {how}")
        return self.url(name)

    def _emptied(self, url: str) -> bool:
        """False when somebody still uses it, or it can't be emptied: it is left alone from then on."""
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=5) as raw:
                if raw.execute(_OTHERS).fetchone() != (0,):
                    return False
                raw.execute(_EMPTY)
        except psycopg.Error:
            return False
        return True

    def _sql(self, text: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as raw:
            raw.execute(text)

    def _run(self, program: str, *arguments: str) -> None:
        argv = self._as_user([str(self._bin / program), *arguments])
        done = subprocess.run(argv, capture_output=True, text=True, cwd="/", timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, done.stderr

    def _as_user(self, argv: list[str]) -> list[str]:
        """As a user it agrees to run as, and not for longer than this process."""
        who = [] if self._user is None else [f"--reuid={self._user}", f"--regid={self._group()}", "--clear-groups"]
        return ["setpriv", *who, "--pdeathsig=QUIT", "--", *argv]

    def _group(self) -> int:
        return pwd.getpwnam(self._user or "").pw_gid

    def own(self, path: Path) -> None:
        """Let the server's user have it."""
        if self._user is not None:
            shutil.chown(path, self._user)


def _unprivileged() -> str | None:
    """Whom to run it as; None for ourselves: it refuses to run as root."""
    if os.getuid() != 0:
        return None
    known = {user.pw_name for user in pwd.getpwall()}
    return next(name for name in PEOPLE if name in known)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]
