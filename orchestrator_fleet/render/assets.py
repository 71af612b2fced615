"""Which files of the fleet folder travel along with an orchestrator, and how its command names them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import PurePosixPath

ASSETS = "assets"
PLACEHOLDER = "{assets}"


def relocate(argv: Sequence[str], assets: Collection[str]) -> tuple[str, ...]:
    """`python3 scripts/a.py` -> `python3 {assets}/scripts/a.py`: elements that name a file that travels along."""
    tidy = [(word, _tidy(word)) for word in argv]
    return tuple(f"{PLACEHOLDER}/{path}" if path in assets else word for word, path in tidy)


def travelling(*, argv: Sequence[str], globs: Sequence[str], assets: Collection[str]) -> tuple[str, ...]:
    """Paths, sorted: the assets that `argv` names, and those that a glob or a folder among `globs` takes in."""
    named = {_tidy(word) for word in argv}.intersection(assets)
    patterns = [PurePosixPath(glob).parts for glob in globs]
    parts = [(path, PurePosixPath(path).parts) for path in assets] if patterns else []
    return tuple(sorted(named.union(path for path, p in parts if any(_takes_in(pattern, p) for pattern in patterns))))


@lru_cache(maxsize=4096)
def _tidy(word: str) -> str:
    return PurePosixPath(word).as_posix()


def _takes_in(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    """Whether a glob's parts match the path or a folder above it; `**` stands for any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_takes_in(pattern[1:], path[start:]) for start in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _takes_in(pattern[1:], path[1:])
