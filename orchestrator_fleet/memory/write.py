"""Keeping a memory, in the transaction of whatever it is about."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import memories

Tier = Literal["scratchpad", "episodic", "semantic"]

MAX_TEXT_BYTES = 32_000

_INSERT = memories.insert()


def remember(
    conn: Connection,
    *,
    orchestrator: str,
    tier: Tier,
    text: str,
    source: str,
    importance: float,
    actor: str,
    now_us: int,
    task: str | None = None,
    attempt: int | None = None,
    metadata: dict[str, Any] | None = None,
) -> str:
    """Keep `text` (cut at MAX_TEXT_BYTES of UTF-8) as a memory of an orchestrator, with its event; its id.

    `source` says where it comes from, as `handoff:<id>`; `importance` is 0 to 1.
    """
    memory_id = ids.new_id("mem", now_us)
    conn.execute(
        _INSERT,
        {
            "id": memory_id,
            "orchestrator": orchestrator,
            "tier": tier,
            "text": text.encode()[:MAX_TEXT_BYTES].decode(errors="ignore").replace("\0", "\ufffd"),
            "at_us": now_us,
            "importance": importance,
            "task": task,
            "attempt": attempt,
            "metadata": metadata or {},
            "valid_from_us": now_us,
            "source": source,
        },
    )
    about = {"memory": memory_id, "tier": tier, "source": source, "about_task": task}
    kept = Event(at_us=now_us, kind="memory_kept", actor=actor, orchestrator=orchestrator, data=about)
    outbox.append(conn, kept)
    return memory_id
