"""Secrets in tracked files: known key shapes, and random-looking text beside a telling name. Values are masked."""

from __future__ import annotations

import math
import re
from collections import Counter

from report import Report, Work, plural, run

MIN_ENTROPY_BITS = 4.0
SHOWN = 4
KNOWN = {
    "fleet-key": re.compile(r"fleet_k-[0-9a-f]{8}_[0-9a-f]{64}_[0-9a-f]{8}"),
    "aws-access-key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "anthropic-key": re.compile(r"\bsk-ant-[A-Za-z0-9_-]{20,}"),
    "github-token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
    "slack-token": re.compile(r"\bxox[baprs]-[A-Za-z0-9-]{10,}"),
    "private-key": re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----\n[A-Za-z0-9+/=]{16,}"),
}
ASSIGNED = re.compile(
    r"""(?i)\b(\w*(?:password|passwd|secret|token|api_?key)\w*)["']?\s*[:=]\s*["']([^"'\s]{16,200})["']"""
)


def agent(work: Work) -> Report:
    """Look at every tracked text file in scope."""
    found: list[tuple[str, str]] = []
    files = 0
    for path, text in work.files():
        files += 1
        for kind, pattern in KNOWN.items():
            found += [(kind, _line(path, text, match.start(), kind, match[0])) for match in pattern.finditer(text)]
        found += [
            ("assigned", _line(path, text, match.start(), f"{match[1].lower()} assigned", match[2]))
            for match in ASSIGNED.finditer(text)
            if entropy(match[2]) >= MIN_ENTROPY_BITS and not any(pattern.search(match[2]) for pattern in KNOWN.values())
        ]
    kinds = Counter(kind for kind, _ in found)
    return Report(
        headline=f"{plural(len(found), 'possible secret')} in {plural(files, 'tracked file')}",
        numbers={"files": files, "by_kind": dict(kinds)},
        findings=[line for _, line in found],
    )


def entropy(text: str) -> float:
    """Bits a character, by Shannon: English prose has under 4, random base 64 close to 6."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def _line(path: str, text: str, start: int, kind: str, value: str) -> str:
    return f"{path}:{text.count(chr(10), 0, start) + 1}: {kind}: {value[:SHOWN]}***"


if __name__ == "__main__":
    run(agent)
