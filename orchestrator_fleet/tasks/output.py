"""What a session prints: kept per attempt, in order, up to a limit.

Pieces carry the byte at which they begin in their stream, so a daemon may send a piece again after a reconnect: what
is already here is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.errors import Invalid, LeaseLost
from orchestrator_fleet.store.schema import attempt_log, attempts

MAX_ATTEMPT_BYTES = 1 << 20
MAX_READ = 1_000
SESSION_STREAMS = ("stdout", "stderr")

# Held: a daemon that connected again sends a piece again, maybe while the first is still on its way in.
_ATTEMPT = (
    sa.select(
        attempts.c.attempt, attempts.c.stdout_bytes, attempts.c.stderr_bytes, attempts.c.log_bytes, attempts.c.outcome
    )
    .where(attempts.c.task == sa.bindparam("of_task"), attempts.c.token == sa.bindparam("by"))
    .with_for_update()
)
_INSERT = attempt_log.insert()
_COUNT = attempts.update().where(
    attempts.c.task == sa.bindparam("of_task"), attempts.c.attempt == sa.bindparam("number")
)
_READ = (
    sa.select(attempt_log)
    .where(attempt_log.c.task == sa.bindparam("of_task"), attempt_log.c.seq > sa.bindparam("after"))
    .order_by(attempt_log.c.seq)
    .limit(sa.bindparam("most"))
)
_OF_ONE = attempt_log.c.attempt == sa.bindparam("number")
_READ_ONE = _READ.where(_OF_ONE)
_COUNT_PIECES = sa.select(sa.func.count()).select_from(attempt_log).where(attempt_log.c.task == sa.bindparam("of_task"))
_COUNT_ONE = _COUNT_PIECES.where(_OF_ONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of an attempt's output. `stream` is stdout, stderr, or fleet for a remark of ours."""

    seq: int
    task: str
    attempt: int
    at_us: int
    stream: str
    byte_offset: int
    text: str


def append_log(conn: Connection, *, task_id: str, token: str, stream: str, offset: int, text: str, now_us: int) -> bool:
    """Keep a piece of a running attempt's output; answers whether anything new was kept.

    `offset` is the piece's first byte in its stream. After MAX_ATTEMPT_BYTES of an attempt one remark says that the
    rest is only on the machine. LeaseLost when the token is not a running attempt's.
    """
    if stream not in SESSION_STREAMS:
        raise Invalid([("stream", f"got {stream!r}, wanted stdout or stderr")])
    attempt = conn.execute(_ATTEMPT, {"of_task": task_id, "by": token}).one_or_none()
    if attempt is None or attempt.outcome is not None:
        raise LeaseLost(f"{task_id}: this token is not a running attempt's; stop, and drop what you have")
    have: int = getattr(attempt, f"{stream}_bytes")
    piece = text.replace("\0", "\ufffd").encode()
    new = piece[max(0, have - offset) :]
    if not new or attempt.log_bytes >= MAX_ATTEMPT_BYTES:
        return False
    kept = new[: MAX_ATTEMPT_BYTES - attempt.log_bytes]
    where = {"task": task_id, "attempt": attempt.attempt, "at_us": now_us}
    begins = offset + len(piece) - len(new)
    pieces = [{**where, "stream": stream, "byte_offset": begins, "text": kept.decode(errors="replace")}]
    log_bytes = attempt.log_bytes + len(new)
    if log_bytes >= MAX_ATTEMPT_BYTES:
        remark = (
            f"[the log is cut at {MAX_ATTEMPT_BYTES >> 20} MiB; the rest is in the session's folder on its machine]\n"
        )
        pieces.append({**where, "stream": "fleet", "byte_offset": begins + len(kept), "text": remark})
    conn.execute(_INSERT, pieces)
    conn.execute(
        _COUNT,
        {
            "of_task": task_id,
            "number": attempt.attempt,
            "log_bytes": log_bytes,
            f"{stream}_bytes": offset + len(piece),
        },
    )
    return True


def read_log(
    conn: Connection, *, task_id: str, after_seq: int = 0, attempt: int | None = None, limit: int = MAX_READ
) -> Sequence[Piece]:
    """Pieces with a greater `seq`, in order of arrival, at most `limit`; of one attempt, or of all."""
    names = {"of_task": task_id, "after": after_seq, "most": min(limit, MAX_READ)}
    found = conn.execute(_READ, names) if attempt is None else conn.execute(_READ_ONE, {**names, "number": attempt})
    return [Piece(**row) for row in found.mappings()]


def count_log(conn: Connection, *, task_id: str, attempt: int | None = None) -> int:
    """How many pieces there are of one attempt, or of all."""
    if attempt is None:
        return conn.execute(_COUNT_PIECES, {"of_task": task_id}).scalar_one()
    return conn.execute(_COUNT_ONE, {"of_task": task_id, "number": attempt}).scalar_one()
