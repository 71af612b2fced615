"""Routing applied: asks the pure router, with what the store knows of load and turns.

Made once per applied spec. How loaded everybody is is read at most once a second and counted on in between: a choice
of the least loaded needs no more, and a task's creation costs no count over the backlog.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.spec.units import parse_duration
from orchestrator_fleet.store import counters
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.tasks.backoff import RetryPolicy
from orchestrator_fleet.tasks.routing import Decision, Router

LOAD_AGE_US = SECOND_US

_WITH_STATUS = (
    sa.select(tasks.c.orchestrator, sa.func.count().label("many"))
    .where(tasks.c.status == sa.bindparam("status"), tasks.c.orchestrator.is_not(None))
    .group_by(tasks.c.orchestrator)
)


class Dispatch:
    """Where new tasks go, and how often they are tried there."""

    def __init__(self, *, router: Router, retry: Mapping[str, RetryPolicy] | None = None) -> None:
        self.router = router
        self._retry = dict(retry or {})
        # In one order for everybody, as they are held together.
        self._turning = sorted({rule.name for rule in router.rules if rule.strategy in ("round-robin", "weighted")})
        self._needs_load = router.needs_load()
        self._load: Counter[str] = Counter()
        self._load_read_us: int | None = None

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any]) -> Dispatch:
        """From the spec as JSON (`ControlDoc.spec`), its defaults merged."""
        retry = {name: retry_policy(fields.get("retry") or {}) for name, fields in spec["orchestrators"].items()}
        return cls(router=Router.of_spec(spec), retry=retry)

    def knows(self, orchestrator: str) -> bool:
        """Whether the spec declares it."""
        return orchestrator in self.router.candidates

    def retry(self, orchestrator: str | None) -> RetryPolicy:
        """The orchestrator's retry policy; the default one where none is declared."""
        return self._retry.get(orchestrator or "", RetryPolicy())

    def decide(self, conn: Connection, task: Mapping[str, Any], *, now_us: int) -> Decision:
        """Route a task that is being created in this transaction, and count it."""
        load = self._current_load(conn, now_us) if self._needs_load else Counter[str]()
        for name in self._turning:
            counters.hold(conn, _turn(name))
        sent = {name: counters.get(conn, _turn(name)) for name in self._turning}
        decision = self.router.route(task, load=load, sent=sent)
        if decision.orchestrator is not None:
            load[decision.orchestrator] += 1
        if decision.rule in self._turning:
            counters.put(conn, _turn(decision.rule), sent[decision.rule] + 1)
        return decision

    def _current_load(self, conn: Connection, now_us: int) -> Counter[str]:
        if self._load_read_us is None or not 0 <= now_us - self._load_read_us < LOAD_AGE_US:
            self._load = Counter()
            for status in ("TODO", "IN_PROGRESS"):
                self._load.update(
                    {row.orchestrator: row.many for row in conn.execute(_WITH_STATUS, {"status": status})}
                )
            self._load_read_us = now_us
        return self._load


def retry_policy(fields: Mapping[str, Any]) -> RetryPolicy:
    """`retry:` of the spec, its durations as the spec writes them (`2s`) or in seconds."""
    known = RetryPolicy()
    return RetryPolicy(
        max_attempts=fields.get("max_attempts", known.max_attempts),
        backoff_s=_seconds(fields.get("backoff", known.backoff_s)),
        backoff_max_s=_seconds(fields.get("backoff_max", known.backoff_max_s)),
        jitter=fields.get("jitter", known.jitter),
    )


def _seconds(value: str | float) -> float:
    return parse_duration(value) if isinstance(value, str) else float(value)


def _turn(rule: str) -> str:
    return f"route:{rule}"
