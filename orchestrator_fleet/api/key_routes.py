"""Keys of orchestrators: generated, rotated, revoked; and all keys, listed.

generate, rotate   the files, as a commit ▶ published, so in force here ▶ event and answer
revoke             the store, so in force everywhere ▶ the files, as a commit ▶ published ▶ answer
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from litestar import Response, delete, get, post
from sqlalchemy import Connection

from orchestrator_fleet import keys
from orchestrator_fleet.api import asking, authorship, declaring, issuing, once
from orchestrator_fleet.api.asking import Asked, Cursor, Limit, OfPlane, Text, acts, needs
from orchestrator_fleet.api.bodies import JsonBody
from orchestrator_fleet.api.issuing import Ask
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.problems import MissingScope
from orchestrator_fleet.api.task_routes import also
from orchestrator_fleet.api.vp_routes import PATHS, check_there
from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.errors import Conflict, Invalid, NotFound
from orchestrator_fleet.orchestrators import access, issue, keyring
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.orchestrators.issue import Entry, Section
from orchestrator_fleet.orchestrators.keyring import Use
from orchestrator_fleet.reconcile.declare import Change, Declaration, Declared, Edit
from orchestrator_fleet.wire.vps import CreateKey, RotateKey

NO_STORE = {"Cache-Control": "no-store"}  # a key is for who asked, and for no cache
_KEYS = [acts("keys:write")]
_PROPOSED = {202: also("Written to a branch; the key works once that is merged and applied.")}
_CURSOR = re.compile(r"(k-[0-9a-f]{8})\.(.+)")


@get("/keys", guards=[needs("keys:write")])
async def list_keys(plane: OfPlane, limit: Limit, owner: Text = None, cursor: Cursor = None) -> dict[str, Any]:
    """The declared keys that are in force, by owner: never their hashes. Daemons' own keys are not among them."""
    after = _read_cursor(cursor)
    used = plane.uses.newest(await plane.store.read(keyring.uses))
    section, now_us = _in_force(plane), plane.clock.now_us()
    shown = sorted(
        (_shown(plane, key, section[key.id], used.get(key.id), now_us=now_us) for key in plane.control.keys.values()),
        key=_place,
    )
    found = [one for one in shown if owner in (None, one["owner"])]
    rest = [one for one in found if after is None or _place(one) > after]
    next_cursor = f"{rest[limit - 1]['id']}.{rest[limit - 1]['owner']}" if len(rest) > limit else None
    return asking.page(rest[:limit], limit=limit, total=len(found), next_cursor=next_cursor)


