"""`/api/vps`, which is `/api/orchestrators` too: what is declared, and what is seen of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from litestar import Request, Response, get, post

from orchestrator_fleet.api import asking
from orchestrator_fleet.api.asking import Cursor, Limit, OfPlane, Text, Words, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.control import Control, current_generation
from orchestrator_fleet.api.door import network_of
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import TooMany
from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.errors import NotFound
from orchestrator_fleet.orchestrators import actions, board, presence
from orchestrator_fleet.orchestrators.access import Denied, KnownKey
from orchestrator_fleet.orchestrators.board import Board, Work
from orchestrator_fleet.tasks import gate
from orchestrator_fleet.tasks.gate import Binding
from orchestrator_fleet.tasks.rules import OrchestratorRules
from orchestrator_fleet.wire import cursor as cursors
from orchestrator_fleet.wire.cursor import SAME_SORT
from orchestrator_fleet.wire.documents import encode, sha256
from orchestrator_fleet.wire.http import ValidateKey

PATHS = ("/vps", "/orchestrators")
STATUSES = (presence.ONLINE, presence.BUSY, presence.AWAY, presence.OFFLINE)
VERSION_CHARS = 12

Sort = Literal["name", "discipline", "machine", "status"]
Order = Literal["asc", "desc"]

_READ, _WRITE = [needs("fleet:read")], [needs("fleet:write")]


@get(list(PATHS), guards=_READ)
async def list_vps(
    *,
    plane: OfPlane,
    limit: Limit,
    status: Words = None,
    discipline: Words = None,
    label: Words = None,
    machine: Words = None,
    q: Text = None,
    sort: Text = None,
    order: Text = None,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """Declared orchestrators with what is seen of them, all of one moment."""
    query = asking.Query()
    by = query.one_of("sort", sort, among=Sort, default="name")
    descending = query.one_of("order", order, among=Order, default="asc") == "desc"
    wanted_status = query.words("status", status, among=STATUSES)
    wanted = {"discipline": query.words("discipline", discipline), "machine": query.words("machine", machine)}
    labels = _labels(query.words("label", label))
    query.check()
    after = _read_cursor(cursor, by)
    found = [
        one
        for one in await _look_at_all(plane)
        if _matches(one["id"], one["spec"], one["machine"], wanted=wanted, labels=labels, q=q or "")
        and (not wanted_status or one["status"] in wanted_status)
    ]
    keyed = sorted(((_sort_key(one, by), one) for one in found), key=lambda pair: pair[0], reverse=descending)
    rest = [pair for pair in keyed if after is None or (pair[0] < after if descending else pair[0] > after)]
    some = rest[:limit]
    next_cursor = cursors.write((by, *some[-1][0])) if len(rest) > limit else None
    return asking.page([one for _, one in some], limit=limit, total=len(found), next_cursor=next_cursor)


@get([f"{path}/{{vp:str}}" for path in PATHS], guards=_READ)
async def get_vp(plane: OfPlane, vp: str) -> Response[dict[str, Any]]:
    """One orchestrator."""
    if vp not in plane.declared:
        raise NotFound(f"there is no orchestrator {vp[:100]}")
    (found,) = await look(plane, [vp])
    return Response(found, headers={"ETag": f'"{found["version"]}"'})


@post([f"{path}/validate" for path in PATHS], dto=JsonBody[ValidateKey], return_dto=None, status_code=200)
async def validate_key(request: Request[None, None, Any], plane: OfPlane, data: ValidateKey) -> dict[str, Any]:
    """Whether a key is good, and whose it is: `vp` where that is an orchestrator. Open to all, so limited by caller."""
    caller = network_of(request.client.host if request.client else None)
    if not plane.validations.admit(caller):
        wait_s = plane.validations.wait_s(caller)
        raise TooMany("too many keys were checked from here; wait a moment", retry_after_s=wait_s)
    known = await plane.authenticate(data.api_key)
    if isinstance(known, Denied):
        return {"valid": False, "reason": known.reason}
    if not all(known.allows(scope) for scope in data.required_scopes):
        return {"valid": False, "reason": "missing_scope"}
    vp = known.owner if known.is_orchestrators else None
    return {"valid": True, "vp": vp, "owner": known.owner, "key": _key(known)}


def _key(known: KnownKey) -> dict[str, Any]:
    expires = None if known.expires_us is None else to_rfc3339(known.expires_us)
    return {"id": known.id, "scopes": list(known.scopes), "expires_at": expires}


def version_of(spec: Mapping[str, Any]) -> str:
    """The version of an orchestrator's spec, defaults merged: what its ETag says."""
    return sha256(encode(spec))[:VERSION_CHARS]


def check_there(plane: Plane, vp: str) -> None:
    """Raise NotFound unless the orchestrator is declared."""
    check_declared(plane.control, vp)


def check_declared(control: Control, vp: str) -> None:
    """Raise NotFound unless this generation declares the orchestrator."""
    if vp not in control.orchestrators:
        raise NotFound(f"there is no orchestrator {vp[:100]}")


