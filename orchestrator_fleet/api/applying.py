"""A pass for somebody who asked: who waits is answered in time, the pass goes on, and its event says by whom it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from orchestrator_fleet import log
from orchestrator_fleet.api import reconciler
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.reconciler import Pass
from orchestrator_fleet.reconcile.fleet import Planned
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event

WAIT_S = 60.0  # clients give up not long after

_log = log.get(__name__)


def is_automatic(plane: Plane) -> bool:
    """Whether each change is applied without being asked for."""
    return bool(plane.control.doc.spec["control_plane"]["reconcile"] == "auto")


async def apply(
    plane: Plane, *, actor: str, only: Collection[str] | None = None, allow_deletes: bool = False
) -> Pass | None:
    """Plan and apply; None when that takes longer than WAIT_S, and goes on. Raises UsageError for an unknown `only`."""
    task = start(plane, actor=actor, only=only, allow_deletes=allow_deletes)
    await asyncio.wait({task}, timeout=WAIT_S)
    return task.result() if task.done() else None


def start(
    plane: Plane,
    *,
    actor: str,
    only: Collection[str] | None = None,
    allow_deletes: bool = False,
    unless: Callable[[Planned], str | None] = lambda _: None,
    is_news: Callable[[Pass], bool] = lambda _: True,
) -> asyncio.Task[Pass]:
    """Begin a pass; what came of it, if anything, is an event, unless that is no news."""

    async def tell(done: Pass) -> None:
        if done.result == reconciler.UNCHANGED or not is_news(done):
            return
        if done.good:
            _log.info("applied", actor=actor, summary=done.summary)
        else:
            _log.error("the fleet's files are not in force", actor=actor, result=done.result, problem=done.problem)
        await plane.store.write(lambda conn: outbox.append(conn, _event(plane, done, actor=actor)))
        plane.pulse.nudge()

    return plane.reconciler.start(only=only, allow_deletes=allow_deletes, unless=unless, then=tell)


def _event(plane: Plane, done: Pass, *, actor: str) -> Event:
    outcomes = done.report.outcomes.values() if done.report is not None else ()
    return Event(
        at_us=plane.clock.now_us(),
        kind="fleet_applied" if done.good else "fleet_not_applied",
        actor=actor,
        data={
            "result": done.result,
            "problem": done.problem or None,
            "summary": done.summary,
            "targets": {outcome.target: outcome.result.value for outcome in outcomes},
        },
    )


def told(done: Pass | None) -> dict[str, Any]:
    """What the answer to a change says of the pass that followed it: all that waited in git was applied with it."""
    if done is None:
        return {"result": "applying", "problem": None, "summary": ""}
    return {"result": done.result, "problem": done.problem or None, "summary": done.summary}
