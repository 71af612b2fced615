"""Declared orchestrators made, changed and deleted: edits of the YAML, committed with the caller as author.

    what stands in git ─▶ checks ─▶ commit ─▶ event (a delete: tasks move) ─▶ apply, if asked for ─▶ the answer is kept

An answer that was kept is given again to the same `Idempotency-Key`. Where the control plane was killed before it was
kept, the same request finds that git has what it wanted, says so, and does the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from litestar import Response, delete, post, put
from litestar.params import Parameter
from sqlalchemy import Connection

from orchestrator_fleet.api import applying, asking, authorship, declaring, once, wanted
from orchestrator_fleet.api.asking import Asked, OfPlane, Text, acts, needs
from orchestrator_fleet.api.bodies import document_of
from orchestrator_fleet.api.once import Reply
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.api.reconciler import Pass
from orchestrator_fleet.api.spec_schema import Declaring, Replacing
from orchestrator_fleet.api.task_routes import also
from orchestrator_fleet.api.vp_routes import PATHS, look, version_of
from orchestrator_fleet.errors import Conflict, Invalid, NotFound, SpecInvalid
from orchestrator_fleet.plan import changes
from orchestrator_fleet.plan.model import FieldChange
from orchestrator_fleet.reconcile.declare import Change, Declaration, Declared, Edit, NewFile
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.tasks import bulk
from orchestrator_fleet.tasks.bulk import Order
from orchestrator_fleet.tasks.queries import Filters
from orchestrator_fleet.wire.documents import encode

MAX_NAMED = 5
MAX_VALUE_CHARS = 24
MAX_ROUNDS = 1_000  # of MAX_BULK tasks each

_WRITE = [needs("fleet:write")]
_OWN = [acts("fleet:write")]
_PROPOSED = {202: also("Written to a branch, to be merged by a person; nothing else has changed.")}
_OPEN = ("TODO", "IN_PROGRESS", "BLOCKED")

Apply = Annotated[bool, Parameter(description="Apply it now; what else waits in the fleet's files is applied too.")]


@dataclass(slots=True, kw_only=True)
class _Found:
    """What `make` saw under the lock, and what it decided."""

    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    differences: Sequence[FieldChange] = field(default_factory=tuple)


@post(list(PATHS), guards=_WRITE, operation_class=Declaring, responses=_PROPOSED)
async def declare_vp(
    *, request: Asked, plane: OfPlane, apply: Apply = False, reason: Text = None, idempotency_key: once.Key = None
) -> Response[dict[str, Any]]:
    """Declare an orchestrator: its entry in fleet.yaml, and with `charter_text` its charter, as one commit."""
    asking.check_for_all(request.auth)
    declaring.refuse_writes(plane)
    ask = await once.keyed(request, plane, idempotency_key)
    body = document_of(await request.body())
    new = await asyncio.to_thread(wanted.read_new, plane, body)
    saw = _Found()

    def make(found: Declaration) -> Sequence[Edit | NewFile]:
        if found.raw(wanted.SECTION, new.name) is not None:
            saw.after = wanted.spec_of(found.fleet, new.name)
            if ask is not None and wanted.reads_as(new, saw.after, found):
                return []
            raise Conflict("name_taken", f"{new.name}: is declared already; take another name, or PUT to change it")
        saw.after = wanted.tried(plane, new, found)
        return wanted.edits(new, found)

    def subject(_: Sequence[Change]) -> str:
        return f"Add orchestrator {new.name} ({(saw.after or {})['discipline']})"

    async with plane.reconciler.declaring:
        if (answered := await once.answered(plane, ask)) is not None:
            return answered
        done = await declaring.commit(plane, request, make=make, subject=subject, reason=reason or "")
        await _tell(plane, request, new.name, done, kind="orchestrator_declared", reason=reason)
        _note(plane, new.name, done, saw.after)
    ran = await _applied(plane, request, done, wanted=apply)
    headers = {"Location": f"/api/vps/{new.name}"}
    reply = await _declared(plane, new.name, saw, done, ran, status=201, headers=headers)
    return await once.keep(plane, ask, reply)


@put([f"{path}/{{vp:str}}" for path in PATHS], guards=_OWN, operation_class=Replacing, responses=_PROPOSED)
async def replace_vp(
    *,
    request: Asked,
    plane: OfPlane,
    vp: str,
    if_match: Annotated[
        str | None, Parameter(header="If-Match", description="The version that was read, or *. Required.")
    ] = None,
    apply: Apply = False,
    reason: Text = None,
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Replace an orchestrator's spec. What is left out takes its default; what GET showed as `spec` changes nothing.

    The version is compared with what git has, which may be newer than what is in force: nobody's edit is overwritten.
    """
    if if_match is None:
        raise Conflict(
            "precondition_required", f"{vp}: send If-Match with the ETag that you read, so that no edit gets lost"
        )
    declaring.refuse_writes(plane)
    ask = await once.keyed(request, plane, idempotency_key)
    body = document_of(await request.body())
    new = await asyncio.to_thread(wanted.read_spec, plane, vp, body)
    saw = _Found()

    def make(found: Declaration) -> Sequence[Edit | NewFile]:
        if found.raw(wanted.SECTION, vp) is None:
            _refuse_unknown(plane, vp)
            raise Conflict("not_declared", f"{vp}: git has it no more, and the next apply removes it; POST declares it")
        saw.before = wanted.spec_of(found.fleet, vp)
        version = version_of(saw.before)
        repeated = ask is not None and wanted.reads_as(new, saw.before, found)
        if not _matches(if_match, version) and not repeated:
            raise Conflict("stale", _stale(plane, vp, saw.before, version))
        saw.after = wanted.tried(plane, new, found)
        saw.differences = changes.between(saw.before, saw.after)
        return wanted.edits(new, found)

    def subject(_: Sequence[Change]) -> str:
        return authorship.subject(f"Change {vp}", [_difference(one) for one in saw.differences])

    async with plane.reconciler.declaring:
        if (answered := await once.answered(plane, ask)) is not None:
            return answered
        done = await declaring.commit(plane, request, make=make, subject=subject, reason=reason or "")
        await _tell(plane, request, vp, done, kind="orchestrator_changed", reason=reason)
        _note(plane, vp, done, saw.after)
    ran = await _applied(plane, request, done, wanted=apply)
    return await once.keep(plane, ask, await _declared(plane, vp, saw, done, ran, status=200, headers={}))


