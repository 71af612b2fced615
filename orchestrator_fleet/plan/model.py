"""A plan as a value: what apply does is exactly this list, and what people read is rendered from it."""

from __future__ import annotations

from typing import Any

import msgspec

CONTROL_PLANE = "control-plane"


class FieldChange(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """One field: `+` added, `-` removed, `~` changed. Long texts and secrets never stand here."""

    op: str
    path: str
    before: Any = None
    after: Any = None


class Action(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """One step.

    `target`: a machine, or `control-plane`. `subject`: an orchestrator, a key (`key:k-...`), a route (`route:name`),
    another section of fleet.yaml, or a path.
    `kind`: start, stop, restart, reload (files change, the process stays), write, prune, no-op. There is one action
    for a subject of a target. `prune` of a machine takes it down: nothing of the fleet stays on it.
    `change`: what sort of change it is: orchestrator_added, orchestrator_removed, moved, program, not_running,
    charter_wording, authority_gained, authority_lost, key_added, key_removed, key_revoked, key_rotated, key_changed,
    routing, limits, settings, drift, runtime, unconfirmed (current, but never confirmed healthy), machine_removed,
    none. Authority gained goes before all others, whatever the kind, so that nothing hides it.
    """

    target: str
    subject: str
    kind: str
    change: str
    reason: str
    fields: tuple[FieldChange, ...] = ()


class Target(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """One machine (or the control plane) of a plan.

    `fingerprint` is of the observed state the plan was made against; apply refuses when it differs.
    `problem` says why the target could not be observed; nothing is planned for it then.
    """

    name: str
    observed: str | None
    desired: str | None
    fingerprint: str
    problem: str = ""


class Summary(msgspec.Struct, kw_only=True, frozen=True):
    """How many actions of each kind, and how many machines.

    `machines` have something to do, `unchanged` have nothing, the rest are `unreachable`.
    """

    start: int = 0
    stop: int = 0
    restart: int = 0
    reload: int = 0
    write: int = 0
    prune: int = 0
    unchanged: int = 0
    machines: int = 0
    unreachable: int = 0


class Plan(msgspec.Struct, kw_only=True, frozen=True):
    """Everything that one apply would do. `id` is the digest of all the rest but `created_at`."""

    version: int = 1
    id: str
    fleet: str
    created_at: str
    tool: str
    revision: str
    targets: tuple[Target, ...]
    actions: tuple[Action, ...]
    summary: Summary
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do (and every target could be looked at)."""
        return all(action.kind == "no-op" for action in self.actions) and not any(t.problem for t in self.targets)
