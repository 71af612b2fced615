"""The words that errors share: a value as got, a path as written, the nearest known name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from heapq import nsmallest
from typing import Any

MAX_SHOWN = 60
MAX_PATH_SHOWN = 200
MAX_WORD = 80
MAX_CANDIDATES = 500
MIN_BEGINNING = 3
MAX_LISTED = 12
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,63}")

Path = tuple[str | int, ...]


def shown(value: Any) -> str:
    """A value as an error prints it: its YAML kind, or its text cut to MAX_SHOWN characters."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= MAX_SHOWN else value[: MAX_SHOWN - 1] + "…")
    return str(value)


def path_text(path: Path) -> str:
    """`("routing", 2, "to")` -> `routing[2].to`; keys that are no plain words are quoted, long paths cut."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += ("." if text else "") + (step if _PLAIN_KEY.fullmatch(step) else shown(step))
    return text if len(text) <= MAX_PATH_SHOWN else text[: MAX_PATH_SHOWN - 1] + "…"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` is the beginning of, or most like; None when none is near.

    Looks at MAX_CANDIDATES of about its length, those with the same first letter before others.
    """
    import difflib  # noqa: PLC0415 - only errors need it

    if len(word) > MAX_WORD:
        return None
    reach = max(4, len(word) // 2)
    about = (name for name in known if abs(len(name) - len(word)) <= reach)
    likely = nsmallest(MAX_CANDIDATES, about, key=lambda name: (name[:1] != word[:1], name))
    folded = {name.casefold(): name for name in likely}
    begun = [name for name in folded if len(word) >= MIN_BEGINNING and name.startswith(word.casefold())]
    found = begun if len(begun) == 1 else difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def one_of(names: Iterable[str]) -> str:
    """`a, b, c`, at most MAX_LISTED of them."""
    every = list(names)
    more = f", ... ({len(every)} in all)" if len(every) > MAX_LISTED else ""
    return ", ".join(every[:MAX_LISTED]) + more


def hint(word: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """`did you mean X?`, else `otherwise`."""
    near = nearest(word, known)
    return f"did you mean {near}?" if near is not None else otherwise