@post(
    [f"{path}/{{vp:str}}/api-key" for path in PATHS],
    guards=_KEYS,
    dto=JsonBody[CreateKey],
    return_dto=None,
    responses=_PROPOSED,
)
async def create_key(
    request: Asked,
    plane: OfPlane,
    vp: str,
    data: CreateKey = CreateKey(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Generate a key of an orchestrator that has none, and show it, this once. It works when this is answered."""
    check_there(plane, vp)
    _may_give(request.auth, data.scopes)
    ask = await Ask.of(request, plane, idempotency_key)
    if (answered := await ask.before()) is not None:
        return answered
    now, name = _now(plane), _one_line(data.name)
    scopes = [scope for scope in keys.SCOPES if scope in data.scopes]
    expires = None if data.expires_in_days is None else issue.instant(issue.later(now, days=data.expires_in_days))
    entry = issue.entry(ask.minted, owner=vp, name=name, scopes=scopes, created=now, expires=expires)
    told = _told(ask.minted.id, entry)

    def make(found: Declaration) -> Sequence[Edit]:
        section = _section(found, vp)
        if ask.stands(section):
            told.update(_told(ask.minted.id, section[ask.minted.id]))
            return []
        if active := issue.active(section, vp, now=now, revoked=plane.revoked):
            raise Conflict(
                "key_exists",
                f"{vp} has an active key, {', '.join(active)}; rotate it, or revoke it before another is made",
            )
        return [Edit(section="keys", name=ask.minted.id, value=entry)]

    marks = [name] if name else []
    marks += [f"until {expires[:10]}"] if expires else []
    subject = authorship.subject(f"Create key {ask.minted.id} of {vp}", marks)
    async with plane.reconciler.declaring:
        done = await declaring.commit(plane, request, make=make, subject=subject, reason=data.reason)
        return await _give(ask, vp, done, told, kind="key_created", status=201, reason=data.reason)


@post(
    [f"{path}/{{vp:str}}/api-key/rotate" for path in PATHS],
    guards=_KEYS,
    dto=JsonBody[RotateKey],
    return_dto=None,
    status_code=200,
    responses=_PROPOSED,
)
async def rotate_key(
    request: Asked,
    plane: OfPlane,
    vp: str,
    data: RotateKey = RotateKey(),  # noqa: B008 - an immutable struct
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Another key in the place of the active one, with its scopes, its name and as long a life.

    The old one works for `overlap_s` more; no other that is still active works longer.
    """
    check_there(plane, vp)
    ask = await Ask.of(request, plane, idempotency_key)
    if (answered := await ask.before()) is not None:
        return answered
    now = _now(plane)
    ends = issue.later(now, seconds=data.overlap_s)
    told: dict[str, Any] = {}
    old: dict[str, Entry] = {}

    def make(found: Declaration) -> Sequence[Edit]:
        section = _section(found, vp)
        if ask.stands(section):
            told.update(_told_of_rotated(section, ask.minted.id))
            old.update(_ending(section, vp, by=told.get("previous_revoked_at")))
            return []
        old.update(issue.active(section, vp, now=now, revoked=plane.revoked))
        if not old:
            raise _none_active(vp)
        of = issue.newest(old)
        _may_give(request.auth, old[of]["scopes"])
        entry = issue.entry(
            ask.minted,
            owner=vp,
            name=old[of].get("name"),
            scopes=old[of]["scopes"],
            created=now,
            expires=issue.renewed(old[of], now=now),
        )
        told.update(_told(ask.minted.id, entry), previous={"id": of}, previous_revoked_at=issue.instant(ends))
        ending = [key_id for key_id, key in old.items() if not issue.ends_by(key, ends)]
        return [Edit(section="keys", name=ask.minted.id, value=entry), *_revoking(found, ending, at=ends)]

    def subject(_: Sequence[Change]) -> str:
        overlap = [f"the old one works until {issue.instant(ends)}"] if data.overlap_s else []
        return authorship.subject(f"Rotate key {told['previous']['id']} of {vp} to {ask.minted.id}", overlap)

    if not issue.active(_in_force(plane), vp, now=now, revoked=plane.revoked):
        raise _none_active(vp)
    async with plane.reconciler.declaring:
        done = await declaring.commit(plane, request, make=make, subject=subject, reason=data.reason)
        # What ends now ends everywhere, also where the files are not read.
        ended = access.declared(old).values() if not data.overlap_s and done.branch is None else ()
        return await _give(ask, vp, done, told, kind="key_rotated", status=200, reason=data.reason, ended=ended)


@delete([f"{path}/{{vp:str}}/api-key" for path in PATHS], guards=_KEYS, status_code=200)
async def revoke_key(
    request: Asked, plane: OfPlane, vp: str, reason: Text = None, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Revoke an orchestrator's active keys: at once and everywhere; then the files say so, where they can.

    A revocation that could not be committed stands; asked for again, it is committed if that goes now.
    """
    check_there(plane, vp)
    ask = await Ask.of(request, plane, idempotency_key)
    if (answered := await ask.before()) is not None:
        return answered
    now = _now(plane)
    in_force = access.declared(issue.active(_in_force(plane), vp, now=now, revoked=plane.revoked)).values()
    ended = {key.id for key in await _end(plane, in_force, actor=ask.actor, reason=reason)}
    async with plane.reconciler.declaring:
        done, problem = await _commit_revocation(ask, vp, now=now, reason=reason, any_new=bool(ended))
        changed = {change.name for change in done.changes} if done is not None else set()
        if not ended and not changed:
            raise _none_active(vp)
        committed = done is not None and done.branch is None
        if committed and changed:
            problem = await issuing.publish(plane)
    told: dict[str, Any] = {
        "revoked": sorted(ended | changed),
        "revoked_at": issue.instant(now),
        "committed": committed,
        "commit": done.commit if done is not None else None,
        "problem": problem,
    }
    if done is not None and done.branch is not None:
        told |= {"branch": done.branch, "diff": done.diff}
    then = issuing.event(
        plane,
        "key_revocation_declared",
        actor=ask.actor,
        orchestrator=vp,
        keys=sorted(changed),
        reason=reason,
        **{name: told.get(name) for name in ("commit", "branch")},
    )
    return await ask.answer(Reply(content=told), then=then if changed else None)


async def _commit_revocation(
    ask: Ask, vp: str, *, now: datetime, reason: str | None, any_new: bool
) -> tuple[Declared | None, str | None]:
    """Let the files say of every key of `vp` that it is revoked; what came of it, or why nothing did."""

    def make(found: Declaration) -> Sequence[Edit]:
        # Also those that were revoked before, when it could not be committed.
        return _revoking(found, issue.active(_section(found), vp, now=now, revoked=()), at=now)

    def subject(changes: Sequence[Change]) -> str:
        if len(changes) == 1:
            return f"Revoke key {changes[0].name} of {vp}"
        return authorship.subject(f"Revoke {len(changes)} keys of {vp}", [change.name for change in changes])

    if not any_new and _is_proposed(ask.plane):
        return None, None  # a branch says so already
    try:
        done = await declaring.commit(ask.plane, ask.request, make=make, subject=subject, reason=reason or "")
    except (Conflict, Invalid) as refused:
        return None, f"the revocation stands, but the fleet's files do not say so yet: {refused}"
    if done.branch is not None:
        return done, f"the revocation stands; the fleet's files say so once {done.branch} is merged"
    return done, None


async def _give(
    ask: Ask,
    vp: str,
    done: Declared,
    told: dict[str, Any],
    *,
    kind: str,
    status: int,
    reason: str,
    ended: Iterable[KnownKey] = (),
) -> Response[dict[str, Any]]:
    """Bring the new key into force, end the old ones, and answer."""
    plane = ask.plane
    problem = await issuing.publish(plane) if done.branch is None else None
    await _end(plane, ended, actor=ask.actor, reason=f"{told['id']} is in its place")
    told = {**told, "in_force": told["id"] in plane.control.keys, "commit": done.commit}
    if problem is not None:
        told["problem"] = problem
    data = {name: value for name, value in told.items() if name not in ("id", "problem")}
    if done.branch is not None:
        kind, status = "key_proposed", int(HTTPStatus.ACCEPTED)
        told |= {"branch": done.branch, "diff": done.diff}
        data["branch"] = done.branch
    then = issuing.event(
        plane, kind, actor=ask.actor, orchestrator=vp, key=told["id"], owner=vp, reason=reason or None, **data
    )
    return await ask.answer(Reply(content=told, status=status, headers=NO_STORE), then=then, shows_key=True)


async def _end(plane: Plane, found: Iterable[KnownKey], *, actor: str, reason: str | None) -> Sequence[KnownKey]:
    """Revoke keys in the store: in force here now, elsewhere with the event. Those that were not revoked before."""
    found, now_us = list(found), plane.clock.now_us()
    if not found:
        return []

    def write(conn: Connection) -> list[KnownKey]:
        return keyring.revoke(conn, found, reason=reason, actor=actor, now_us=now_us)

    new = await plane.store.write(write)
    plane.know_revoked({key.id: now_us for key in found})
    plane.pulse.nudge()
    return new


def _revoking(found: Declaration, key_ids: Iterable[str], *, at: datetime) -> list[Edit]:
    return [
        Edit(section="keys", name=key_id, value={**(found.raw("keys", key_id) or {}), "revoked": issue.instant(at)})
        for key_id in key_ids
    ]


def _section(found: Declaration, vp: str | None = None) -> Section:
    """The declared keys. Raises Conflict when `vp` has left the files since they were applied."""
    if vp is not None and vp not in found.fleet.orchestrators:
        raise Conflict("not_declared", f"{vp} is not in the fleet's files any more; the next apply removes it")
    section: Section = found.fleet.model_dump(mode="json", include={"keys"})["keys"]
    return section


def _in_force(plane: Plane) -> Section:
    section: Section = plane.control.doc.spec.get("keys") or {}
    return section


def _is_proposed(plane: Plane) -> bool:
    return bool(plane.control.doc.spec["control_plane"]["writes"] == "propose")


def _may_give(giver: KnownKey, scopes: Sequence[str]) -> None:
    """Raise MissingScope when a key would get what its giver has not."""
    lacking = [scope for scope in scopes if not giver.allows(scope)]
    if lacking:
        raise MissingScope(f"a key can't give what it has not: {', '.join(lacking)}; take a key that has it, or admin")


def _none_active(vp: str) -> NotFound:
    return NotFound(f"{vp} has no active key; POST /api/vps/{vp}/api-key makes one")


def _told(key_id: str, entry: Entry) -> dict[str, Any]:
    return {"id": key_id, "scopes": entry["scopes"], "expires_at": entry.get("expires")}


def _told_of_rotated(section: Section, key_id: str) -> dict[str, Any]:
    """What a rotation is answered that was cut off after its commit: the files have it all."""
    made = section[key_id]
    ending = {i: key for i, key in section.items() if key["owner"] == made["owner"] and key.get("revoked")}
    of = max(ending, key=lambda i: issue.moment(ending[i]["revoked"]), default=None)
    if of is None:
        return _told(key_id, made)
    return {**_told(key_id, made), "previous": {"id": of}, "previous_revoked_at": ending[of]["revoked"]}


def _ending(section: Section, vp: str, *, by: str | None) -> Section:
    """The keys of `vp` that a rotation has ended, or will."""
    return {i: key for i, key in section.items() if key["owner"] == vp and by is not None and key.get("revoked") == by}


def _shown(plane: Plane, key: KnownKey, entry: Entry, used: Use | None, *, now_us: int) -> dict[str, Any]:
    why = access.still_good(key, now_us=now_us, revoked=plane.revoked)
    ends = [us for us in (key.revoked_us, plane.revoked.get(key.id)) if us is not None]
    return {
        "id": key.id,
        "owner": key.owner,
        "name": entry.get("name"),
        "scopes": list(key.scopes),
        "state": why or "active",
        "created": entry.get("created"),
        "expires": entry.get("expires"),
        "revoked": to_rfc3339(min(ends)) if ends else None,
        "last_used_at": None if used is None else to_rfc3339(used.at_us),
        "last_used_from": None if used is None else used.address,
    }


def _place(shown: Mapping[str, Any]) -> tuple[str, str]:
    return shown["owner"], shown["id"]


def _read_cursor(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise Invalid([("cursor", "it is not a cursor of this list; take `next_cursor` of the page before")])
    return match[2], match[1]


def _one_line(name: str | None) -> str | None:
    """A name as a subject line and a YAML file can hold it."""
    return " ".join("".join(c if c.isprintable() else " " for c in name or "").split()) or None


def _now(plane: Plane) -> datetime:
    return datetime.fromtimestamp(plane.clock.now_us() // SECOND_US, tz=UTC)


ROUTES = [list_keys, create_key, rotate_key, revoke_key]
