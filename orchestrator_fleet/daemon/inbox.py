"""The inbox of an orchestrator, `run/<name>.inbox.jsonl`: what it was told, for its sessions to read.

One JSON object a line, `{"id", "kind", "at", "data"}`, the newest last; no line is ever changed. The control plane is
told that a notice is here once it is on the disk, and not before; what comes again is known by its id, over restarts
too. The newest KEPT stay, in MAX_BYTES: when there are twice as many, a shorter file takes its place in one rename, so
that whoever has the old one open reads it to its end.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from orchestrator_fleet import log
from orchestrator_fleet.wire.link import Instant, Notice

KEPT = 1_000
MAX_BYTES = 16 << 20
_PRIVATE = 0o600
_PIECE_BYTES = 64 << 10
# JSON may hold these as they are, and some readers of lines (Python's `splitlines`) end a line at them.
_ALSO_ENDS = tuple((sign.encode(), f"\\u{ord(sign):04x}".encode()) for sign in "\x85\u2028\u2029")

_log = log.get(__name__)


class Entry(msgspec.Struct, kw_only=True, frozen=True):
    """A line."""

    id: str
    kind: str
    at: Instant
    data: dict[str, Any]


class _Named(msgspec.Struct, frozen=True):
    """What is looked at of a line that is there."""

    id: str


_decoder = msgspec.json.Decoder(_Named)


class Inbox:
    """The file, kept by one daemon at a time. Its functions wait for the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ids: set[str] = set()
        # (id, bytes) of every line in order; the id is empty where a line is none of ours.
        self._lines: deque[tuple[str, int]] = deque()
        self._seen: tuple[int, int] | None = None

    def keep(self, notices: Iterable[Notice]) -> int:
        """Write down those that are not here yet, durably; how many. On OSError none of them was written."""
        if self._stat() != self._seen:
            self._read()
        new = {one.notice: one for one in notices if one.notice not in self._ids}
        lines = [(name, _line(one)) for name, one in new.items()]
        if lines:
            self._append(b"".join(line for _, line in lines))
            self._ids.update(new)
            self._lines.extend((name, len(line)) for name, line in lines)
            self._seen = self._stat()
        if len(self._lines) > 2 * KEPT or self._bytes() > MAX_BYTES:
            try:
                self._shorten()
            except OSError as error:
                # What was to be kept is kept; a disk that is full again has room some other time.
                _log.warning("the inbox can't be made shorter", path=str(self._path), problem=str(error))
        return len(lines)

    def _bytes(self) -> int:
        return self._seen[1] if self._seen is not None else 0

    def _stat(self) -> tuple[int, int] | None:
        """(inode, size): that it is as we left it. None: there is none."""
        try:
            found = self._path.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise FileExistsError(errno.EEXIST, "is no regular file; remove it", str(self._path))
        return found.st_ino, found.st_size

    def _read(self) -> None:
        """Know what is in it. A last line without an end was cut off while it was written, and goes."""
        self._ids, self._lines, self._seen = set(), deque(), None
        found = self._stat()
        if found is not None and found[1] > 2 * MAX_BYTES:
            aside = self._path.with_name(f"{self._path.name}.aside")
            self._path.replace(aside)
            _log.warning("the inbox was written to by others, and is too big; put aside", path=str(aside))
        try:
            file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_NOFOLLOW), "r+b")
        except FileNotFoundError:
            return
        with file:
            whole = 0
            for line in file:
                if not line.endswith(b"\n"):
                    os.truncate(file.fileno(), whole)
                    break
                whole += len(line)
                name = _id_of(line)
                self._lines.append((name, len(line)))
                if name:
                    self._ids.add(name)
            self._seen = self._stat()

    def _append(self, data: bytes) -> None:
        """Add to the end, and see it on the disk; or leave the file as it was."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self._path, flags, _PRIVATE)
        try:
            before = os.fstat(descriptor).st_size
            try:
                _write(descriptor, data)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
        if not before:
            _sync_folder(self._path.parent)

    def _shorten(self) -> None:
        """Leave out the oldest: at most KEPT lines stay, in half of MAX_BYTES, and the newest in any case."""
        skipped, left, dropped = 0, self._bytes(), 0
        for _, size in self._lines:
            if len(self._lines) - dropped == 1 or (len(self._lines) - dropped <= KEPT and left <= MAX_BYTES // 2):
                break
            skipped, left, dropped = skipped + size, left - size, dropped + 1
        part = self._path.with_name(f".{self._path.name}.part")
        try:
            with self._path.open("rb") as old, os.fdopen(_create(part), "wb") as new:
                old.seek(skipped)
                shutil.copyfileobj(old, new, _PIECE_BYTES)
                new.flush()
                os.fsync(new.fileno())
            part.replace(self._path)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        for _ in range(dropped):
            name, _ = self._lines.popleft()
            self._ids.discard(name)
        self._seen = self._stat()
        _sync_folder(self._path.parent)


def _line(notice: Notice) -> bytes:
    entry = Entry(id=notice.notice, kind=notice.kind, at=notice.at, data=notice.data)
    line = msgspec.json.encode(entry)
    for sign, escaped in _ALSO_ENDS:
        line = line.replace(sign, escaped)
    return line + b"\n"


def _id_of(line: bytes) -> str:
    try:
        return _decoder.decode(line).id
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ""


def _create(path: Path) -> int:
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
