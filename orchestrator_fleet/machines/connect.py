"""Which transport reaches which declared machine: the one place that reads addresses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, Protocol

from orchestrator_fleet.errors import Unreachable
from orchestrator_fleet.machines.local import LocalTransport
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.spec.model import Machine
from orchestrator_fleet.wire.machine import Request

LOCAL = "local"


class Roots(Protocol):
    """Where the roots on this host stand."""

    @property
    def home(self) -> Path:
        """The fleet folder."""

    @property
    def control_root(self) -> Path:
        """The control plane's root."""

    def machine_root(self, name: str) -> Path:
        """A local machine's root, where fleet.yaml names no other."""

    def local_roots(self) -> Mapping[str, Path]:
        """Machines that have a root on this host, declared or not."""


class NoTransport:
    """A machine whose address this version can't reach: it is unreachable, and says why."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self._address = name, address

    async def call(self, request: Request, *, timeout_s: float) -> NoReturn:  # noqa: ARG002 - the protocol's shape
        """Raise Unreachable."""
        raise Unreachable(self.name, f"{self._address}: this version reaches only `address: local` machines")

    async def close(self) -> None:
        """Nothing is open."""


def transports_for(declared: Mapping[str, Machine], roots: Roots) -> dict[str, Transport]:
    """A transport for the control plane, for each declared machine, and for each undeclared one with a root here.

    The last are machines that an earlier fleet.yaml named: somebody has to end what runs there.
    """
    left_over = {name: root for name, root in roots.local_roots().items() if name not in declared}
    return {
        CONTROL_PLANE: LocalTransport(CONTROL_PLANE, roots.control_root, roots.home),
        **{name: _transport(name, machine, roots) for name, machine in declared.items()},
        **{name: LocalTransport(name, root, roots.home) for name, root in left_over.items()},
    }


def _transport(name: str, machine: Machine, roots: Roots) -> Transport:
    root = Path(machine.root) if machine.root is not None else roots.machine_root(name)
    return transport_to(name, address=machine.address, root=root, home=roots.home)


def transport_to(name: str, *, address: str, root: Path, home: Path) -> Transport:
    """The transport to one machine; `root` is where its root stands if it is on this host."""
    return LocalTransport(name, root, home) if address == LOCAL else NoTransport(name, address)
