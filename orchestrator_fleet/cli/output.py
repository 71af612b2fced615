"""What people and pipes read: tables, JSON, marks.

On a terminal a table is drawn with rich; in a pipe it is plain aligned text without a single escape code.
Text that came from elsewhere (titles, results, logs) loses its control characters before a terminal sees it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

from orchestrator_fleet.errors import Diagnostic, UsageError

MAX_CELL_CHARS = 200
MIN_LAST_COLUMN = 12
_CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)))  # all but tab and newline
_ONE_LINE = {**_CONTROL, 9: " ", 10: " "}

STYLES = {
    **dict.fromkeys(("RUNNING", "ONLINE", "DONE", "Ready", "done", "matched"), "green"),
    **dict.fromkeys(("IN_PROGRESS", "BUSY", "STARTING", "TODO", "AWAY", "Waiting"), "yellow"),
    **dict.fromkeys(("DOWN", "FATAL", "BACKOFF", "EXITED", "OFFLINE", "BLOCKED", "failed", "Stalled"), "red"),
    **dict.fromkeys(("CANCELLED", "STOPPED", "unchanged"), "dim"),
}


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def colour(stream: TextIO) -> bool:
    """Whether to colour: a terminal, and NO_COLOR is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def printable(text: str) -> str:
    """Text without control characters: a task's title cannot move somebody's cursor."""
    return text.translate(_CONTROL)


def cell(value: Any) -> str:
    """One value on one line of at most MAX_CELL_CHARS characters; nothing is `-`."""
    if value is None or value == "":
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    line = text[: MAX_CELL_CHARS * 2].translate(_ONE_LINE)
    return line if len(line) <= MAX_CELL_CHARS else f"{line[: MAX_CELL_CHARS - 1]}…"


def say(text: str = "", *, err: bool = False) -> None:
    """One line (or several) to stdout, or to stderr: what is said beside the answer."""
    print(printable(text), file=sys.stderr if err else sys.stdout, flush=err)


def write(text: str) -> None:
    """Text as it is, for an answer that is already formatted."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """A value as indented JSON on stdout."""
    write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; see the module's text."""
    cells = [[cell(value) for value in row] for row in rows]
    if not is_terminal(sys.stdout):
        write(plain_table(columns, cells))
        return
    from rich.console import Console  # noqa: PLC0415 - 40 ms that a pipe need not pay
    from rich.table import Table  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415 - as above

    console = Console(color_system="auto" if colour(sys.stdout) else None, highlight=False)
    widths = [max(len(row[i]) for row in [columns, *cells]) + 2 for i in range(len(columns))]
    only_the_last_folds = sum(widths[:-1]) + MIN_LAST_COLUMN <= console.width
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns, 1):
        drawn.add_column(column, overflow="fold", no_wrap=only_the_last_folds and number < len(columns))
    for row in cells:
        drawn.add_row(*(Text(value, style=STYLES.get(value, "")) for value in row))
    console.print(drawn)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, two spaces between, no trailing space."""
    lines = [list(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = ("  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in padded)


def fields(values: Mapping[str, Any]) -> None:
    """Name and value, a line each; several lines of text are indented under their name."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False, default=str)
        say(f"{name.ljust(width)}  {text.replace(chr(10), chr(10) + ' ' * (width + 2))}")


def count(number: int, word: str) -> str:
    """`1 machine`, `16 machines`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def age(rfc3339: str | None, *, now: datetime | None = None) -> str:
    """How long ago an RFC 3339 instant was, in its largest unit: `4m`."""
    if not rfc3339:
        return "-"
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(rfc3339)).total_seconds()
    return span(max(seconds, 0.0))


def span(seconds: float) -> str:
    """A length of time in its largest unit: 0.42 -> `0.4s`, 95 -> `1m`."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{seconds:.1f}s" if seconds < 10 else f"{int(seconds)}s"  # noqa: PLR2004 - two digits say enough


def confirmed(question: str) -> bool:
    """Ask on the terminal; anything but yes is no."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def require_consent(*, yes: bool) -> None:
    """Raise UsageError when nobody said yes and nobody is there to be asked."""
    if not (yes or (sys.stdin.isatty() and sys.stderr.isatty())):
        raise UsageError("this changes machines and nobody can be asked here; pass --yes")


def diagnostics_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    """Diagnostics as JSON values."""
    return [
        {
            "file": d.file,
            "line": d.line,
            "column": d.column,
            "path": d.path,
            "problem": d.problem,
            "hint": d.hint,
        }
        for d in diagnostics
    ]
