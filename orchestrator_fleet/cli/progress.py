"""How long work shows itself: one rewritten line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Self

from orchestrator_fleet.cli.output import is_terminal, printable, say
from orchestrator_fleet.reconcile.report import Event, Result

QUIET_S = 5.0  # between two lines in a pipe
_ENDS = frozenset(Result)
_QUIET = frozenset({"staged", "leased"})
_CLEAR = "\r\x1b[K"


class ProgressLine:
    """A line on stderr that says how far something is; use it as a context manager, which clears it.

    In a pipe a changed text is printed at most each QUIET_S seconds.
    """

    def __init__(self) -> None:
        self._live = is_terminal(sys.stderr)
        self._text = ""
        self._said = -QUIET_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live and self._text:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()

    def show(self, text: str) -> None:
        """Say how far it is now."""
        if text == self._text:
            return
        now = time.monotonic()
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps can't be rewritten
            sys.stderr.write(f"{_CLEAR}{printable(text)[:width]}")
            sys.stderr.flush()
        elif now - self._said < QUIET_S:
            return
        else:
            say(text, err=True)
        self._text, self._said = text, now


class RolloutProgress:
    """An apply as it goes, on stderr: one rewritten line on a terminal; in a pipe a line for each event that matters.

    That a machine waits to become healthy is normal: in a pipe it is told only from QUIET_S after its switch on.
    """

    def __init__(self, *, total: int) -> None:
        self._total = total
        self._ended: set[str] = set()
        self._switched: dict[str, float] = {}
        self._line = ProgressLine()
        self._live = is_terminal(sys.stderr)

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._line.__exit__(kind, error, at)

    def tell(self, event: Event) -> None:
        """Something happened."""
        if event.kind in _ENDS:
            self._ended.add(event.target)
        if event.kind == "switching":
            self._switched[event.target] = time.monotonic()
        text = ": ".join(part for part in (event.target, event.kind.replace("_", " "), event.text) if part)
        if self._live:
            self._line.show(f"{len(self._ended)} of {self._total} done  {text}" if self._total else text)
        elif event.kind == "waiting":
            if time.monotonic() - self._switched.get(event.target, 0.0) >= QUIET_S:
                say(text, err=True)
        elif event.kind not in _QUIET:
            say(text, err=True)
