"""`fleet status`: machines and programs as they are, read from the machines themselves."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from datetime import UTC, datetime
from typing import Any

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.client import Running, running
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.clock import SECOND_US
from orchestrator_fleet.reconcile.conditions import FleetStatus, MachineStatus, ProgramStatus
from orchestrator_fleet.reconcile.fleet import status
from orchestrator_fleet.reconcile.state import State

SHOWN_DIGITS = 12
_HOME_AND_CLEAR = "\x1b[H\x1b[J"


@click.command(cls=Command)
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C; in a pipe one JSON line or table each time.")
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, help="Seconds of --watch."
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=500, show_default=True, help="At most so many rows.")
def command(*, watch: bool, interval: float, limit: int) -> None:
    """Show machines, generations, programs and what is wrong with them.

    What is shown is observed now; `fleet plan` says what is to be done about it.
    """
    while True:
        seen, served = status(place().file), running(State(place().file))
        if watch and output.is_terminal(sys.stdout):
            sys.stdout.write(_HOME_AND_CLEAR)
        if place().json and watch:
            output.write(json.dumps(as_json(seen, served)) + "\n")
        elif place().json:
            output.write_json(as_json(seen, served))
        else:
            _print(seen, served, limit)
        if not watch:
            return
        time.sleep(interval)


def as_json(seen: FleetStatus, served: Running | None) -> dict[str, Any]:
    """The status as JSON values."""
    control = dataclasses.asdict(seen.control_plane)
    for name in ("programs", "supervisord", "supervisord_pid"):  # the control plane has neither
        control.pop(name)
    control["serve"] = {"pid": served.pid, "url": served.url} if served is not None else None
    return {
        "fleet": seen.fleet,
        "ready": seen.ready,
        "control_plane": control,
        "machines": [dataclasses.asdict(machine) for machine in seen.machines],
    }


def _print(seen: FleetStatus, served: Running | None, limit: int) -> None:
    serving = f"serves at {served.url} (pid {served.pid})" if served is not None else "does not run here"
    output.say(f"fleet {seen.fleet}: {'Ready' if seen.ready else 'not Ready'}; the control plane {serving}\n")
    targets = (seen.control_plane, *seen.machines)
    output.table(
        ("target", "ready", "supervisord", "generation", "running", "sessions", "why"),
        [_target_row(target) for target in targets[:limit]],
    )
    programs = [(name, machine.name, p) for machine in seen.machines for name, p in sorted(machine.programs.items())]
    if programs:
        output.say()
        output.table(
            ("orchestrator", "machine", "state", "pid", "up", "link", "sessions", "charter", "detail"),
            [_program_row(*program) for program in programs[:limit]],
        )
    if max(len(targets), len(programs)) > limit:
        output.say(f"the first {limit} rows of each; --limit shows more", err=True)


def _target_row(target: MachineStatus) -> tuple[Any, ...]:
    ready = next((condition for condition in target.conditions if condition.type == "Ready"), None)
    up = sum(program.state == "RUNNING" for program in target.programs.values())
    return (
        target.name,
        ready.status if ready is not None else None,
        target.supervisord if target.supervisord_pid or target.programs else None,
        (target.generation or "")[:SHOWN_DIGITS],
        f"{up}/{len(target.programs)}" if target.programs else None,
        sum(program.sessions for program in target.programs.values()) if target.programs else None,
        f"{ready.reason}: {ready.message}" if ready is not None and ready.message else ready and ready.reason,
    )


def _program_row(name: str, machine: str, program: ProgramStatus) -> tuple[Any, ...]:
    seconds = datetime.now(UTC).timestamp() - program.since_us / SECOND_US
    return (
        name,
        machine,
        program.state,
        program.pid or None,
        output.span(max(seconds, 0.0)) if program.since_us else None,
        program.link,
        program.sessions,
        (program.charter_version or "")[:SHOWN_DIGITS],
        program.detail,
    )
