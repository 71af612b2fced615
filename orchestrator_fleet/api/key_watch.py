"""What is kept up about keys beside the requests: which were revoked elsewhere, and when each was used last."""

from __future__ import annotations

import asyncio

from orchestrator_fleet import log
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.orchestrators import keyring

# A revocation comes with its event; this is for a store that was put back from a backup, or an event that got lost.
REREAD_S = 3.0
USES_S = 10.0

_log = log.get(__name__)


async def follow_revocations(plane: Plane) -> None:
    """Read the revocations each REREAD_S, whatever was heard."""
    while True:
        await asyncio.sleep(REREAD_S)
        await plane.reread_revocations()


async def keep_uses(plane: Plane) -> None:
    """Write down the last uses each USES_S, in one transaction for all keys."""
    while True:
        await asyncio.sleep(USES_S)
        await write_uses(plane)


async def write_uses(plane: Plane) -> None:
    """Write down what was noted; what can't be written is kept for the next time."""
    new = plane.uses.take()
    if not new:
        return
    try:
        await plane.store.write(lambda conn: keyring.use(conn, new))
    except StoreError as problem:
        plane.uses.give_back(new)
        _log.warning("the last uses of keys are not written down yet", problem=str(problem))
