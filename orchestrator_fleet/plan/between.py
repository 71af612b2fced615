"""Desired x observed -> Plan: pure, and the only place that decides what an apply does.

The controller observes, asks here, and does what the plan says; when it was interrupted it observes again. So
each difference is found from what is seen now, never from what was done before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from orchestrator_fleet import __version__
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Protected, Refused
from orchestrator_fleet.plan import control, machine
from orchestrator_fleet.plan.changes import digest_shown
from orchestrator_fleet.plan.machine import Seen, Whereabouts
from orchestrator_fleet.plan.model import CONTROL_PLANE, Action, Plan, Summary, Target
from orchestrator_fleet.render.bundle import Bundle, Desired
from orchestrator_fleet.wire.documents import CONTROL, encode, sha256
from orchestrator_fleet.wire.machine import Observed

TOOL = f"orchestrator_fleet {__version__}"
ID_CHARACTERS = 16
MIN_DELETES_REFUSED = 2
MAX_NAMED = 5
_KINDS = ("stop", "start", "restart", "reload", "write", "prune", "no-op")


class _Placements(msgspec.Struct, kw_only=True, frozen=True):
    """The one field of control.json that is needed here; the spec, which is large, isn't decoded."""

    placements: dict[str, str]


def make_plan(
    *,
    desired: Desired,
    observed: Mapping[str, Observed | str],
    fleet: str,
    revision: str,
    now_us: int,
    max_deletes: float,
    drift: str = "correct",
) -> Plan:
    """What an apply would do now.

    `observed`: target -> what was seen (with `documents` where its generation is not the desired one), or why it
    could not be; machines that are in it and not in `desired` are taken down. `max_deletes`: the share of the
    orchestrators seen that may be deleted at once (1.0 allows all). `drift`: correct, warn or ignore.

    Raises `Protected` when somebody protected would be deleted, `Refused` when too many would be.
    """
    seen = {name: machine.read(state) for name, state in observed.items() if isinstance(state, Observed)}
    problems = {name: state for name, state in observed.items() if isinstance(state, str)}
    names = [CONTROL_PLANE, *sorted((desired.machines.keys() | observed.keys()) - {CONTROL_PLANE})]
    problems.update((name, "it was not looked at") for name in names if name not in observed)
    where = Whereabouts(before=_residents(seen, observed.get(CONTROL_PLANE)), after=_places(desired))
    _guard_deletes(seen, where, max_deletes)

    targets, actions = [], []
    for name in names:
        bundle = _bundle_of(desired, name)
        if name in seen:
            found = _actions(name, bundle, seen, where, correct_drift=drift == "correct")
            if bundle is None and not found:
                continue
            actions += sorted(found, key=lambda action: (_KINDS.index(action.kind), action.subject))
        targets.append(_target(name, bundle, seen.get(name), problems.get(name, "")))
    notes = tuple(_notes(desired, seen, drift))
    plan = Plan(
        id="",
        fleet=fleet,
        created_at="",
        tool=TOOL,
        revision=revision,
        targets=tuple(targets),
        actions=tuple(actions),
        summary=summarise(targets, actions),
        notes=notes,
    )
    return msgspec.structs.replace(plan, id=plan_id(plan), created_at=to_rfc3339(now_us))


def plan_id(plan: Plan) -> str:
    """16 hex digits over all of the plan but its own id and `created_at`."""
    return sha256(encode(msgspec.structs.replace(plan, id="", created_at="")))[:ID_CHARACTERS]


def fingerprint(observed: Observed) -> str:
    """What a plan depends on: generation, changes by hand, and the programs' states. No pids, times or links."""
    programs = {
        name: (program.state, program.program, program.generation) for name, program in observed.programs.items()
    }
    by_hand = (sorted(observed.drifted), sorted(observed.missing), sorted(observed.foreign), sha256(observed.manifest))
    return sha256(encode((observed.current, observed.last_good, by_hand, observed.supervisord, programs)))


def residents(observed: Mapping[str, Observed | str]) -> dict[str, str]:
    """Orchestrator -> the machine it is on now: what `render` keeps.

    Machines that can't be asked are filled in from the control plane's document, when it was observed with its
    documents: what lives there is not placed a second time elsewhere.
    """
    seen = {name: machine.read(state) for name, state in observed.items() if isinstance(state, Observed)}
    return _residents(seen, observed.get(CONTROL_PLANE))


