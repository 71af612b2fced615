"""A repository in numbers: lines by language, the largest files, age and pace."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from report import Report, Work, plural, run

LARGEST = 10


def agent(work: Work) -> Report:
    """Count what is tracked in scope."""
    lines: Counter[str] = Counter()
    sizes: list[tuple[int, str]] = []
    for path, text in work.files():
        count = text.count("\n")
        lines[PurePosixPath(path).suffix or PurePosixPath(path).name] += count
        sizes.append((count, path))
    dates = work.git("log", "--format=%cs", "--", work.scope).split()
    since = dates[-1] if dates else "never"
    top = ", ".join(f"{count} of {kind}" for kind, count in lines.most_common(3))
    return Report(
        headline=f"{plural(len(sizes), 'file')}, {plural(lines.total(), 'line')} ({top}); "
        f"{plural(len(dates), 'commit')} since {since}",
        numbers={
            "files": len(sizes),
            "lines": lines.total(),
            "by_kind": dict(lines.most_common(10)),
            "commits": len(dates),
        },
        findings=[f"{path}: {plural(count, 'line')}" for count, path in sorted(sizes, reverse=True)[:LARGEST]],
    )


if __name__ == "__main__":
    run(agent)
