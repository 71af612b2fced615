"""`/api/vps`, which is `/api/orchestrators` too: what is declared, and what is seen of it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from litestar import Request, Response, get, post
from sqlalchemy import Connection

from orchestrator_fleet.api import asking, once
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Text, Words, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.control import current_generation
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import Forbidden, TooMany
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Invalid, NotFound
from orchestrator_fleet.orchestrators import board, pause, presence
from orchestrator_fleet.orchestrators.access import Denied, KnownKey
from orchestrator_fleet.orchestrators.board import Board, Work
from orchestrator_fleet.tasks import gate
from orchestrator_fleet.tasks.gate import Binding
from orchestrator_fleet.tasks.rules import OrchestratorRules
from orchestrator_fleet.wire.documents import encode, sha256
from orchestrator_fleet.wire.http import Deactivate, ValidateKey, Why

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
    names = [
        name
        for name, spec in plane.control.orchestrators.items()
        if _matches(name, spec, plane.control.doc.placements.get(name), wanted=wanted, labels=labels, q=q or "")
    ]
    shown = [one for one in await _look(plane, names) if not wanted_status or one["status"] in wanted_status]
    keyed = sorted(((_sort_key(one, by), one) for one in shown), key=lambda pair: pair[0], reverse=descending)
    rest = [pair for pair in keyed if after is None or (pair[0] < after if descending else pair[0] > after)]
    some = rest[:limit]
    next_cursor = _write_cursor(by, some[-1][0]) if len(rest) > limit else None
    return asking.page([one for _, one in some], limit=limit, total=len(shown), next_cursor=next_cursor)


@get([f"{path}/{{vp:str}}" for path in PATHS], guards=_READ)
async def get_vp(plane: OfPlane, vp: str) -> Response[dict[str, Any]]:
    """One orchestrator."""
    check_there(plane, vp)
    (shown,) = await _look(plane, [vp])
    return Response(shown, headers={"ETag": f'"{shown["version"]}"'})


@post(
    [f"{path}/{{vp:str}}/activate" for path in PATHS],
    guards=_WRITE,
    dto=JsonBody[Why],
    return_dto=None,
    status_code=200,
)
async def activate_vp(
    request: Asked,
    plane: OfPlane,
    vp: str,
    data: Why = Why(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Let an orchestrator claim again: a pause, or a wait for a quota, ends now. Done twice it is done."""
    reason, actor, now_us = data.reason or None, request.auth.actor, plane.clock.now_us()

    def activate(conn: Connection) -> bool:
        return pause.activate(conn, orchestrator=vp, reason=reason, actor=actor, now_us=now_us)

    return await _switched(request, plane, vp, idempotency_key, activate)


