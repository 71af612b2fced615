"""Putting new bytes in a file's place in one step, without ever overwriting what somebody saved there meanwhile.

    lay (all of it aside, durably) ─▶ swap (one rename; what comes out must be what was read) ─▶ clear
                                        └▶ undo: swapped back

The kernel exchanges the two names, so that whatever stood there at that very moment is in our hands, and goes back
if it isn't what the new text was made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from orchestrator_fleet.errors import FleetError

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


class EditedMeanwhile(FleetError):
    """The file is no longer what was read; it is as somebody else left it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """A file that is to hold `after` in place of `before`; None where it isn't there. `path` is no link."""

    path: Path
    before: bytes | None
    after: bytes | None

    @property
    def aside(self) -> Path:
        """Where the new bytes wait, and the old ones then: no name that a glob of a fleet matches."""
        return self.path.with_name(f".{self.path.name}.declaring")


def read(path: Path) -> bytes | None:
    """What a file holds; None where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def refuse_edited(put: Put) -> None:
    """Raise EditedMeanwhile unless the file still holds what was read."""
    if read(put.path) != put.before:
        raise EditedMeanwhile(f"{put.path}: changed while the edit was made; try again")


def lay(put: Put) -> None:
    """Write the new bytes beside the file, durably, with its mode and owner; raises OSError, as on a full disk."""
    put.aside.unlink(missing_ok=True)
    if put.after is None:
        return
    put.path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(put.aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(put.after)
        file.flush()
        with contextlib.suppress(FileNotFoundError):
            seen = put.path.stat()
            os.fchmod(file.fileno(), seen.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):  # only root gives files to others
                os.fchown(file.fileno(), seen.st_uid, seen.st_gid)
        os.fsync(file.fileno())


def swap(put: Put) -> None:
    """Put what was laid in the file's place; raises EditedMeanwhile, and the file is then as it was found."""
    _move(put.path, put.aside, old=put.before, new=put.after)
    _sync(put.path.parent)


def undo(put: Put) -> None:
    """Put back what `swap` took out; raises EditedMeanwhile when somebody edited the new bytes since."""
    _move(put.path, put.aside, old=put.after, new=put.before)
    _sync(put.path.parent)


def clear(put: Put) -> None:
    """Leave nothing beside the file."""
    put.aside.unlink(missing_ok=True)


def resume(put: Put) -> None:
    """Finish after a kill at any moment between `lay` and `clear`; what somebody saved since is left as it is."""
    now, aside = read(put.path), read(put.aside)
    if now == put.before:
        lay(put)
        swap(put)
    elif now == put.after and aside is not None and aside not in {put.before, put.after}:
        # killed before it could look at what it had taken out, which was somebody's edit
        _move(put.path, put.aside, old=put.after, new=aside)
    clear(put)


def _move(path: Path, aside: Path, *, old: bytes | None, new: bytes | None) -> None:
    refused = EditedMeanwhile(f"{path}: changed while the edit was made; try again")
    try:
        if old is None:
            _rename(aside, path, _NOREPLACE)
        elif new is None:
            _rename(path, aside, _NOREPLACE)
            if read(aside) != old:
                _rename(aside, path, _NOREPLACE)
                raise refused
        else:
            _rename(aside, path, _EXCHANGE)
            if read(aside) != old:
                _rename(aside, path, _EXCHANGE)
                raise refused
    except (FileExistsError, FileNotFoundError):
        raise refused from None


def _rename(source: Path, target: Path, how: int) -> None:
    """renameat2, or the nearest there is where a file system has it not."""
    done = _libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), how)
    if done == 0:
        return
    number = ctypes.get_errno()
    if number not in {errno.EINVAL, errno.ENOSYS}:
        raise OSError(number, os.strerror(number), str(target))
    if how == _NOREPLACE:
        os.link(source, target)
        source.unlink()
        return
    taken = source.with_name(f"{source.name}-old")
    taken.unlink(missing_ok=True)
    os.link(target, taken)
    source.replace(target)
    taken.replace(source)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
