"""Markdown that lies: relative links to files that are not there, and code blocks that name missing scripts."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from report import Report, Work, plural, run

LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)(?:#[^)]*)?\)")
SCRIPT = re.compile(r"^[ \t]*(scripts/[A-Za-z0-9_./-]+)", re.MULTILINE)


def agent(work: Work) -> Report:
    """Follow every relative link of every Markdown file in scope."""
    broken: list[str] = []
    files = links = 0
    for path, text in work.files(".md"):
        files += 1
        for pattern, base in ((LINK, PurePosixPath(path).parent), (SCRIPT, PurePosixPath())):
            for match in pattern.finditer(text):
                target = match[1]
                if ":" in target or target.startswith("/"):
                    continue
                links += 1
                if not (work.repository / base / target).exists():
                    line = text.count("\n", 0, match.start(1)) + 1
                    broken.append(f"{path}:{line}: {target} is not there")
    return Report(
        headline=f"{plural(links, 'relative link')} in {plural(files, 'Markdown file')}, {len(broken)} broken",
        numbers={"files": files, "links": links},
        findings=broken,
    )


if __name__ == "__main__":
    run(agent)
