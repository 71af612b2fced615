"""What the attempts of an orchestrator used, by the minute: what its budgets are measured against.

Tokens are those that a provider's limits count: input, output and what is written to its cache. Reading from the cache
costs a tenth and counts against no rate, so it stands in `usd` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.store.schema import spending
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.wire.link import Usage

MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
KEPT_US = 2 * DAY_US

_COLUMNS = tuple(column.name for column in spending.c)


def _add(insert: Any) -> Statement:
    new = insert(spending)
    more = {name: spending.c[name] + new.excluded[name] for name in ("attempts", "tokens", "usd")}
    key = [spending.c.orchestrator, spending.c.minute_us]
    return Statement(new.on_conflict_do_update(index_elements=key, set_=more), sets=_COLUMNS)


_ADD = {"sqlite": _add(sqlite.insert), "postgresql": _add(postgresql.insert)}
_DROP_OLD = Statement(
    spending.delete().where(
        spending.c.orchestrator == sa.bindparam("of"), spending.c.minute_us < sa.bindparam("before")
    )
)
_OF = spending.c.orchestrator == sa.bindparam("of")
_SINCE = spending.c.minute_us > sa.bindparam("since")
_SUM = Statement(
    sa.select(
        sa.func.coalesce(sa.func.sum(spending.c.attempts), 0),
        sa.func.coalesce(sa.func.sum(spending.c.tokens), 0),
        sa.func.coalesce(sa.func.sum(spending.c.usd), 0.0),
    ).where(_OF, _SINCE)
)
_MINUTES = sa.select(spending.c.minute_us, spending.c.tokens, spending.c.usd).where(_OF, _SINCE)
_OLDEST_FIRST = Statement(_MINUTES.order_by(spending.c.minute_us))


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What an orchestrator's ended attempts used, and what one of them uses on average."""

    usd_24h: float = 0.0
    tokens_1h: int = 0
    mean_usd: float = 0.0
    mean_tokens: float = 0.0


NOTHING = Spent()


def counted(usage: Usage) -> int:
    """The tokens of an attempt that count."""
    return usage.input_tokens + usage.output_tokens + usage.cache_write_tokens


def settle_all(conn: Connection, used: Sequence[tuple[str, Usage]], *, now_us: int) -> None:
    """Write down what attempts that end now used: (orchestrator, usage) each."""
    minute_us = now_us - now_us % MINUTE_US
    sums: dict[str, dict[str, Any]] = {}
    for orchestrator, usage in used:
        one = sums.setdefault(
            orchestrator,
            {"orchestrator": orchestrator, "minute_us": minute_us, "attempts": 0, "tokens": 0, "usd": 0.0},
        )
        one["attempts"] += 1
        one["tokens"] += counted(usage)
        one["usd"] += usage.usd
    in_order = [sums[orchestrator] for orchestrator in sorted(sums)]  # the same for everybody, as rows are held
    _ADD[conn.dialect.name].many(conn, in_order)
    _DROP_OLD.many(conn, [{"of": orchestrator, "before": now_us - KEPT_US} for orchestrator in sorted(sums)])


def spent(conn: Connection, orchestrator: str, now_us: int, *, day: bool = True, hour: bool = True) -> Spent:
    """What the windows that end now hold; without `day` (or `hour`) nothing is known of that one.

    A minute is in a window until all of it has left.
    """
    attempts_24h = attempts_1h = tokens_1h = 0
    usd_24h = 0.0
    if day:
        ((attempts_24h, _, usd_24h),) = _SUM.rows(conn, {"of": orchestrator, "since": _since(now_us, DAY_US)})
    if hour:
        ((attempts_1h, tokens_1h, _),) = _SUM.rows(conn, {"of": orchestrator, "since": _since(now_us, HOUR_US)})
    return Spent(
        usd_24h=float(usd_24h),
        tokens_1h=int(tokens_1h),
        mean_usd=float(usd_24h) / attempts_24h if attempts_24h else 0.0,
        mean_tokens=float(tokens_1h) / attempts_1h if attempts_1h else 0.0,
    )


def usd_frees_at(conn: Connection, orchestrator: str, *, over: float, now_us: int) -> int:
    """When more than `over` dollars of the last day will have left it."""
    return _frees_at(conn, orchestrator, over=over, column=2, window_us=DAY_US, now_us=now_us)


def tokens_free_at(conn: Connection, orchestrator: str, *, over: float, now_us: int) -> int:
    """When more than `over` tokens of the last hour will have left it."""
    return _frees_at(conn, orchestrator, over=over, column=1, window_us=HOUR_US, now_us=now_us)


def _frees_at(conn: Connection, orchestrator: str, *, over: float, column: int, window_us: int, now_us: int) -> int:
    """What runs is counted by its mean, so the whole window may not be enough: then it is a full window from now."""
    gone = 0.0
    for row in _OLDEST_FIRST.rows(conn, {"of": orchestrator, "since": _since(now_us, window_us)}):
        gone += row[column]
        if gone > over:
            return int(row[0]) + MINUTE_US + window_us
    return now_us + window_us


def _since(now_us: int, window_us: int) -> int:
    return now_us - window_us - MINUTE_US
