"""What people do to orchestrators, in the transaction that asks for it: done, or begun, and written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.vp_routes import check_declared, shown
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.machines.connect import LOCAL
from orchestrator_fleet.orchestrators import actions, board, pause
from orchestrator_fleet.orchestrators.actions import Action, Kind
from orchestrator_fleet.tasks.bulk import savepoint

SHOWN = ("status", "status_reason", "paused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do to an orchestrator, at whose word. `until_us`: when a pause ends; without `drain` its sessions do."""

    action: Kind
    reason: str | None
    actor: str
    now_us: int
    until_us: int | None = None
    drain: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Did:
    """What came of it: its line in the log, and what the orchestrator showed before and after."""

    action: Action
    changed: bool | None
    before: Mapping[str, Any]
    after: Mapping[str, Any]


def show(plane: Plane, conn: Connection, vp: str, *, now_us: int) -> dict[str, Any]:
    """What an orchestrator shows of itself in this transaction: status, status_reason, paused.

    NotFound when it is declared no more.
    """
    control = plane.control  # on a thread of the store's: another may come into force meanwhile
    check_declared(control, vp)
    seen = shown(plane, control, vp, board.look(conn, [vp], now_us=now_us), now_us=now_us)
    return {name: seen[name] for name in SHOWN}


def begin_restart(conn: Connection, plane: Plane, vp: str, order: Order) -> Did:
    """Write down that a restart begins; Conflict `in_progress` while another goes on."""
    before = show(plane, conn, vp, now_us=order.now_us)
    action = actions.begin(
        conn,
        orchestrator=vp,
        action="restart",
        reason=order.reason,
        actor=order.actor,
        now_us=order.now_us,
        before=before,
    )
    return Did(action=action, changed=None, before=before, after=before)


def attempt(conn: Connection, plane: Plane, vp: str, order: Order) -> Did:
    """What would come of it; nothing is left of that."""
    with savepoint(conn, undo=True):
        if order.action == "restart":
            check_reachable(plane, vp)
            did = begin_restart(conn, plane, vp, order)
        else:
            did = do(conn, plane, vp, order)
    return Did(action=did.action, changed=did.changed or did.action.outcome is None, before=did.before, after=did.after)


def do(conn: Connection, plane: Plane, vp: str, order: Order) -> Did:
    """Do it, and write it down with what was before and is after."""
    before = show(plane, conn, vp, now_us=order.now_us)
    changed, detail, goes_on = _done(conn, vp, order)
    after = show(plane, conn, vp, now_us=order.now_us)
    write = actions.begin if goes_on else actions.note
    action = write(
        conn,
        orchestrator=vp,
        action=order.action,
        reason=order.reason,
        actor=order.actor,
        now_us=order.now_us,
        before=before,
        after=after,
        detail=detail,
    )
    return Did(action=action, changed=changed, before=before, after=after)


def _done(conn: Connection, vp: str, order: Order) -> tuple[bool, str, bool]:
    """(whether it changed anything, what it did, whether it goes on)."""
    by: dict[str, Any] = {"orchestrator": vp, "reason": order.reason, "actor": order.actor, "now_us": order.now_us}
    match order.action:
        case "activate" | "resume":
            changed = pause.activate(conn, **by)
            actions.activated(conn, vp, actor=order.actor, now_us=order.now_us)
            return changed, "it may claim again" if changed else "nothing held it", False
        case "stop_sessions":
            ended = pause.stop_sessions(conn, **by)
            return ended > 0, _sessions(ended), False
        case _:
            changed = pause.deactivate(conn, until_us=order.until_us, drain=order.drain, **by)
            running = len(pause.running(conn, vp))
            until = "it is activated" if order.until_us is None else to_rfc3339(order.until_us)
            claims = f"it claims nothing until {until}" if changed else "it was so already"
            if order.action == "drain" and running:
                return changed, f"{claims}; waits for {_counted(running)} to end", True
            return changed, f"{claims}; running: {_counted(running)}", False


def _sessions(ended: int) -> str:
    return f"{_counted(ended)} ended, the tasks stand in line again" if ended else "no session runs"


def _counted(sessions: int) -> str:
    return f"{sessions} session{'s' * (sessions != 1)}"


def check_reachable(plane: Plane, vp: str) -> tuple[str, str]:
    """(its machine, that one's address); Conflict `unreachable` when there is no way there from here."""
    machine = plane.control.doc.placements.get(vp)
    if machine is None:
        raise Conflict("unreachable", f"{vp} is placed on no machine; run `fleet apply`")
    address = plane.control.doc.spec["machines"].get(machine, {}).get("address", LOCAL)
    if address != LOCAL:
        raise Conflict("unreachable", f"{machine}: {address}: this version reaches only `address: local` machines")
    return machine, address
