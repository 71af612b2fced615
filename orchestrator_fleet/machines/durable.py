"""Files that are whole or not there, also after a power cut: write aside, fsync, rename, fsync the folder."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator_fleet.machines.layout import FILE_MODE, TEMPORARY_PREFIX


def write(path: Path, data: bytes, *, mode: int = FILE_MODE) -> None:
    """Write a new file and fsync it; its folder is for the caller to fsync."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes, *, mode: int = FILE_MODE) -> None:
    """Make `path` hold `data` in one rename."""
    aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    aside.unlink(missing_ok=True)
    write(aside, data, mode=mode)
    aside.rename(path)
    sync_folder(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Make `path` a symbolic link to `target` in one rename."""
    aside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
