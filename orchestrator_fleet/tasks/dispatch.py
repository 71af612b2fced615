"""Routing applied: asks the pure router, with what the store knows of load and turns.

Made once per applied spec. How loaded everybody is is read at most once a second, and so seldom that the reading takes
at most one part in LOAD_SHARE of the time; what is routed in between is counted on. A count over 100,000 waiting tasks
takes 6 ms on SQLite, one over a million 0.1 s: the first is as fresh as a second, the other as ten.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.spec.units import parse_duration
from orchestrator_fleet.store import counters
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks.backoff import RetryPolicy
from orchestrator_fleet.tasks.routing import TURNING, Decision, Router

LOAD_AGE_US = SECOND_US
LOAD_SHARE = 100

_WITH_STATUS = Statement(
    sa.select(tasks.c.orchestrator, sa.func.count())
    .where(tasks.c.status == sa.bindparam("status"), tasks.c.orchestrator.is_not(None))
    .group_by(tasks.c.orchestrator)
)


class Dispatch:
    """Where new tasks go, and how often they are tried there."""

    def __init__(self, *, router: Router, retry: Mapping[str, RetryPolicy] | None = None, fingerprint: int = 0) -> None:
        self.router = router
        self.fingerprint = fingerprint
        self._retry = dict(retry or {})
        # In one order for everybody, as they are held together.
        self._turning = sorted({rule.name for rule in router.rules if rule.strategy in TURNING})
        self._needs_load = router.needs_load()
        self._load: Counter[str] = Counter()
        self._load_until_us: int | None = None
        self._load_read_us = 0

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any]) -> Dispatch:
        """From the spec as JSON (`ControlDoc.spec`), its defaults merged."""
        retry = {name: retry_policy(fields.get("retry") or {}) for name, fields in spec["orchestrators"].items()}
        return cls(router=Router.of_spec(spec), retry=retry, fingerprint=_fingerprint(spec))

    def knows(self, orchestrator: str) -> bool:
        """Whether the spec declares it."""
        return orchestrator in self.router.candidates

    def retry(self, orchestrator: str | None) -> RetryPolicy:
        """The orchestrator's retry policy; the default one where none is declared."""
        return self._retry.get(orchestrator or "", RetryPolicy())

    def decide(self, conn: Connection, task: Mapping[str, Any], *, now_us: int, with_: str | None = None) -> Decision:
        """Route a task that is being written in this transaction, and count it.

        `with_`: who has it now, and keeps it where the rule that matches leaves a choice.
        """
        load = self._current_load(conn, now_us) if self._needs_load else Counter[str]()
        turns = _Turns(conn, self._turning)
        decision = self.router.route(task, load=load, sent=turns, with_=with_)
        if decision.orchestrator is None or decision.orchestrator == with_:
            return decision
        load[decision.orchestrator] += 1
        if with_ is not None:
            load[with_] -= 1
        if decision.rule in turns.asked:
            counters.put(conn, _turn(decision.rule), turns.asked[decision.rule] + 1)
        return decision

    def _current_load(self, conn: Connection, now_us: int) -> Counter[str]:
        """Open tasks by orchestrator. With several writers (PostgreSQL) a count may be off by a few."""
        if self._load_until_us is None or not self._load_read_us <= now_us < self._load_until_us:
            began = time.perf_counter()
            load: Counter[str] = Counter()
            for status in ("TODO", "IN_PROGRESS"):
                load.update(dict(_WITH_STATUS.rows(conn, {"status": status})))
            took_us = round((time.perf_counter() - began) * SECOND_US)
            self._load, self._load_read_us = load, now_us
            self._load_until_us = now_us + max(LOAD_AGE_US, took_us * LOAD_SHARE)
        return self._load


class _Turns(Mapping[str, int]):
    """How many tasks each rule that goes in turn has sent. Read when a rule asks; nobody else turns from then on."""

    def __init__(self, conn: Connection, names: list[str]) -> None:
        self._conn, self._names = conn, names
        self.asked: dict[str, int] = {}

    def __getitem__(self, rule: str) -> int:
        if rule not in self._names:
            raise KeyError(rule)
        if not self.asked:
            for name in self._names:
                counters.hold(self._conn, _turn(name))
        self.asked[rule] = counters.get(self._conn, _turn(rule))
        return self.asked[rule]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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


def _fingerprint(spec: Mapping[str, Any]) -> int:
    """A number of all that decides where a task goes: another one means that waiting tasks may belong elsewhere."""
    who = {
        name: [fields.get("discipline"), sorted((fields.get("labels") or {}).items())]
        for name, fields in sorted(spec["orchestrators"].items())
    }
    rules = [{name: value for name, value in rule.items() if name != "tests"} for rule in spec.get("routing") or []]
    digest = hashlib.sha256(msgspec.json.encode([who, rules], order="sorted")).digest()
    return int.from_bytes(digest[:8], "big") >> 2 or 1
