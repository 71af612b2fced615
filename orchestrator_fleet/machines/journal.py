"""The machine's journal, `journal.jsonl`: one line a step, for people, and for knowing the last good generation.

Nothing is replayed from it: apply always starts from what it sees. A torn or foreign line is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from orchestrator_fleet.machines import durable
from orchestrator_fleet.machines.layout import FILE_MODE
from orchestrator_fleet.wire.machine import JournalEntry

STAGED, SWITCHED, CONFIRMED, REJECTED, PRUNED = "staged", "switched", "confirmed", "rejected", "pruned"
MAX_BYTES = 1 << 20
READ_BYTES = 2 * MAX_BYTES
KEEP_ENTRIES = 500
MAX_REASON = 2_000

_decoder = msgspec.json.Decoder(JournalEntry)
_encoder = msgspec.json.Encoder()


def read(path: Path) -> list[JournalEntry]:
    """All entries in the last `READ_BYTES`, oldest first; empty when there is no journal."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - READ_BYTES))
            lines = file.read(READ_BYTES).split(b"\n")
    except OSError:
        return []
    return [entry for line in lines if (entry := _decode(line)) is not None]


def _decode(line: bytes) -> JournalEntry | None:
    try:
        return _decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def append(path: Path, entry: JournalEntry) -> None:
    """Add one entry, durably. A journal grown past `MAX_BYTES` is cut to its last `KEEP_ENTRIES` first."""
    if path.exists() and path.stat().st_size > MAX_BYTES:
        entries = read(path)
        confirmed = [e for e in entries[:-KEEP_ENTRIES] if e.step == CONFIRMED][-1:]
        kept = [*confirmed, *entries[-KEEP_ENTRIES:]]
        durable.replace(path, b"".join(_encoder.encode(e) + b"\n" for e in kept))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, FILE_MODE)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        file.write((b"\n" if torn else b"") + _encoder.encode(entry) + b"\n")
        os.fsync(descriptor)


def last_good(entries: Iterable[JournalEntry], *, present: Collection[str]) -> str | None:
    """The digest confirmed last, of the generations that are still there."""
    confirmed = [e.digest for e in entries if e.step == CONFIRMED and e.digest in present]
    return confirmed[-1] if confirmed else None


def rejected(entries: Iterable[JournalEntry]) -> dict[str, str]:
    """Digest -> why, of generations that did not become healthy and were not confirmed since."""
    reasons: dict[str, str] = {}
    for entry in entries:
        if entry.step == REJECTED:
            reasons[entry.digest] = entry.reason
        elif entry.step == CONFIRMED:
            reasons.pop(entry.digest, None)
    return reasons


def highest_token(entries: Iterable[JournalEntry]) -> int:
    """The highest fencing token that ever changed something here; 0 for none."""
    return max((entry.token for entry in entries), default=0)


def ages(entries: Iterable[JournalEntry]) -> dict[str, int]:
    """Digest -> position of its latest mention: higher is younger."""
    return {entry.digest: position for position, entry in enumerate(entries) if entry.step != PRUNED}