@post(
    [f"{path}/{{vp:str}}/deactivate" for path in PATHS],
    guards=_WRITE,
    dto=JsonBody[Deactivate],
    return_dto=None,
    status_code=200,
)
async def deactivate_vp(
    request: Asked,
    plane: OfPlane,
    vp: str,
    data: Deactivate = Deactivate(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Let an orchestrator claim nothing, until a time or until it is activated. Done twice it is done.

    What runs is finished; with `drain: false` it is ended, and its tasks stand in line again.
    """
    reason, actor, now_us = data.reason or None, request.auth.actor, plane.clock.now_us()
    until_us = asking.instant("until", data.until)
    if until_us is not None and until_us <= now_us:
        raise Invalid([("until", f"got {to_rfc3339(until_us)}, wanted a time to come")])

    def deactivate(conn: Connection) -> bool:
        return pause.deactivate(
            conn, orchestrator=vp, reason=reason, until_us=until_us, drain=data.drain, actor=actor, now_us=now_us
        )

    return await _switched(request, plane, vp, idempotency_key, deactivate)


async def _switched(
    request: Asked, plane: Plane, vp: str, key: str | None, switch: Callable[[Connection], bool]
) -> Response[dict[str, Any]]:
    """Do it, and say what the orchestrator's status was and is."""
    check_there(plane, vp)
    if request.auth.owner in plane.control.orchestrators and not request.auth.claims_for(vp):
        raise Forbidden(f"the key of {request.auth.owner} acts for it alone; take a person's or a service's key")
    now_us = plane.clock.now_us()

    def write(conn: Connection) -> Reply:
        before = _shown(plane, vp, board.look(conn, [vp], now_us=now_us), now_us=now_us)
        changed = switch(conn)
        after = _shown(plane, vp, board.look(conn, [vp], now_us=now_us), now_us=now_us)
        told = {name: after[name] for name in ("id", "status", "status_reason", "paused")}
        return Reply(content={"changed": changed, **told, "previous": before["status"]})

    return await once.write(request, plane, key, write)


@post([f"{path}/validate" for path in PATHS], dto=JsonBody[ValidateKey], return_dto=None, status_code=200)
async def validate_key(request: Request[None, None, Any], plane: OfPlane, data: ValidateKey) -> dict[str, Any]:
    """Whether a key is good, and whose it is. Open to all, so it is limited by caller."""
    if not plane.validations.admit(request.client.host if request.client else ""):
        raise TooMany("too many keys were checked from here; wait a moment")
    known = await plane.authenticate(data.api_key)
    if isinstance(known, Denied):
        return {"valid": False, "reason": known.reason}
    if not all(known.allows(scope) for scope in data.required_scopes):
        return {"valid": False, "reason": "missing_scope"}
    return {"valid": True, "vp": known.owner, "key": _key(known)}


def _key(known: KnownKey) -> dict[str, Any]:
    expires = None if known.expires_us is None else to_rfc3339(known.expires_us)
    return {"id": known.id, "scopes": list(known.scopes), "expires_at": expires}


def check_there(plane: Plane, vp: str) -> None:
    """Raise NotFound unless the orchestrator is declared."""
    if vp not in plane.control.orchestrators:
        raise NotFound(f"there is no orchestrator {vp[:100]}")


async def _look(plane: Plane, names: Sequence[str]) -> list[dict[str, Any]]:
    now_us = plane.clock.now_us()
    seen = await plane.store.read(lambda conn: board.look(conn, names, now_us=now_us))
    return [_shown(plane, name, seen, now_us=now_us) for name in names]


def _shown(plane: Plane, name: str, of: Board, *, now_us: int) -> dict[str, Any]:
    spec, work = plane.control.orchestrators[name], of.work.get(name, Work())
    link = plane.links.get(name)
    seen = link.seen if link is not None else of.seen.get(name)
    bindings = _resting(plane, name, of, now_us=now_us)
    status, reason = _status(presence.status(seen, now_us=now_us), bindings)
    machine = plane.control.doc.placements.get(name)
    wanted = applied_generation(plane, machine)
    last_seen = None if seen is None or seen.last_seen_us is None else to_rfc3339(seen.last_seen_us)
    return {
        "id": name,
        "spec": spec,
        "status": status,
        "status_reason": reason,
        "paused": _paused(of, name),
        "machine": machine,
        "generation": wanted,
        "observed_generation": seen.generation if seen else None,
        "charter_version": plane.control.doc.charters.get(name),
        "conditions": presence.conditions(seen, status=status, reason=reason, generation=wanted),
        "sessions": work.sessions,
        "backlog": {
            "open": work.open,
            "in_progress": work.in_progress,
            "blocked": work.blocked,
            "overdue": work.overdue,
        },
        "last_seen_at": last_seen,
        "version": sha256(encode(spec))[:VERSION_CHARS],
    }


def _resting(plane: Plane, name: str, of: Board, *, now_us: int) -> Sequence[Binding]:
    """What keeps it from claiming, of what somebody decided or declared: pause, quota, hours."""
    only_hours = OrchestratorRules(hours=plane.control.rules.of(name).hours)
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


def _write_cursor(by: str, key: tuple[str, str]) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode((by, *key))).decode().rstrip("=")


def _read_cursor(text: str | None, by: str) -> tuple[str, str] | None:
    if text is None:
        return None
    wrong = Invalid([("cursor", "it is not a cursor of this list; take `next_cursor` of a page with the same sort")])
    try:
        sort, value, name = msgspec.json.decode(
            base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), type=tuple[str, str, str]
        )
    except (ValueError, msgspec.MsgspecError):
        raise wrong from None
    if sort != by:
        raise wrong
    return value, name


ROUTES = [list_vps, get_vp, activate_vp, deactivate_vp, validate_key]