@delete([f"{path}/{{vp:str}}" for path in PATHS], guards=_OWN, status_code=200, responses=_PROPOSED)
async def remove_vp(
    *,
    request: Asked,
    plane: OfPlane,
    vp: str,
    reassign_to: Annotated[str | None, Parameter(max_length=63, description="Who gets its open tasks.")] = None,
    cancel_open: Annotated[bool, Parameter(description="Cancel its open tasks.")] = False,
    apply: Apply = False,
    reason: Text = None,
    idempotency_key: once.Key = None,
) -> Response[dict[str, Any]]:
    """Take an orchestrator out of the fleet, its keys with it; its open tasks go to another, or are cancelled."""
    declaring.refuse_writes(plane)
    ask = await once.keyed(request, plane, idempotency_key)
    order = _order(plane, vp, reassign_to=reassign_to, cancel_open=cancel_open, reason=reason)
    saw = _Found()

    def make(found: Declaration) -> Sequence[Edit | NewFile]:
        saw.before = found.raw(wanted.SECTION, vp)
        if saw.before is None:
            _refuse_unknown(plane, vp)
            return []  # git has it no more; the next apply removes it
        _refuse_protected(plane, vp, found)
        _refuse_gone(vp, reassign_to, found)
        keys = [key_id for key_id, key in found.fleet.keys.items() if key.owner == vp]
        _refuse_referenced(plane, vp, keys, found)
        gone = [Edit(section="keys", name=key_id, value=None) for key_id in keys]
        return [Edit(section=wanted.SECTION, name=vp, value=None), *gone]

    async with plane.reconciler.declaring:
        if (answered := await once.answered(plane, ask)) is not None:
            return answered
        if order is None:
            await _refuse_open_tasks(plane, vp)
        done = await declaring.commit(
            plane, request, make=make, subject=f"Remove orchestrator {vp}", reason=reason or ""
        )
        await _tell(plane, request, vp, done, kind="orchestrator_removed", reason=reason)
        _note(plane, vp, done, None)
        moved = 0 if order is None or done.branch else await _move_tasks(plane, vp, order, actor=request.auth.actor)
    ran = await _applied(plane, request, done, wanted=apply)
    if done.branch is not None:
        return await once.keep(plane, ask, _proposed(vp, done))
    verb = "reassigned" if reassign_to is not None else "cancelled"
    content = {
        "deleted": vp,
        **_of_commit(done, ran),
        "applied": vp not in plane.control.orchestrators and (ran is None or ran.good),
        "tasks": {} if order is None else {verb: moved},
    }
    return await once.keep(plane, ask, Reply(content=content))


