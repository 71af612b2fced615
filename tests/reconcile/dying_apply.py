"""`dying_apply.py FLEET_FILE N`: apply, and die by SIGKILL just before the Nth change is asked of any machine.

Prints how many changes were asked for when it gets through.
"""

import os
import signal
import sys
from pathlib import Path

from orchestrator_fleet.machines import connect
from orchestrator_fleet.machines.local import LocalTransport
from orchestrator_fleet.reconcile import fleet
from orchestrator_fleet.wire.machine import Answer, Observe, Request

asked = 0


class Dying(LocalTransport):
    """A way to a machine whose caller is killed."""

    async def call(self, request: Request, *, timeout_s: float) -> Answer:
        """Count changes; die before the one that was ordered."""
        global asked  # noqa: PLW0603 - one process, one count over all machines
        if not isinstance(request, Observe):
            asked += 1
            if asked == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
        return await super().call(request, timeout_s=timeout_s)


connect.LocalTransport = Dying
fleet.apply_plan(fleet.plan_fleet(Path(sys.argv[1])), register_keys=lambda _: 0)
sys.stdout.write(f"through after {asked}\n")
