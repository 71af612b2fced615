"""The door to a task's life: every function that changes or reads tasks, each to be run inside the store.

    task = await store.write(lambda conn: life.create_task(conn, new=..., dispatch=..., actor=..., now_us=...))

All take the transaction's Connection first; time (`now_us`), randomness and the actor come in as arguments. What they
raise is a TaskError of `errors`; the transaction (or the caller's part of it) is rolled back then.
"""

from __future__ import annotations

from orchestrator_fleet.tasks.change import (
    assign,
    block,
    cancel,
    progress,
    purge,
    release,
    retry,
    set_status,
    unblock,
    update_task,
)
from orchestrator_fleet.tasks.claim import claim, running
from orchestrator_fleet.tasks.create import create_task, reroute_unrouted
from orchestrator_fleet.tasks.finish import finish
from orchestrator_fleet.tasks.lease import beat, expire_leases, heartbeat, next_lease_expiry, reconcile_held
from orchestrator_fleet.tasks.output import append_log, count_log, read_log
from orchestrator_fleet.tasks.queries import (
    ahead_in_line,
    attempts_of,
    count_by_status,
    count_events,
    events_of,
    get_task,
    list_tasks,
)
from orchestrator_fleet.tasks.ripen import next_available, ripen

__all__ = [
    "ahead_in_line",
    "append_log",
    "assign",
    "attempts_of",
    "beat",
    "block",
    "cancel",
    "claim",
    "count_by_status",
    "count_events",
    "count_log",
    "create_task",
    "events_of",
    "expire_leases",
    "finish",
    "get_task",
    "heartbeat",
    "list_tasks",
    "next_available",
    "next_lease_expiry",
    "progress",
    "purge",
    "read_log",
    "reconcile_held",
    "release",
    "reroute_unrouted",
    "retry",
    "ripen",
    "running",
    "set_status",
    "unblock",
    "update_task",
]
