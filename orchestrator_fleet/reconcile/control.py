"""Publishing what the control plane works by, besides `fleet apply`: at its first start, and when a key is made."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from orchestrator_fleet.errors import FleetError, MachineError
from orchestrator_fleet.machines.local import LocalTransport
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.reconcile.leases import held
from orchestrator_fleet.reconcile.observe import observe_one
from orchestrator_fleet.reconcile.rollout import asked
from orchestrator_fleet.reconcile.staging import stage
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.render.bundle import Bundle
from orchestrator_fleet.render.control import control_bundle
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.model import Fleet
from orchestrator_fleet.wire.documents import CONTROL, ControlDoc
from orchestrator_fleet.wire.machine import Confirm, Observed, Switch


def ensure_published(fleet_file: Path, *, holder: str = "fleet serve") -> str:
    """The digest of the control plane's current generation; where nothing was applied, fleet.yaml is published first.

    Raises SpecInvalid when that is needed and fleet.yaml is wrong, LeaseHeld when an apply is at it.
    """
    return asyncio.run(_ensure_published(fleet_file, holder=holder))


async def _ensure_published(fleet_file: Path, *, holder: str) -> str:
    transport = _transport(State(fleet_file))
    try:
        seen = await _seen(transport)
        if seen.current is not None:
            return seen.current
        bundle = render(load_fleet(fleet_file)).control
        await publish(transport, bundle, holder=holder)
        return bundle.digest
    finally:
        await transport.close()


def publish_keys(fleet_file: Path, *, holder: str = "fleet key") -> str | None:
    """Bring the keys of fleet.yaml, and nothing else of it, to the control plane; the new generation's digest.

    None when nothing was ever applied: the first apply brings them. Raises SpecInvalid, LeaseHeld, MachineError.
    """
    return asyncio.run(_publish_keys(fleet_file, holder=holder))


async def _publish_keys(fleet_file: Path, *, holder: str) -> str | None:
    transport = _transport(State(fleet_file))
    try:
        seen = await _seen(transport)
        if seen.current is None:
            return None
        bundle = control_bundle(_with_keys(seen, load_fleet(fleet_file)))
        if bundle.digest != seen.current:
            await publish(transport, bundle, holder=holder)
        return bundle.digest
    finally:
        await transport.close()


def _with_keys(seen: Observed, fleet: Fleet) -> ControlDoc:
    try:
        doc = msgspec.json.decode(seen.documents.get(CONTROL, b""), type=ControlDoc)
    except (msgspec.MsgspecError, ValueError) as error:
        raise FleetError(f"the control plane's {CONTROL} was changed by hand: {error}; run `fleet apply`") from error
    keys: dict[str, Any] = fleet.file.model_dump(mode="json", by_alias=True, include={"keys"})
    return msgspec.structs.replace(doc, spec={**doc.spec, **keys})


async def publish(transport: Transport, bundle: Bundle, *, holder: str) -> None:
    """Make a bundle the control plane's current generation; raises LeaseHeld, MachineError."""
    async with held({transport.name: transport}, first=transport.name, holder=holder) as leases:
        if transport.name not in leases.tokens:
            raise MachineError(transport.name, leases.problems[transport.name])
        token = leases.tokens[transport.name]
        await stage(transport, bundle, token=token, seen=None)
        await put_in_force(transport, bundle.digest, token=token)


async def put_in_force(transport: Transport, digest: str, *, token: int) -> None:
    """Make a staged bundle the one that counts; raises MachineError. There is no health to wait for."""
    await asked(transport, Switch(token=token, digest=digest))
    await asked(transport, Confirm(token=token, digest=digest))


async def _seen(transport: Transport) -> Observed:
    seen = await observe_one(transport, documents=True)
    if isinstance(seen, str):
        raise MachineError(transport.name, seen)
    return seen


def _transport(state: State) -> LocalTransport:
    return LocalTransport(CONTROL_PLANE, state.control_root, state.home)
