"""The audit: the events of changes that somebody asked for over HTTP, as a question to history. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

_COLUMNS = (
    "id",
    "strftime(happened_at AT TIME ZONE 'UTC', '%Y-%m-%dT%H:%M:%S.%fZ') AS at",
    "kind",
    "actor",
    "data ->> '$.by.owner' AS owner",
    "data ->> '$.by.address' AS address",
    "orchestrator",
    "task",
    "data ->> '$.reason' AS reason",
    "data ->> '$.commit' AS commit",
    "data -> '$.before' AS before",
    "coalesce(data -> '$.after', data -> '$.task', data -> '$.coordination') AS after",
)

Question = tuple[str, list[Any]]
"""A query with its parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What of the audit is wanted; None is all. `since` is RFC 3339."""

    key: str | None = None
    owner: str | None = None
    kind: str | None = None
    orchestrator: str | None = None
    task: str | None = None
    since: str | None = None


def page(asked: Asked, *, before: int | None) -> Question:
    """The question for its entries, newest first; `before` is the id of the last one that is known already."""
    where, params = _where(asked)
    older = "" if before is None else " AND id < ?"
    text = f"SELECT {', '.join(_COLUMNS)} FROM events WHERE {where}{older} ORDER BY id DESC"  # noqa: S608 (constants)
    return text, params if before is None else [*params, before]


def count(asked: Asked) -> Question:
    """The question for how many entries there are."""
    where, params = _where(asked)
    return f"SELECT count(*) FROM events WHERE {where}", params  # noqa: S608 (constants)


def _where(asked: Asked) -> Question:
    wanted = [
        ("actor = ?", asked.key),
        ("(data ->> '$.by.owner') = ?", asked.owner),
        ("kind = ?", asked.kind),
        ("orchestrator = ?", asked.orchestrator),
        ("task = ?", asked.task),
        ("happened_at >= ?::TIMESTAMPTZ", asked.since),
    ]
    given = [(term, value) for term, value in wanted if value is not None]
    asked_for = "(data ->> '$.by.owner') IS NOT NULL"
    return " AND ".join([asked_for, *(term for term, _ in given)]), [value for _, value in given]


def entry(row: Sequence[Any]) -> dict[str, Any]:
    """A row of the answer as the API shows it."""
    event, at, kind, key, owner, address, orchestrator, task, reason, commit, before, after = row
    return {
        "id": event,
        "at": at,
        "kind": kind,
        "key": key,
        "owner": owner,
        "address": address,
        "orchestrator": orchestrator,
        "task": task,
        "reason": reason,
        "commit": commit,
        "before": _value(before),
        "after": _value(after),
    }


def _value(found: Any) -> Any:
    return msgspec.json.decode(found) if isinstance(found, str) else found
