"""What was left for later: notes to oneself in comments, with who left them and when, by git blame."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from report import Report, Work, plural, run

NOTE = re.compile(r"(?:#|//|--|<!--)\s*(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b[:\s]*(.{0,100})")
MAX_BLAMED = 20


def agent(work: Work) -> Report:
    """Find notes in every tracked text file in scope, and who left each."""
    found: list[str] = []
    for path, text in work.files():
        for number, line in enumerate(text.splitlines(), 1):
            match = NOTE.search(line)
            if match:
                since = _since(work, path, number) if len(found) < MAX_BLAMED else ""
                found.append(f"{path}:{number}: {match[1]} {match[2].strip()}{since}")
    return Report(
        headline=f"{plural(len(found), 'note')} left for later", numbers={"notes": len(found)}, findings=found
    )


def _since(work: Work, path: str, line: int) -> str:
    """Who left it, and on which day."""
    blame = work.git("blame", "--porcelain", "-L", f"{line},{line}", "--", path)
    said = dict(entry.partition(" ")[::2] for entry in blame.splitlines())
    day = datetime.fromtimestamp(int(said.get("author-time", 0)), UTC).date()
    return f" ({said.get('author', 'somebody')}, {day})"


if __name__ == "__main__":
    run(agent)
