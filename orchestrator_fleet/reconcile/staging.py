"""Bringing a bundle to a target, beside what is current there: only the files it lacks travel."""

from __future__ import annotations

from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.machine import read
from orchestrator_fleet.reconcile.rollout import asked
from orchestrator_fleet.render.bundle import Bundle
from orchestrator_fleet.wire.machine import Observed, Stage

TIMEOUT_S = 60.0


async def stage(transport: Transport, bundle: Bundle, *, token: int, seen: Observed | None) -> None:
    """Put a bundle on a target, whole and durable, and change nothing that runs; raises MachineError."""
    there = contents(seen)
    blobs = {digest: bundle.files[path] for path, digest in bundle.manifest.files.items() if digest not in there}
    request = Stage(token=token, digest=bundle.digest, manifest=bundle.manifest_bytes, blobs=blobs)
    await asked(transport, request, timeout_s=TIMEOUT_S)


def contents(seen: Observed | None) -> set[str]:
    """SHA-256 of the content that a target certainly has in its current generation."""
    manifest = read(seen).manifest if seen is not None else None
    if seen is None or manifest is None:
        return set()
    lost = {*seen.drifted, *seen.missing}
    return {digest for path, digest in manifest.files.items() if path not in lost}
