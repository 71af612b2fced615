"""The way to a machine: one request, one answer. The reconcile loop knows machines only through this."""

from __future__ import annotations

from typing import Protocol

from orchestrator_fleet.wire.machine import Answer, Request


class Transport(Protocol):
    """Carries requests to one target: in this process, over SSH, or to a machine in memory."""

    @property
    def name(self) -> str:
        """The machine's name, or `control-plane`."""

    async def call(self, request: Request, *, timeout_s: float) -> Answer:
        """Ask, and wait at most `timeout_s` seconds for the answer.

        A machine that says no answers with a `Refusal`. Raises `Unreachable` when there is no answer (whether the
        request took effect is then unknown: look again), `MachineError` when the answer is not one.
        """

    async def close(self) -> None:
        """Let go of the connection; the machine stays as it is."""