async def _look_at_all(plane: Plane) -> Sequence[dict[str, Any]]:
    """All declared orchestrators as the API shows them: made anew when anything moved, and each second."""
    second = plane.clock.now_us() // SECOND_US
    version = plane.store.version()
    links = tuple((name, link.seen) for name, link in plane.links.items())
    known = (version, plane.control.generation, links, second)
    if version is None or plane.board is None or plane.board[0] != known:
        plane.board = known, await look(plane, list(plane.declared))
    return plane.board[1]


async def look(plane: Plane, names: Sequence[str]) -> list[dict[str, Any]]:
    """These orchestrators as the API shows them, all of one moment."""
    control, now_us = plane.control, plane.clock.now_us()
    seen = await plane.store.read(lambda conn: board.look(conn, names, now_us=now_us))
    return [shown(plane, control, name, seen, now_us=now_us) for name in names]


def shown(plane: Plane, control: Control, name: str, of: Board, *, now_us: int) -> dict[str, Any]:
    """An orchestrator as the API shows it; `control` declares it, and may not be in force any more.

    `spec` is what the files have; `applied` says whether that is in force.
    """
    in_force = control.orchestrators.get(name)
    spec, work = plane.declared.get(name) or in_force or {}, of.work.get(name, Work())
    link = plane.links.get(name)
    seen = link.seen if link is not None else of.seen.get(name)
    bindings = _resting(control, name, of, now_us=now_us)
    status, reason = _status(presence.status(seen, now_us=now_us), bindings)
    machine = control.doc.placements.get(name)
    wanted = applied_generation(plane, machine)
    last_seen = None if seen is None or seen.last_seen_us is None else to_rfc3339(seen.last_seen_us)
    return {
        "id": name,
        "spec": spec,
        "applied": spec == in_force,
        "status": status,
        "status_reason": reason,
        "paused": _paused(of, name),
        "machine": machine,
        "generation": wanted,
        "observed_generation": seen.generation if seen else None,
        "charter_version": control.doc.charters.get(name),
        "conditions": presence.conditions(seen, status=status, reason=reason, generation=wanted),
        "sessions": work.sessions,
        "actions": [actions.to_json(one) for one in of.actions.get(name, ())],
        "backlog": {
            "open": work.open,
            "in_progress": work.in_progress,
            "blocked": work.blocked,
            "overdue": work.overdue,
        },
        "last_seen_at": last_seen,
        "version": version_of(spec),
    }


def _resting(control: Control, name: str, of: Board, *, now_us: int) -> Sequence[Binding]:
    """What keeps it from claiming, of what somebody decided or declared: pause, quota, hours."""
    only_hours = OrchestratorRules(hours=control.rules.of(name).hours)
    return gate.decide(rules=only_hours, seen=gate.Seen(holds=of.held.get(name, ())), now_us=now_us).bindings


def _status(observed: tuple[str, str], bindings: Sequence[Binding]) -> tuple[str, str]:
    """(status, why): AWAY when it is to rest, whatever is seen of its daemon, which is told as well."""
    status, reason = observed
    said = "; ".join([*(binding.reason for binding in bindings), reason])
    return (presence.AWAY if any(binding.kind in ("pause", "schedule") for binding in bindings) else status), said


def _paused(of: Board, name: str) -> dict[str, Any] | None:
    hold = next((hold for hold in of.held.get(name, ()) if hold.kind == "pause"), None)
    if hold is None:
        return None
    until = None if hold.until_us is None else to_rfc3339(hold.until_us)
    return {"by": hold.by, "reason": hold.reason, "until": until}


def applied_generation(plane: Plane, machine: str | None) -> str | None:
    """The generation in force on a machine that is on this host; None on any other."""
    declared = plane.control.doc.spec["machines"].get(machine or "")
    if machine is None or declared is None or declared.get("address", "local") != "local":
        return None
    return current_generation(Path(declared["root"]) if declared.get("root") else plane.machine_root(machine))


def _labels(given: Sequence[str]) -> dict[str, str | None]:
    """`team=platform` -> {"team": "platform"}; `team` alone -> {"team": None}, any value."""
    return {name: value if found else None for name, found, value in (text.partition("=") for text in given)}


def _matches(
    name: str,
    spec: Mapping[str, Any],
    machine: str | None,
    *,
    wanted: Mapping[str, tuple[str, ...]],
    labels: Mapping[str, str | None],
    q: str,
) -> bool:
    has = spec.get("labels") or {}
    text = f"{name} {spec.get('role') or ''} {spec.get('discipline') or ''}".lower()
    return (
        (not wanted["discipline"] or spec.get("discipline") in wanted["discipline"])
        and (not wanted["machine"] or machine in wanted["machine"])
        and all(label in has and value in (None, has[label]) for label, value in labels.items())
        and q.lower() in text
    )


def _sort_key(shown: Mapping[str, Any], by: str) -> tuple[str, str]:
    value = {
        "name": shown["id"],
        "discipline": shown["spec"].get("discipline"),
        "machine": shown["machine"],
        "status": shown["status"],
    }[by]
    return value or "", shown["id"]


def _read_cursor(text: str | None, by: str) -> tuple[str, str] | None:
    if text is None:
        return None
    sort, value, name = cursors.read(text, tuple[str, str, str], of=SAME_SORT)
    if sort != by:
        raise cursors.wrong(of=SAME_SORT)
    return value, name


ROUTES = [list_vps, get_vp, validate_key]
