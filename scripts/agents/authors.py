"""Who knows what: commits by author, and the folders that hang on one person."""

from __future__ import annotations

from collections import Counter, defaultdict

from report import Report, Work, plural, run

MAX_COMMITS = 1000
SOLE_SHARE = 0.8
MIN_COMMITS = 3


def agent(work: Work) -> Report:
    """Read who committed to which folder of the scope."""
    log = work.git("log", f"--max-count={MAX_COMMITS}", "--format=%x00%aN", "--name-only", "--", work.scope)
    authors: Counter[str] = Counter()
    folders: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for entry in log.split("\0")[1:]:
        author, *paths = entry.splitlines()
        authors[author] += 1
        for folder in {path.rpartition("/")[0] or "." for path in paths if path}:
            folders[folder][author] += 1
    alone = []
    for folder, counts in sorted(folders.items()):
        name, most = counts.most_common(1)[0]
        if counts.total() >= MIN_COMMITS and most / counts.total() >= SOLE_SHARE:
            alone.append(f"{folder}: {most} of {plural(counts.total(), 'commit')} by {name}")
    return Report(
        headline=f"{plural(len(authors), 'author')}, {plural(authors.total(), 'commit')}; "
        f"{len(alone)} of {plural(len(folders), 'folder')} hang on one person",
        numbers={"authors": len(authors), "commits": authors.total(), "by_author": dict(authors.most_common(10))},
        findings=alone,
    )


if __name__ == "__main__":
    run(agent)
