"""What to do on one machine: its generation and its programs, as they are and as they ought to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from orchestrator_fleet.plan import difference
from orchestrator_fleet.plan.changes import digest_shown
from orchestrator_fleet.plan.difference import Difference
from orchestrator_fleet.plan.model import Action, FieldChange
from orchestrator_fleet.render.bundle import SUPERVISORD_CONF, Bundle
from orchestrator_fleet.wire.documents import MANIFEST, Manifest, sha256
from orchestrator_fleet.wire.machine import Observed, ProgramSeen

RUNS = frozenset({"STARTING", "RUNNING"})
MAX_DRIFT_SHOWN = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A target that could be looked at; `manifest` is None when there is none, or it is not one."""

    observed: Observed
    manifest: Manifest | None

    @property
    def programs(self) -> frozenset[str]:
        """What the generation names and what supervisord has."""
        return frozenset(self.observed.programs).union(self.manifest.programs if self.manifest else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Orchestrator -> machine, as far as can be seen, and as it ought to be."""

    before: Mapping[str, str]
    after: Mapping[str, str]


def read(observed: Observed) -> Seen:
    """Take the manifest out of what was observed."""
    try:
        manifest = msgspec.json.decode(observed.manifest, type=Manifest) if observed.manifest else None
    except msgspec.DecodeError:
        manifest = None
    return Seen(observed=observed, manifest=manifest)


def actions(
    *, name: str, bundle: Bundle, seen: Mapping[str, Seen], where: Whereabouts, correct_drift: bool
) -> list[Action]:
    """Everything to do on machine `name`, no-ops with their reasons among it; `seen` has all machines."""
    here = seen[name]
    found = [
        *(_stop(name, program, here, where) for program in sorted(here.programs - bundle.manifest.programs.keys())),
        *(_run(name, program, bundle, seen, where) for program in bundle.manifest.programs),
        *files(name, bundle, here, correct_drift=correct_drift),
    ]
    if any(action.kind != "no-op" for action in found):
        return found
    why = _why_written(bundle, here)
    if why is not None:
        return [*found, why]
    count = len(bundle.manifest.programs)
    runs = f"{count} program{'s run' if count != 1 else ' runs'}" if count else "it has no programs"
    return [_nothing(name, name, f"generation {digest_shown(bundle.digest)} is current, {runs}")]


def takedown(*, name: str, here: Seen, where: Whereabouts) -> list[Action]:
    """Everything to do on a machine that fleet.yaml no longer names; nothing where there is nothing."""
    observed = here.observed
    if observed.current is None and not observed.generations and not here.programs and observed.supervisord == "DOWN":
        return []
    reason = "fleet.yaml no longer names this machine"
    prune = Action(target=name, subject=name, kind="prune", change="machine_removed", reason=reason)
    return [*(_stop(name, program, here, where) for program in sorted(here.programs)), prune]


def files(name: str, bundle: Bundle, here: Seen, *, correct_drift: bool) -> Iterator[Action]:
    """What was changed by hand in the generation that ought to be there, and supervisord's own file."""
    if here.observed.current != bundle.digest:
        had = here.manifest.files.get(SUPERVISORD_CONF) if here.manifest else None
        if had is not None and had != bundle.manifest.files.get(SUPERVISORD_CONF):
            reason = "supervisord reads it when it starts the next time"
            yield Action(target=name, subject=SUPERVISORD_CONF, kind="write", change="runtime", reason=reason)
    elif correct_drift:
        drifted = drift(here.observed)
        for path, reason in drifted[:MAX_DRIFT_SHOWN]:
            yield Action(target=name, subject=path, kind="write", change="drift", reason=reason)
        if len(drifted) > MAX_DRIFT_SHOWN:
            reason = f"{len(drifted) - MAX_DRIFT_SHOWN} more files were changed by hand"
            yield Action(target=name, subject="more files", kind="write", change="drift", reason=reason)


def drift(observed: Observed) -> list[tuple[str, str]]:
    """(path, what was done to it by hand) in the current generation."""
    found = [(path, "it was changed by hand") for path in observed.drifted]
    found += [(path, "it is gone") for path in observed.missing]
    found += [(path, "it is not ours") for path in observed.foreign]
    told = any(path == MANIFEST for path, _ in found)
    if observed.current is not None and not told and sha256(observed.manifest) != observed.current:
        found.append((MANIFEST, "it was changed by hand" if observed.manifest else "it is gone"))
    return found


def first_written(bundle: Bundle) -> Action:
    """Write the first generation of a target that has nothing to start."""
    reason = "nothing is applied here yet"
    return Action(target=bundle.manifest.target, subject=MANIFEST, kind="write", change="settings", reason=reason)


def _why_written(bundle: Bundle, here: Seen) -> Action | None:
    """A reason to write the generation although no program has anything to do."""
    observed, name, digest = here.observed, bundle.manifest.target, digest_shown(bundle.digest)
    if observed.current is None:
        return first_written(bundle)
    if observed.current != bundle.digest:
        reason, change = f"generation {digest_shown(observed.current)} -> {digest}", "settings"
    elif observed.last_good != observed.current and bundle.manifest.programs:
        reason, change = f"generation {digest} is current, but was never confirmed healthy", "unconfirmed"
    else:
        return None
    return Action(target=name, subject=MANIFEST, kind="write", change=change, reason=reason)


def _stop(name: str, program: str, here: Seen, where: Whereabouts) -> Action:
    elsewhere = where.after.get(program)
    if elsewhere is not None:
        change, reason = "moved", f"it moves to {elsewhere}"
        fields: tuple[FieldChange, ...] = (FieldChange(op="~", path="placed on", before=name, after=elsewhere),)
    elif here.manifest is not None and program in here.manifest.programs:
        change, reason, fields = "orchestrator_removed", "fleet.yaml no longer names it", ()
    else:
        change, reason, fields = "drift", "it runs, but no generation names it", ()
    return Action(target=name, subject=program, kind="stop", change=change, reason=reason, fields=fields)


def _run(name: str, program: str, bundle: Bundle, seen: Mapping[str, Seen], where: Whereabouts) -> Action:
    """The one action for a program that ought to run here."""
    here = seen[name]
    process = here.observed.programs.get(program)
    had = here.manifest is not None and program in here.manifest.programs
    unreadable = here.manifest is None and here.observed.current is not None
    if not had and process is None and not unreadable:
        return _begin(name, program, bundle, seen, where)
    stale = here.observed.current != bundle.digest
    differs = (
        difference.between(name=program, seen=here.observed, manifest=here.manifest, bundle=bundle)
        if stale and had
        else difference.NONE
    )
    down = _why_down(here.observed, process)
    if down or process is None:
        reason = "; ".join(filter(None, (down, differs.program, differs.reason)))
        return _act(name, program, differs, kind="start", change=differs.rather("not_running"), reason=reason)
    runs = process.program or (here.manifest.programs[program] if had and here.manifest else None)
    wanted = bundle.manifest.programs[program]
    if runs != wanted:
        return _restart(name, program, differs, f"it runs as {runs}, wanted {wanted}")
    if differs is not difference.NONE:
        return _act(name, program, differs, kind="reload", change=differs.change, reason=differs.reason)
    if not stale and process.generation != bundle.digest:
        read_last = digest_shown(process.generation) if process.generation else "none yet"
        reason = f"it has read generation {read_last}, current is {digest_shown(bundle.digest)}"
        return _act(name, program, differs, kind="reload", change="runtime", reason=reason)
    return _nothing(name, program, "it runs, and its files stay the same")


def _begin(name: str, program: str, bundle: Bundle, seen: Mapping[str, Seen], where: Whereabouts) -> Action:
    """Start one that is not here yet; when it comes from another machine, say what else changes."""
    origin = where.before.get(program, name)
    if origin == name:
        fields = difference.profile(program, bundle)
        return Action(
            target=name,
            subject=program,
            kind="start",
            change="orchestrator_added",
            reason="a new orchestrator",
            fields=fields,
        )
    there = seen.get(origin)
    if there is None:
        reason = f"it moves here from {origin}, which cannot be asked whether it still runs there"
        return _act(name, program, difference.NONE, kind="start", change="moved", reason=reason)
    differs = difference.between(name=program, seen=there.observed, manifest=there.manifest, bundle=bundle)
    reason = "; ".join(filter(None, (f"it moves here from {origin}", differs.program, differs.authority.reason)))
    return _act(name, program, differs, kind="start", change=differs.rather("moved"), reason=reason)


def _restart(name: str, program: str, differs: Difference, otherwise: str) -> Action:
    why = differs.program or differs.runtime or otherwise
    change = "runtime" if differs.runtime and not differs.program else "program"
    reason = "; ".join(filter(None, (why, differs.authority.reason)))
    return _act(name, program, differs, kind="restart", change=differs.rather(change), reason=reason)


def _why_down(observed: Observed, process: ProgramSeen | None) -> str:
    """Why a program does not run, with supervisord's word for it; nothing when it runs."""
    if observed.supervisord != "RUNNING":
        return "supervisord is down"
    if process is None:
        return "supervisord does not have it"
    if process.state in RUNS:
        return ""
    return f"it is {process.state}{f' ({process.detail})' if process.detail else ''}"


def _act(name: str, program: str, differs: Difference, *, kind: str, change: str, reason: str) -> Action:
    return Action(target=name, subject=program, kind=kind, change=change, reason=reason, fields=differs.fields)


def _nothing(name: str, subject: str, reason: str) -> Action:
    return Action(target=name, subject=subject, kind="no-op", change="none", reason=reason)
