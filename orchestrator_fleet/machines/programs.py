"""Bringing a machine's programs in line with its current generation, touching none that need not be."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator_fleet.ids import is_name
from orchestrator_fleet.machines import daemons, processes
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.machines.supervisord import LIVING_STATES, Supervisord
from orchestrator_fleet.wire.machine import ProgramSeen, Switch

READY_WAIT_S = 10.0
READY_POLL_S = 0.02
_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What is done to which programs; each name stands once."""

    take_out: tuple[str, ...]
    renew: tuple[str, ...]
    put_in: tuple[str, ...]
    reread: tuple[str, ...]

    def told(self) -> list[str]:
        """The same in words, a line a program."""
        return [
            *(f"{name} stopped" for name in self.take_out),
            *(f"{name} started again" for name in self.renew),
            *(f"{name} started" for name in self.put_in),
        ]


def steps(
    *, wanted: Mapping[str, str], seen: Mapping[str, ProgramSeen], changed: Collection[str], asked: Switch
) -> Steps:
    """What the request asks for, and whatever else the generation needs (pure).

    `wanted`: program -> digest, from the generation's manifest. `changed`: what supervisord says has another
    configuration than the one it runs. A request made before a crash, or a revert, may name less than is needed.
    """
    outdated = {n for n, p in seen.items() if n in wanted and p.program is not None and p.program != wanted[n]}
    ended = {n for n, p in seen.items() if p.state not in LIVING_STATES}
    renew = sorted((outdated | ended | set(changed) | set(asked.restart) | set(asked.start)) & set(seen) & set(wanted))
    return Steps(
        take_out=tuple(sorted(set(seen) - set(wanted))),
        renew=tuple(renew),
        put_in=tuple(sorted(set(wanted) - set(seen))),
        reread=tuple(sorted(set(wanted) & set(seen) - set(renew))),
    )


def observe(layout: Layout, client: Supervisord) -> dict[str, ProgramSeen]:
    """Every program as supervisord, the kernel and the daemon itself tell it."""
    seen = {}
    for name, info in client.programs().items():
        pid = int(info["pid"])
        said = daemons.status(layout, name, pid=pid) if is_name(name) else None
        seen[name] = ProgramSeen(
            state=info["statename"],
            pid=pid,
            since_us=int(info["start"]) * _SECOND_US,
            detail=str(info["spawnerr"] or (said.link_detail if said is not None else "")),
            program=processes.environment(pid).get("FLEET_PROGRAM") if pid else None,
            generation=(said.generation or None) if said is not None else None,
            charter_version=(said.charter_version or None) if said is not None else None,
            link=said.link if said is not None else "unknown",
            sessions=said.sessions if said is not None else 0,
            key=daemons.key(layout, name) if is_name(name) else None,
        )
    return seen


def bring_in_line(
    layout: Layout, client: Supervisord, *, wanted: Mapping[str, str], asked: Switch, fresh: bool
) -> Steps:
    """Read the current generation's configuration and act on it; what was done.

    `fresh`: supervisord was started a moment ago on this very configuration, and starts every program by itself.
    """
    if fresh:
        return Steps(take_out=(), renew=(), put_in=tuple(sorted(wanted)), reread=())
    _, changed, _ = client.reload()
    todo = steps(wanted=wanted, seen=observe(layout, client), changed=changed, asked=asked)
    client.take_out([*todo.take_out, *todo.renew])
    for name in (*todo.renew, *todo.put_in):
        client.put_in(name)
    _reread(layout, client, todo.reread)
    return todo


def _is_up(layout: Layout, name: str, info: Mapping[str, Any]) -> bool:
    """Whether a daemon can take SIGHUP: it has said so, or it is so old that what it said must have been lost."""
    said = daemons.status(layout, name, pid=int(info["pid"])) is not None
    return said or int(info["now"]) - int(info["start"]) > READY_WAIT_S


def _reread(layout: Layout, client: Supervisord, names: Collection[str]) -> None:
    """Tell daemons to read their files again, each once it is up: before that, SIGHUP would end it."""
    waiting = set(names)
    deadline = time.monotonic() + READY_WAIT_S
    while waiting:
        known = {name: info for name, info in client.programs().items() if name in waiting}
        ready = {name for name, info in known.items() if _is_up(layout, name, info)}
        for name in sorted(ready):
            client.hang_up(name)
        waiting = waiting.intersection(known) - ready
        if time.monotonic() > deadline:
            return  # what never came up reads the current files when it does
        if waiting:
            time.sleep(READY_POLL_S)