# --- deciding -------------------------------------------------------------------------------------------------


def _matches(if_match: str, version: str) -> bool:
    told = [one.strip().removeprefix("W/").strip('"') for one in if_match.split(",")]
    return "*" in told or version in told


def _stale(plane: Plane, vp: str, declared: Mapping[str, Any], version: str) -> str:
    if plane.control.orchestrators.get(vp) == declared:
        return f"{vp}: it is at version {version} now; read it again, and repeat the change on that"
    return (
        f"{vp}: git has a newer version, {version}, than what is in force; apply that, read it again, and repeat the "
        "change on it"
    )


def _refuse_unknown(plane: Plane, vp: str) -> None:
    if vp not in plane.control.orchestrators:
        raise NotFound(f"there is no orchestrator {vp[:100]}")


def _refuse_protected(plane: Plane, vp: str, found: Declaration) -> None:
    in_force = plane.control.orchestrators.get(vp, {})
    if found.fleet.orchestrators[vp].protect:
        raise Conflict("protected", f"{vp}: has protect: true; PUT it with protect: false and apply that first")
    if in_force.get("protect"):
        raise Conflict("protected", f"{vp}: is protected until the change that lifts that is applied; apply it first")


def _refuse_gone(vp: str, reassign_to: str | None, found: Declaration) -> None:
    if reassign_to is not None and reassign_to not in found.fleet.orchestrators:
        raise Invalid([("reassign_to", f"got {reassign_to}, which git has no more; name another than {vp}")])


def _refuse_referenced(plane: Plane, vp: str, keys: Sequence[str], found: Declaration) -> None:
    entries: dict[str, dict[str, Any]] = {wanted.SECTION: {vp: None}}
    if keys:
        entries["keys"] = dict.fromkeys(keys)
    try:
        declaring.tried(plane, now=found.fleet, entries=entries, files={})
    except SpecInvalid as wrong:
        places = "; ".join(f"{one.path or one.file}: {one.problem}" for one in wrong.diagnostics)
        raise Conflict("referenced", f"{vp}: the fleet would not be sound without it: {places}") from None


def _order(plane: Plane, vp: str, *, reassign_to: str | None, cancel_open: bool, reason: str | None) -> Order | None:
    why = f"{vp} was removed" + (f": {reason}" if reason else "")
    if reassign_to is None:
        return Order(action="cancel", reason=why) if cancel_open else None
    wrong = []
    if cancel_open:
        wrong.append(("cancel_open", "goes without reassign_to; keep one"))
    if reassign_to == vp:
        wrong.append(("reassign_to", f"got {vp} itself; name another"))
    elif reassign_to not in plane.control.orchestrators:
        wrong.append(("reassign_to", f"there is no orchestrator {reassign_to}"))
    if wrong:
        raise Invalid(wrong)
    return Order(action="assign", orchestrator=reassign_to, reason=why)


def _difference(change: FieldChange) -> str:
    """`sessions.max 2 -> 4`, `labels.team added`: as much as fits into a commit's first line."""
    before, after = _short(change.before), _short(change.after)
    if change.op == "~" and before and after:
        return f"{change.path} {before} -> {after}"
    return f"{change.path} {({'+': 'added', '-': 'removed'}).get(change.op, 'changed')}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else encode(value).decode().strip()
    fits = len(text) <= MAX_VALUE_CHARS and text.isprintable() and not isinstance(value, list | dict)
    return text if fits else ""


# --- acting ---------------------------------------------------------------------------------------------------


def _note(plane: Plane, vp: str, done: Declared, after: Mapping[str, Any] | None) -> None:
    """From now on GET shows what was committed, with the version that the next PUT has to name."""
    if done.branch is not None:
        return
    plane.pending.put(vp, after)
    plane.board = None


