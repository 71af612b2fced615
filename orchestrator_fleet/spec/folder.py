"""The fleet folder: the only place the spec is read from.

Every read has a limit that is checked before the bytes are read, and ends inside the folder even through
symbolic links. Problems are raised as `SpecInvalid` with the path inside the folder.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NoReturn

from orchestrator_fleet.errors import Diagnostic, SpecInvalid
from orchestrator_fleet.spec.suggest import hint

MAX_YAML_BYTES = 4 << 20
MAX_LOOKED_AT = 20_000
_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class TooMany(Exception):
    """A glob looked at more names than MAX_LOOKED_AT."""


class Folder:
    """A folder with a fleet in it, for one load: each glob looks once.

    `instead` has contents to use in place of what is on disk, by path: also of files that are not there yet, and None
    for files that are to go.
    """

    def __init__(self, root: Path, *, instead: Mapping[str, bytes | None] | None = None) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self._instead = dict(instead or {})
        self._gone = {path for path, data in self._instead.items() if data is None}
        self._expanded: dict[str, tuple[str, ...] | None] = {}

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of this name, wherever a link leads."""
        if path in self._instead:
            return self._instead[path] is not None
        return os.path.exists(os.path.join(self.root, path))  # noqa: PTH110, PTH118 - also False for what no path can be

    def is_file(self, path: str) -> bool:
        """Whether it is a regular file, wherever a link leads."""
        if path in self._instead:
            return self._instead[path] is not None
        return os.path.isfile(os.path.join(self.root, path))  # noqa: PTH113, PTH118 - False for what no path can be

    def is_inside(self, path: str) -> bool:
        """Whether the path, links followed, ends inside the folder."""
        real = os.path.realpath(os.path.join(self.root, path))  # noqa: PTH118 - realpath takes what is not there
        return real == self._real_root or real.startswith(self._real_root.rstrip("/") + "/")

    def read(self, path: str, *, max_bytes: int) -> bytes:
        """The bytes of a regular file of at most `max_bytes`; a bigger one is refused unread."""
        instead = self._instead.get(path)
        if instead is not None:
            return instead
        if path in self._instead:
            _refuse(path, "does not exist")
        full = self.root / path
        if not self.is_inside(path):
            _refuse(path, "is a link that leaves the fleet folder", "copy the file into the folder")
        try:
            seen = full.stat()
            if stat.S_ISDIR(seen.st_mode):
                _refuse(path, "is a folder, wanted a file")
            if not stat.S_ISREG(seen.st_mode):
                _refuse(path, "is no regular file")
            if seen.st_size > max_bytes:
                _refuse(
                    path, f"is {_mib(seen.st_size)}, the limit is {_mib(max_bytes)}", "split it, or make it shorter"
                )
            with full.open("rb") as file:
                data = file.read(max_bytes + 1)
        except FileNotFoundError:
            _refuse(path, "does not exist", self.near(path))
        except OSError as error:
            _refuse(path, f"cannot be read: {error.strerror}", "check its name and permissions")
        if len(data) > max_bytes:
            _refuse(path, f"grew beyond {_mib(max_bytes)} while it was read")
        return data

    def read_text(self, path: str, *, max_bytes: int = MAX_YAML_BYTES) -> str:
        """The text of a UTF-8 file; says at which byte and line it is not."""
        return decode(self.read(path, max_bytes=max_bytes), file=path)

    def near(self, path: str) -> str:
        """`did you mean X?` for a file that is not there, or nothing."""
        pure = PurePosixPath(path)
        try:
            siblings = self.expand(str(pure.parent / "*"))
            same_kind = self.expand(f"**/*{pure.suffix}") if pure.suffix else ()
        except TooMany:
            return ""
        return hint(path, siblings) or hint(path, same_kind)

    def expand(self, pattern: str) -> tuple[str, ...]:
        """Files that match a glob (`*`, `?`, `[...]`, `**` for any folders), sorted.

        Hidden names match only a pattern that starts with a dot; `**` follows no links. Raises TooMany.
        """
        if pattern not in self._expanded:
            found = _expand(str(self.root), "", tuple(PurePosixPath(pattern).parts), _Look())
            try:
                names = {*found, *(path for path in self._instead if _matches(path, pattern))}
                self._expanded[pattern] = tuple(sorted(names - self._gone))
            except TooMany:
                self._expanded[pattern] = None
        matches = self._expanded[pattern]
        if matches is None:
            raise TooMany
        return matches


class _Look:
    def __init__(self) -> None:
        self.left = MAX_LOOKED_AT

    def entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as names:
                for entry in names:
                    self.left -= 1
                    if self.left < 0:
                        raise TooMany
                    yield entry
        except OSError:
            return  # what cannot be listed has no matches


def _expand(root: str, base: str, parts: tuple[str, ...], look: _Look) -> Iterator[str]:
    if not parts:
        if os.path.isfile(f"{root}/{base}"):  # noqa: PTH113 - strings here: a walk makes many of them
            yield base
        return
    head, rest = parts[0], parts[1:]
    if not any(character in head for character in "*?["):
        yield from _expand(root, f"{base}/{head}" if base else head, rest, look)
        return
    if head == "**":
        yield from _expand(root, base, rest or ("*",), look)
    for entry in list(look.entries(f"{root}/{base}")):
        below = f"{base}/{entry.name}" if base else entry.name
        if head == "**":
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _expand(root, below, parts, look)
        elif fnmatch.fnmatchcase(entry.name, head) and (entry.name[0] != "." or head[0] == "."):
            yield from _expand(root, below, rest, look)


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob names a path that may not be on disk; as `_expand` does."""
    return _steps_match(PurePosixPath(path).parts, PurePosixPath(pattern).parts)


def _steps_match(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not path or not pattern:
        return not path and not pattern
    (name, *below), (head, *rest) = path, pattern
    if head == "**":
        deeper = len(path) > 1 and not name.startswith(".") and _steps_match(tuple(below), pattern)
        return deeper or _steps_match(path, tuple(rest) or ("*",))
    hidden = name.startswith(".") and not head.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name, head) and _steps_match(tuple(below), tuple(rest))


def decode(data: bytes, *, file: str) -> str:
    """UTF-8 bytes as text, a byte order mark left out; raises SpecInvalid naming the first bad byte."""
    for mark, encoding in _BOMS.items():
        if data.startswith(mark):
            _refuse(file, f"is {encoding}, wanted UTF-8", "save it as UTF-8")
    nul = data.find(b"\0")
    if nul >= 0:
        _refuse_at(file, data, nul, f"has a NUL byte at offset {nul}, wanted UTF-8 text", "is this a binary file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        _refuse_at(file, data, start, f"is not UTF-8 at byte {start} (0x{data[start]:02x})", "save it as UTF-8")


def _refuse(file: str, problem: str, advice: str = "") -> NoReturn:
    raise SpecInvalid([Diagnostic(file=file, problem=problem, hint=advice)])


def _refuse_at(file: str, data: bytes, offset: int, problem: str, advice: str) -> NoReturn:
    before = data[:offset]
    start = before.rfind(b"\n") + 1
    raise SpecInvalid(
        [
            Diagnostic(
                file=file,
                line=before.count(b"\n") + 1,
                column=len(before[start:].decode("utf-8", "replace")) + 1,
                problem=problem,
                hint=advice,
            )
        ]
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / (1 << 10):.0f} KiB"
