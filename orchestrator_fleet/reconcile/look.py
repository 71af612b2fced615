"""What every pass starts from: the spec, what is observed, and what ought to be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator_fleet.machines.connect import transports_for
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.between import residents
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.reconcile.observe import observe
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.render.bundle import Bundle, Desired
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.model import Fleet, Machine
from orchestrator_fleet.wire.machine import Observed


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at the fleet. `observed`: target -> what is there, or why that can't be told."""

    fleet: Fleet
    state: State
    desired: Desired
    observed: Mapping[str, Observed | str]

    def wanted(self, target: str) -> Bundle | None:
        """The target's bundle; None for a machine that fleet.yaml does not name."""
        return self.desired.control if target == CONTROL_PLANE else self.desired.machines.get(target)


@asynccontextmanager
async def opened(machines: Mapping[str, Machine], state: State) -> AsyncIterator[dict[str, Transport]]:
    """The ways to all targets, closed at the end: the declared `machines`, and what is left over of others."""
    transports = transports_for(machines, state)
    try:
        yield transports
    finally:
        for transport in transports.values():
            await transport.close()


async def look(fleet_file: Path) -> Look:
    """Load, observe and render; raises SpecInvalid.

    The files' content comes along for the targets that are to change, so that a plan can say what changes in them.
    """
    fleet, state = load_fleet(fleet_file), State(fleet_file)
    async with opened(fleet.file.machines, state) as transports:
        observed = await observe(transports, documents_for=lambda name: name == CONTROL_PLANE)
        desired = render(fleet, kept=residents(observed))
        changing = {name: way for name, way in transports.items() if _is_changing(desired, name, observed[name])}
        observed |= await observe(changing, documents_for=lambda _: True)
    return Look(fleet=fleet, state=state, desired=desired, observed=observed)


def _is_changing(desired: Desired, name: str, seen: Observed | str) -> bool:
    """Whether a machine has a generation now and is to have another, or none: what lives there may move."""
    if isinstance(seen, str) or seen.current is None or name == CONTROL_PLANE:
        return False
    bundle = desired.machines.get(name)
    return bundle is None or seen.current != bundle.digest
