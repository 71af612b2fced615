"""What changed: commits of the scope by the folder they touch, as the draft of release notes."""

from __future__ import annotations

from collections import defaultdict

from report import Report, Work, plural, run

MAX_COMMITS = 200
MAX_SUBJECT = 120


def agent(work: Work) -> Report:
    """Group the newest commits by the top folder that most of their files are in."""
    log = work.git("log", f"--max-count={MAX_COMMITS}", "--format=%x00%h %s", "--name-only", "--", work.scope)
    groups: defaultdict[str, list[str]] = defaultdict(list)
    commits = 0
    for entry in log.split("\0")[1:]:
        subject, *files = [line for line in entry.splitlines() if line]
        commits += 1
        places = ["/".join(path.split("/")[:2]) for path in files] or ["(nothing)"]
        groups[max(set(places), key=lambda place: (places.count(place), place))].append(subject[:MAX_SUBJECT])
    return Report(
        headline=f"{plural(commits, 'change')} in {plural(len(groups), 'area')}",
        numbers={"commits": commits, "by_area": {place: len(subjects) for place, subjects in sorted(groups.items())}},
        findings=[f"{place}: {subject}" for place in sorted(groups) for subject in groups[place]],
    )


if __name__ == "__main__":
    run(agent)
