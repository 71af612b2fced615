"""The sessions that daemons started here: which generations they use, and how to end them.

They outlive their daemon, so they are found on disk (`session.json`: pid and start time) and by the environment
that only a session has (`FLEET_RESULT`, a path in its own folder).
"""

from __future__ import annotations

import msgspec

from orchestrator_fleet import pids
from orchestrator_fleet.machines import processes
from orchestrator_fleet.machines.layout import Layout

TERM_S = 5.0
MAX_RECORD_BYTES = 1 << 20


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """The part of `session.json` needed here."""

    generation: str = ""
    pid: int = 0
    start_ticks: int = 0


_decoder = msgspec.json.Decoder(Record)


def live(layout: Layout) -> list[Record]:
    """The sessions whose process still runs. Garbage records are skipped."""
    records = []
    for path in layout.work.glob("*/*/session.json"):
        try:
            with path.open("rb") as file:
                record = _decoder.decode(file.read(MAX_RECORD_BYTES))
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
            continue
        if record.pid > 0 and pids.is_alive(pids.Process(record.pid, record.start_ticks)):
            records.append(record)
    return records


def generations_in_use(layout: Layout) -> set[str]:
    """Digests that running sessions were started under."""
    return {record.generation for record in live(layout)}


def end(layout: Layout, orchestrator: str | None = None) -> int:
    """End the sessions of one orchestrator, or of all, with everything they started; how many processes those were."""
    folder = layout.work / orchestrator if orchestrator is not None else layout.work
    found = processes.of_sessions(folder)
    processes.end(found, term_s=TERM_S)
    left = processes.of_sessions(folder)  # what they started while they were ending
    processes.end(left, term_s=0)
    return len(found) + len(left)
