"""The door to a task's life: every function that changes or reads tasks, each to be run inside the store.

    task = await store.write(lambda conn: life.create_task(conn, new=..., dispatch=..., actor=..., now_us=...))

All take the transaction's Connection first; time (`now_us`), randomness and the actor come in as arguments. What they
raise is a TaskError of `errors`; the transaction (or the caller's part of it) is rolled back then.
"""

from __future__ import annotations

from orchestrator_fleet.tasks.change import (
    approve,
    assign,
    at_version,
    block,
    cancel,
    progress,
    purge,
    refuse_others,
    refuse_own_yes,
    reject,
    release,
    retry,
    set_status,
    unblock,
    update_task,
)
from orchestrator_fleet.tasks.claim import claim, claim_all
from orchestrator_fleet.tasks.create import Order, create_all, create_task
from orchestrator_fleet.tasks.finish import Report, finish, finish_all
from orchestrator_fleet.tasks.lease import (
    after_step,
    beat,
    expire_leases,
    heartbeat,
    hold_all,
    next_lease_expiry,
    reconcile_held,
)
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
    "Order",
    "Report",
    "after_step",
    "ahead_in_line",
    "append_log",
    "approve",
    "assign",
    "at_version",
    "attempts_of",
    "beat",
    "block",
    "cancel",
    "claim",
    "claim_all",
    "count_by_status",
    "count_events",
    "count_log",
    "create_all",
    "create_task",
    "events_of",
    "expire_leases",
    "finish",
    "finish_all",
    "get_task",
    "heartbeat",
    "hold_all",
    "list_tasks",
    "next_available",
    "next_lease_expiry",
    "progress",
    "purge",
    "read_log",
    "reconcile_held",
    "refuse_others",
    "refuse_own_yes",
    "reject",
    "release",
    "retry",
    "ripen",
    "set_status",
    "unblock",
    "update_task",
]
