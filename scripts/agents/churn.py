"""Hot spots: the files that change most, and how much of each change was thrown away later."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from report import Report, Work, plural, run

MAX_COMMITS = 1000
MAX_SHOWN = 20


@dataclass(slots=True)
class Churn:
    """What git's log says of one file."""

    commits: int = 0
    added: int = 0
    removed: int = 0


def agent(work: Work) -> Report:
    """Read the log of the scope."""
    log = work.git(
        "log", f"--max-count={MAX_COMMITS}", "--no-renames", "--format=%x00%h", "--numstat", "--", work.scope
    )
    by_file: defaultdict[str, Churn] = defaultdict(Churn)
    commits = 0
    for line in log.splitlines():
        if line.startswith("\0"):
            commits += 1
            continue
        added, _, rest = line.partition("\t")
        removed, _, path = rest.partition("\t")
        if path and added.isdigit() and removed.isdigit():
            churn = by_file[path]
            churn.commits += 1
            churn.added += int(added)
            churn.removed += int(removed)
    hot = sorted(by_file.items(), key=lambda item: (-item[1].commits, -item[1].added - item[1].removed, item[0]))
    hottest = f"; {hot[0][0]} changed in {plural(hot[0][1].commits, 'commit')}" if hot else ""
    return Report(
        headline=f"{plural(len(by_file), 'file')} changed in {plural(commits, 'commit')}{hottest}",
        numbers={"commits": commits, "files": len(by_file)},
        findings=[
            {"file": path, "commits": churn.commits, "added": churn.added, "removed": churn.removed}
            for path, churn in hot[:MAX_SHOWN]
        ],
    )


if __name__ == "__main__":
    run(agent)
