"""A fleet folder to plan and apply from, on real machines of this host or on machines in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator_fleet.clock import FrozenClock
from orchestrator_fleet.machines.fake import FakeTransport, Faults
from orchestrator_fleet.machines.transport import Transport
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.reconcile import fleet, look
from orchestrator_fleet.reconcile.apply import KeyRow
from orchestrator_fleet.reconcile.report import ApplyReport, Event
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec.model import Machine
from orchestrator_fleet.wire.machine import Answer, Request

ROLLOUT = "min_healthy: 0s, healthy_deadline: 20s, max_deletes: 100%"


@dataclass
class FleetHome:
    """A fleet.yaml with one orchestrator on each machine, `vp-<machine>`, and what became of its passes."""

    home: Path
    machines: tuple[str, ...] = ("m1", "m2")
    rollout: str = ROLLOUT
    commands: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    keys: list[KeyRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.home / "charters").mkdir(parents=True)
        self.charter("You do what the task says.")
        self.write()

    @property
    def file(self) -> Path:
        """Its fleet.yaml."""
        return self.home / "fleet.yaml"

    @property
    def state(self) -> State:
        """Its run-time files."""
        return State(self.file)

    def charter(self, prose: str) -> None:
        """Write the charter that all share."""
        (self.home / "charters/vp.md").write_text(f"---\nrole: VP\n---\n{prose}\n")

    def write(self) -> None:
        """Write fleet.yaml from the fields."""
        orchestrators = {
            f"vp-{name}": {
                "charter": "charters/vp.md",
                "machine": name,
                "runner": {"type": "command", "command": ["echo", self.commands.get(name, "hello")]},
            }
            for name in self.machines
        }
        self.file.write_text(
            f"version: 1\nfleet: test\ncontrol_plane: {{url: 'http://127.0.0.1:9'}}\nrollout: {{{self.rollout}}}\n"
            f"machines: {json.dumps({name: {} for name in self.machines})}\n"
            f"orchestrators: {json.dumps(orchestrators)}\n"
            "routing:\n  - {name: rest, to: {orchestrator: vp-m1}}\n"
        )

    def plan(self, **options: Any) -> fleet.Planned:
        """Look, and plan."""
        return fleet.plan_fleet(self.file, **options)

    def apply(self, planned: fleet.Planned | None = None, **options: Any) -> ApplyReport:
        """Apply a plan, or a fresh one."""
        return fleet.apply_plan(
            planned or self.plan(), on_event=self.events.append, register_keys=self.register, **options
        )

    def register(self, rows: Sequence[KeyRow]) -> int:
        """Take the keys, as the store does."""
        new = [row for row in rows if row not in self.keys]
        self.keys += new
        return len(new)

    def results(self, report: ApplyReport) -> dict[str, str]:
        """Target -> result, in words."""
        return {name: outcome.result.value for name, outcome in report.outcomes.items()}

    def pids(self) -> dict[str, int]:
        """Orchestrator -> pid of its daemon."""
        status = fleet.status(self.file)
        return {name: p.pid for machine in status.machines for name, p in machine.programs.items()}


@dataclass
class MemoryMachines:
    """Machines in memory that stay from pass to pass, and every request that reached them."""

    faults: dict[str, Faults] = field(default_factory=dict)
    machines: dict[str, FakeTransport] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def transports_for(self, declared: Mapping[str, Machine], _: State) -> dict[str, Transport]:
        """What `connect.transports_for` is asked for."""
        for name in (CONTROL_PLANE, *declared):
            self.machines.setdefault(name, FakeTransport(name, clock=FrozenClock()))
        for name, machine in self.machines.items():
            machine.faults = self.faults.get(name, Faults())
        return {name: Counting(machine, self.asked) for name, machine in self.machines.items()}


@dataclass
class Counting:
    """A way to a machine that remembers what went over it."""

    way: FakeTransport
    asked: list[tuple[str, str]]

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.way.name

    async def call(self, request: Request, *, timeout_s: float) -> Answer:
        """Note it, and pass it on."""
        self.asked.append((self.name, type(request).__name__))
        return await self.way.call(request, timeout_s=timeout_s)

    async def close(self) -> None:
        """Pass it on."""
        await self.way.close()


def in_memory(monkeypatch: pytest.MonkeyPatch, faults: Mapping[str, Faults] | None = None) -> MemoryMachines:
    """Let passes reach machines in memory instead of those of this host."""
    machines = MemoryMachines(faults=dict(faults or {}))
    monkeypatch.setattr(look, "transports_for", machines.transports_for)
    return machines
