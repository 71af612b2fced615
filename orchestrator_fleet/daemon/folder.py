"""A session's folder, `work/<orchestrator>/<task>.<attempt>/`: all that is known of an attempt on this machine.

session.json   this daemon's record: written before the start, after it, and when the session ended
task.json      what the session reads on stdin
pid            the session's own word of who it is (a line of /proc/<pid>/stat), made before anything runs
stdout.log stderr.log result.json      what it writes
cloning        stands while the workspace is being cloned
exit           its exit code, made in one rename; without it a session that is gone has crashed
sent           how much of the output the control plane has
repo/          its workspace, if it has one
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from orchestrator_fleet.pids import Process, parse_stat
from orchestrator_fleet.wire.link import Finish

KEEP_FINISHED = 20
_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_MAX_SMALL_FILE_BYTES = 64 << 10


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """`session.json`. `pid` is 0 until the session was started.

    `finished` is what the control plane is to be told (kept until it has answered, then `told`); a session whose
    lease was lost has neither: it is `told` at once, as there is nobody to tell.
    """

    task: str
    token: str
    attempt: int
    generation: str
    charter_version: str
    boot: str
    started_us: int
    deadline_us: int
    pid: int = 0
    start_ticks: int = 0
    finished: Finish | None = None
    told: bool = False


_record_decoder = msgspec.json.Decoder(Record)
_sent_decoder = msgspec.json.Decoder(dict[str, int])


def is_safe_task_id(task: object) -> bool:
    """Whether a task's id can stand in a path."""
    return isinstance(task, str) and _TASK_ID.fullmatch(task) is not None


class SessionFolder:
    """The files of one attempt."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.task = path / "task.json"
        self.stdout = path / "stdout.log"
        self.stderr = path / "stderr.log"
        self.result = path / "result.json"
        self.assets = path / "assets"
        self._record = path / "session.json"
        self._pid = path / "pid"
        self._exit = path / "exit"
        self._cloning = path / "cloning"
        self._sent = path / "sent"

    @property
    def mark(self) -> str:
        """The environment entry that only this session's processes have."""
        return f"FLEET_RESULT={self.result}"

    def create(self) -> None:
        """Make it, empty; what an earlier life left at this name is removed."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(mode=0o700, parents=True)

    def copy_assets(self, source: Path, paths: Iterable[str]) -> None:
        """Copy the runner's files out of the generation; they may be run."""
        for path in paths:
            target = self.assets / path
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
            target.chmod(0o700)

    def record(self) -> Record | None:
        """What the daemon wrote down; None when there is nothing readable."""
        try:
            return _record_decoder.decode(self._record.read_bytes())
        except (OSError, msgspec.MsgspecError, ValueError):
            return None

    def keep(self, record: Record, *, durable: bool = False) -> None:
        """Write the record in one rename; `durable` also survives a power cut."""
        _replace(self._record, msgspec.json.encode(record) + b"\n", durable=durable)

    def own_word(self) -> Process | None:
        """Who the session says it is; None while it has not said so."""
        text = _read_small(self._pid)
        return parse_stat(text) if text is not None else None

    def abandon(self) -> bool:
        """Make sure a session that has not said who it is never runs; False when it was quicker."""
        try:
            os.close(os.open(self._pid, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        return True

    def exit_code(self) -> int | None:
        """The session's exit code, None when it left none."""
        text = _read_small(self._exit)
        return int(text) if text is not None and text.strip().isdigit() else None

    def is_cloning(self) -> bool:
        """Whether the session didn't get beyond cloning its workspace."""
        return self._cloning.exists()

    def sent(self) -> dict[str, int]:
        """Stream -> how many bytes of it went to the control plane."""
        try:
            return _sent_decoder.decode(self._sent.read_bytes())
        except (OSError, msgspec.MsgspecError):
            return {}

    def keep_sent(self, sent: dict[str, int]) -> None:
        """Write down how far the output was sent. A full disk costs no more than a piece that is sent twice."""
        with suppress(OSError):
            _replace(self._sent, msgspec.json.encode(sent))


def _read_small(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_SMALL_FILE_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return None


def _replace(path: Path, data: bytes, *, durable: bool = False) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    part.replace(path)


def session_folders(work: Path) -> Iterator[SessionFolder]:
    """Every session folder of an orchestrator, in the order of their names."""
    if work.is_dir():
        for path in sorted(work.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield SessionFolder(path)


def drop_old(work: Path, *, keep: int = KEEP_FINISHED) -> int:
    """Remove the oldest folders of sessions that are over and told, all but the last `keep`; how many went."""
    over = [
        (record.started_us, folder.path)
        for folder in session_folders(work)
        if (record := folder.record()) is not None and record.told
    ]
    old = sorted(over)[: max(0, len(over) - keep)]
    for _, path in old:
        shutil.rmtree(path, ignore_errors=True)
    return len(old)