def _residents(seen: Mapping[str, Seen], control_plane: Observed | str | None) -> dict[str, str]:
    last_known = _last_known(control_plane)
    before = {program: place for program, place in last_known.items() if place not in seen}
    machines = [(name, state) for name, state in sorted(seen.items()) if name != CONTROL_PLANE]
    # A generation says more than a process that an interrupted apply left behind; of two generations, the one
    # that was told to the control plane counts.
    for name, state in machines:
        before.update(dict.fromkeys(state.observed.programs, name))
    for name, state in machines:
        before.update(dict.fromkeys(state.manifest.programs if state.manifest else (), name))
    for name, state in machines:
        named = state.manifest.programs if state.manifest else ()
        before.update((program, name) for program in named if last_known.get(program) == name)
    return before


def _last_known(state: Observed | str | None) -> dict[str, str]:
    document = state.documents.get(CONTROL) if isinstance(state, Observed) else None
    try:
        return msgspec.json.decode(document, type=_Placements).placements if document is not None else {}
    except msgspec.DecodeError:
        return {}


def _places(desired: Desired) -> dict[str, str]:
    return {program: name for name, bundle in desired.machines.items() for program in bundle.manifest.programs}


def _bundle_of(desired: Desired, name: str) -> Bundle | None:
    return desired.control if name == CONTROL_PLANE else desired.machines.get(name)


def _guard_deletes(seen: Mapping[str, Seen], where: Whereabouts, max_deletes: float) -> None:
    manifests = [state.manifest for state in seen.values() if state.manifest is not None]
    known = {program for manifest in manifests for program in manifest.programs}
    gone = sorted(known - where.after.keys())
    protected = sorted({program for manifest in manifests for program in manifest.protected} - where.after.keys())
    if protected:
        raise Protected(
            f"the plan would delete {_listed(protected)}, marked protect: true; put "
            f"{'them' if len(protected) > 1 else 'it'} back with protect: false, apply, and delete then"
        )
    if len(gone) >= MIN_DELETES_REFUSED and len(gone) > max_deletes * len(known):
        raise Refused(
            f"the plan would delete {len(gone)} of {len(known)} orchestrators ({_listed(gone)}), "
            f"rollout.max_deletes allows {max_deletes:.0%}; when you mean it, raise rollout.max_deletes or pass "
            "--allow-deletes"
        )


def _actions(
    name: str, bundle: Bundle | None, seen: Mapping[str, Seen], where: Whereabouts, *, correct_drift: bool
) -> list[Action]:
    if bundle is None:
        return machine.takedown(name=name, here=seen[name], where=where)
    if name != CONTROL_PLANE:
        return machine.actions(name=name, bundle=bundle, seen=seen, where=where, correct_drift=correct_drift)
    observed = seen[name].observed
    if observed.current is None:
        return [machine.first_written(bundle)]
    if observed.current != bundle.digest:
        return control.between(observed.documents.get(CONTROL), bundle.files[CONTROL])
    reason = f"generation {digest_shown(bundle.digest)} is current"
    nothing = Action(target=name, subject=name, kind="no-op", change="none", reason=reason)
    return list(machine.files(name, bundle, seen[name], correct_drift=correct_drift)) or [nothing]


def _target(name: str, bundle: Bundle | None, state: Seen | None, problem: str) -> Target:
    return Target(
        name=name,
        observed=state.observed.current if state else None,
        desired=bundle.digest if bundle else None,
        fingerprint=fingerprint(state.observed) if state else "",
        problem=problem,
    )


def summarise(targets: Iterable[Target], actions: Iterable[Action]) -> Summary:
    """Count what a plan does, by kind and by machine."""
    busy = {action.target for action in actions if action.kind != "no-op"}
    machines = [target for target in targets if target.name != CONTROL_PLANE]
    counts = dict.fromkeys(_KINDS, 0)
    for action in actions:
        counts[action.kind] += 1
    del counts["no-op"]
    return Summary(
        **counts,
        machines=sum(target.name in busy for target in machines),
        unchanged=sum(target.name not in busy and not target.problem for target in machines),
        unreachable=sum(bool(target.problem) for target in machines),
    )


def _notes(desired: Desired, seen: Mapping[str, Seen], drift: str) -> Iterable[str]:
    for name in sorted(seen):
        observed, bundle = seen[name].observed, _bundle_of(desired, name)
        if bundle is None:
            continue
        if bundle.digest in observed.rejected and observed.current != bundle.digest:
            why = observed.rejected[bundle.digest]
            yield f"{name}: generation {digest_shown(bundle.digest)} was tried before and did not get healthy: {why}"
        by_hand = machine.drift(observed)
        if by_hand and observed.current != bundle.digest and drift != "ignore":
            yield f"{name}: the new generation replaces changes made by hand to {_listed([p for p, _ in by_hand])}"
        elif by_hand and drift == "warn":
            yield f"{name}: changed by hand and left so (rollout.drift: warn): {_listed([p for p, _ in by_hand])}"


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