async def _tell(plane: Plane, request: Asked, vp: str, done: Declared, *, kind: str, reason: str | None) -> None:
    """The event of what was committed, or proposed."""
    if not done.changed:
        return
    own = next((change for change in done.changes if change.name == vp), None)
    event = Event(
        at_us=plane.clock.now_us(),
        kind=kind if done.branch is None else "orchestrator_proposed",
        actor=request.auth.actor,
        orchestrator=vp,
        data={
            "commit": done.commit,
            "branch": done.branch,
            "files": list(done.files),
            "before": own.before if own else None,
            "after": own.after if own else None,
            "keys": [change.name for change in done.changes if change.section == "keys"],
            "reason": reason or None,
        },
    )
    await plane.store.write(lambda conn: outbox.append(conn, event))
    plane.pulse.nudge()


async def _refuse_open_tasks(plane: Plane, vp: str) -> None:
    chosen = await plane.store.read(lambda conn: bulk.choose(conn, filters=_open_of(vp)))
    if chosen.matched:
        some = ", ".join(chosen.ids[:MAX_NAMED])
        raise Conflict(
            "has_open_tasks",
            f"{vp}: has {chosen.matched} open tasks ({some}{', ...' if chosen.matched > MAX_NAMED else ''}); say "
            "reassign_to=<orchestrator> or cancel_open=true",
        )


async def _move_tasks(plane: Plane, vp: str, order: Order, *, actor: str) -> int:
    """Reassign or cancel all that is open, a bounded batch a transaction; how many."""
    moved = 0
    for _ in range(MAX_ROUNDS):
        chosen = await plane.store.read(lambda conn: bulk.choose(conn, filters=_open_of(vp)))
        now_us, dispatch = plane.clock.now_us(), plane.control.dispatch

        def move(conn: Connection, ids: Sequence[str] = chosen.ids, now_us: int = now_us) -> int:
            done = bulk.do(conn, ids, order, dispatch=dispatch, actor=actor, now_us=now_us)  # noqa: B023 - called now
            return sum(one.changed for one in done)

        changed = await plane.store.write(move) if chosen.ids else 0
        plane.pulse.nudge()
        moved += changed
        if not changed:
            break  # none are left, or none of those left can be moved
    return moved


def _open_of(vp: str) -> Filters:
    return Filters(orchestrator=(vp,), status=_OPEN)


async def _applied(plane: Plane, request: Asked, done: Declared, *, wanted: bool) -> _Ran | None:
    """Apply, where that is asked for or goes by itself; None where it is not."""
    if done.branch is not None or not (wanted or applying.is_automatic(plane)):
        return None
    return _Ran(done=await applying.apply(plane, actor=request.auth.actor))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ran:
    """The pass after a commit; `done` is None while it goes on."""

    done: Pass | None

    @property
    def good(self) -> bool:
        """Whether it is over, and the machines are what the files say."""
        return self.done is not None and self.done.good


def _of_commit(done: Declared, ran: _Ran | None) -> dict[str, Any]:
    """What every answer says of the commit and of the pass that followed it."""
    told: dict[str, Any] = {"changed": done.changed, "commit": done.commit, "files": list(done.files)}
    if ran is not None:
        told |= {"applying": ran.done is None, "apply": applying.told(ran.done)}
    return told


def _proposed(vp: str, done: Declared) -> Reply:
    content = {"id": vp, "branch": done.branch, "commit": done.commit, "diff": done.diff, "files": list(done.files)}
    return Reply(content=content, status=202)


async def _declared(
    plane: Plane,
    vp: str,
    saw: _Found,
    done: Declared,
    ran: _Ran | None,
    *,
    status: int,
    headers: Mapping[str, str],
) -> Reply:
    """The orchestrator as it is declared now; where it is in force, with what is seen of it."""
    if done.branch is not None:
        return _proposed(vp, done)
    spec = saw.after or {}
    shown: dict[str, Any] = {"id": vp}
    in_force = plane.control.orchestrators.get(vp)
    if in_force is not None:
        (shown,) = await look(plane, [vp])
    version = version_of(spec)
    content = {
        **shown,
        "spec": spec,
        "version": version,
        **_of_commit(done, ran),
        "applied": in_force == spec and (ran is None or ran.good),
    }
    return Reply(content=content, status=status, headers={**headers, "ETag": f'"{version}"'})


ROUTES: list[Any] = [declare_vp, replace_vp, remove_vp]
