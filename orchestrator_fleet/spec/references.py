"""What values mean to each other: every name that one part of the spec uses must be somebody's.

Pure: a checked file in, findings out; `load` puts places to them. A part whose shape was wrong is not in the
file any more, so `Declared` says who was declared at all: nobody is called unknown because of a mistake elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator_fleet.spec import expressions, hours
from orchestrator_fleet.spec.model import Alert, FleetFile, Machine, Orchestrator, Route, RouteTarget
from orchestrator_fleet.spec.suggest import Path, hint, one_of, shown
from orchestrator_fleet.spec.units import format_duration

MAX_FINDINGS = 200
MAX_STEPS_SHOWN = 12
_PERSON = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
_SSH_PORT = ":22"
_CRON_FIELDS = 5
_TASK_INPUT = expressions.TASK_FIELDS
# What a task's `route` says when no rule has sent it: see tasks.routing.
_NOT_BY_RULE = frozenset({"explicit", "assigned", "delegated", "handed_off", "returned"})
# Words that stand where an orchestrator's name does in a path of the API.
WORDS_OF_API = frozenset({"bulk", "conflicts", "validate"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """Who is declared, whatever else may be wrong with them, and the sections of which something was cut out."""

    machines: frozenset[str]
    orchestrators: frozenset[str]
    mended: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One wrong reference. `key` points at the key of the place, not at its value."""

    path: Path
    problem: str
    hint: str = ""
    key: bool = False


def check(file: FleetFile, *, declared: Declared) -> list[Finding]:
    """All that is wrong between the parts of a file, MAX_FINDINGS at most."""
    found: list[Finding] = []
    for part in (_machines, _orchestrators, _escalations, _keys, _routing, _limits, _schedules, _rollout, _alerts):
        for finding in part(file, declared):
            found.append(finding)
            if len(found) >= MAX_FINDINGS:
                return found
    return found


def _unknown(path: Path, what: str, name: str, known: Collection[str], *, key: bool = False) -> Finding:
    advice = hint(name, known, otherwise=f"there are {one_of(sorted(known))}" if known else "")
    return Finding(path=path, problem=f"no {what} {name}", hint=advice, key=key)


# --- machines -------------------------------------------------------------------------------------------------


def _machines(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    seen: dict[tuple[str, str | None], str] = {}
    for name, machine in file.machines.items():
        home = _home(machine)
        if home is None:
            continue
        if home in seen:
            problem = f"is the same place as {seen[home]}: {home[0]}{f', root {home[1]}' if home[1] else ''}"
            yield Finding(
                path=("machines", name, "address"), problem=problem, hint="give one another address, or another root"
            )
        seen.setdefault(home, name)
    yield from _slots(file, declared)


def _home(machine: Machine) -> tuple[str, str | None] | None:
    """What two machines may not share; a local one without a root has a folder of its own."""
    if machine.address == "local":
        return ("local", machine.root) if machine.root is not None else None
    address = machine.address.rstrip("/")
    host = address.rpartition("@")[2]
    has_port = re.search(r":\d+$", host) is not None and not (host.count(":") > 1 and "]" not in host)
    return (address if has_port else address + _SSH_PORT, machine.root)


def _slots(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    pinned: dict[str, list[str]] = {}
    for name, orchestrator in file.orchestrators.items():
        if orchestrator.machine is not None:
            pinned.setdefault(orchestrator.machine, []).append(name)
    for machine, placed in pinned.items():
        slots = file.machines[machine].slots if machine in file.machines else len(placed)
        if len(placed) > slots:
            problem = f"{len(placed)} orchestrators name {machine}, which has {slots} slots"
            yield Finding(
                path=("orchestrators", placed[slots], "machine"),
                problem=problem,
                hint="raise its slots, or place some elsewhere",
            )
    total = sum(machine.slots for machine in file.machines.values())
    if "machines" not in declared.mended and len(file.orchestrators) > total:
        problem = f"{len(file.orchestrators)} orchestrators, but the machines have {total} slots"
        yield Finding(path=("machines",), problem=problem, hint="add machines, or raise their slots", key=True)


# --- orchestrators --------------------------------------------------------------------------------------------


def _orchestrators(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    for name, orchestrator in file.orchestrators.items():
        if name in WORDS_OF_API:
            problem = f"is a word of the API: /api/vps/{name} is no orchestrator"
            yield Finding(path=("orchestrators", name), problem=problem, hint="choose another name", key=True)
        at: Path = ("orchestrators", name)
        if orchestrator.machine is not None and orchestrator.machine not in declared.machines:
            yield _unknown((*at, "machine"), "machine", orchestrator.machine, declared.machines)
        yield from _placement(file, declared, name, orchestrator)
        if orchestrator.schedule is not None:
            yield from _time_zone((*at, "schedule", "timezone"), orchestrator.schedule.timezone)
            yield from _says((*at, "schedule", "hours"), hours.parse_hours, orchestrator.schedule.hours)
        if orchestrator.retry.backoff > orchestrator.retry.backoff_max:
            longest = format_duration(orchestrator.retry.backoff_max)
            problem = f"the first wait, {format_duration(orchestrator.retry.backoff)}, is over backoff_max, {longest}"
            yield Finding(path=(*at, "retry", "backoff"), problem=problem, hint="raise backoff_max")


def _placement(file: FleetFile, declared: Declared, name: str, orchestrator: Orchestrator) -> Iterator[Finding]:
    placement, at = orchestrator.placement, ("orchestrators", name, "placement")
    if placement is None:
        return
    every_machine_is_sound = "machines" not in declared.mended
    wanted = placement.labels.items()
    if every_machine_is_sound and not any(wanted <= machine.labels.items() for machine in file.machines.values()):
        problem = f"no machine has the labels {_labels(placement.labels)}"
        yield Finding(path=(*at, "labels"), problem=problem, hint=_label_hint(placement.labels, file.machines.values()))
    if every_machine_is_sound and placement.spread is not None:
        known = {label for machine in file.machines.values() for label in machine.labels}
        if placement.spread not in known:
            yield _unknown((*at, "spread"), "machine with the label", placement.spread, known)
    for number, avoided in enumerate(placement.avoid):
        if avoided not in declared.orchestrators:
            yield _unknown((*at, "avoid", number), "orchestrator", avoided, declared.orchestrators)
        elif avoided == name:
            yield Finding(path=(*at, "avoid", number), problem=f"{name} avoids itself", hint="take it out")


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in labels.items()) + "}"


def _label_hint(labels: Mapping[str, str], holders: Iterable[Machine | Orchestrator]) -> str:
    known = {f"{name}: {value}" for holder in holders for name, value in holder.labels.items()}
    for name, value in labels.items():
        if f"{name}: {value}" not in known:
            near = hint(f"{name}: {value}", known)
            return near or (f"there are {one_of(sorted(known))}" if known else "nothing has labels")
    return "each is somewhere, but not all in one place"


def _escalations(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    for name, orchestrator in file.orchestrators.items():
        for number, target in enumerate(orchestrator.escalate_to):
            path = ("orchestrators", name, "escalate_to", number)
            prefix, _, person = target.partition(":")
            if target == name:
                yield Finding(path=path, problem=f"{name} escalates to itself", hint="take it out")
            elif prefix == "human":
                if not _PERSON.fullmatch(person):
                    yield Finding(
                        path=path, problem=f"got {shown(target)}, wanted human:<name>", hint="such as human:oncall"
                    )
            elif target not in declared.orchestrators:
                advice = hint(
                    target, declared.orchestrators - {name}, otherwise="name an orchestrator, or human:<name>"
                )
                yield Finding(path=path, problem=f"no orchestrator {target}", hint=advice)
    yield from _escalation_cycles(file)


def _escalation_cycles(file: FleetFile) -> Iterator[Finding]:
    """Each way of escalating that leads back to where it came from, at the step that closes it."""
    above = {
        name: [
            (number, target)
            for number, target in enumerate(orchestrator.escalate_to)
            if target in file.orchestrators and target != name
        ]
        for name, orchestrator in file.orchestrators.items()
    }
    done: set[str] = set()
    for start in file.orchestrators:
        trail = {start: iter(above[start])}  # the way from `start` to here, each with the targets not tried yet
        while trail and start not in done:
            here = next(reversed(trail))
            number, target = next(trail[here], (-1, ""))
            if number < 0:
                done.add(here)
                del trail[here]
            elif target in trail:
                way = list(trail)
                circle = " -> ".join(_shortened([*way[way.index(target) :], target]))
                path: Path = ("orchestrators", here, "escalate_to", number)
                yield Finding(path=path, problem=f"escalation goes in a circle: {circle}", hint="take one step out")
            elif target not in done:
                trail[target] = iter(above[target])


def _shortened(way: list[str]) -> list[str]:
    return way if len(way) <= MAX_STEPS_SHOWN else [*way[: MAX_STEPS_SHOWN - 2], "...", way[-1]]


# --- keys -----------------------------------------------------------------------------------------------------


def _keys(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    hashes: dict[str, str] = {}
    for key_id, key in file.keys.items():
        at: Path = ("keys", key_id)
        prefix, _, person = key.owner.partition(":")
        if prefix in {"person", "service"} and _PERSON.fullmatch(person):
            pass
        elif ":" in key.owner:
            problem = f"got {shown(key.owner)}, wanted person:<name>, service:<name> or an orchestrator"
            yield Finding(path=(*at, "owner"), problem=problem)
        elif key.owner not in declared.orchestrators:
            advice = hint(key.owner, declared.orchestrators, otherwise=f"for a person write person:{key.owner}")
            yield Finding(path=(*at, "owner"), problem=f"no orchestrator {key.owner}", hint=advice)
        if key.sha256 in hashes:
            problem = f"is the hash of {hashes[key.sha256]} too"
            yield Finding(path=(*at, "sha256"), problem=problem, hint="make a key of its own with `fleet key create`")
        hashes.setdefault(key.sha256, key_id)
        if key.created is not None and key.expires is not None and key.expires <= key.created:
            yield Finding(path=(*at, "expires"), problem="expires before it was created", hint="correct one of them")


# --- routing --------------------------------------------------------------------------------------------------


def _routing(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    yield from _unique("routing", "route", [route.name for route in file.routing])
    catches_all: str | None = None
    for number, route in enumerate(file.routing):
        at: Path = ("routing", number)
        if catches_all is not None:
            problem = f"is never reached: {catches_all} before it takes every task"
            advice = f"move it above {catches_all}, or give that a `when`"
            yield Finding(path=(*at, "name"), problem=problem, hint=advice)
        elif "routing" not in declared.mended and _takes_all(route):
            catches_all = route.name
        if route.name in _NOT_BY_RULE:
            problem = f"got {route.name}, which tasks say that no rule has sent"
            yield Finding(path=(*at, "name"), problem=problem, hint="give it another name")
        yield from _expression((*at, "when"), route.when, expressions.TASK_ROOTS)
        yield from _expression((*at, "key"), route.key, expressions.TASK_ROOTS)
        yield from _target(file, declared, (*at, "to"), route.to)
        for name in route.weights:
            if name not in declared.orchestrators:
                yield _unknown((*at, "weights", name), "orchestrator", name, declared.orchestrators, key=True)
        for index, test in enumerate(route.tests):
            yield from _task_keys((*at, "tests", index, "task"), test.task)
            if test.expect not in declared.orchestrators:
                yield _unknown((*at, "tests", index, "expect"), "orchestrator", test.expect, declared.orchestrators)


def _takes_all(route: Route) -> bool:
    """Without a condition, and to somebody who does not depend on the task."""
    texts = [route.to.orchestrator or "", route.to.discipline or "", *route.to.labels.values()]
    unconditional = route.when is None or route.when.strip() == "true"
    return unconditional and not any(expressions.is_template(text) for text in texts)


def _target(file: FleetFile, declared: Declared, at: Path, target: RouteTarget) -> Iterator[Finding]:
    templated = False
    texts: list[tuple[Path, str | None]] = [
        ((*at, "orchestrator"), target.orchestrator),
        ((*at, "discipline"), target.discipline),
        *(((*at, "labels", name), value) for name, value in target.labels.items()),
    ]
    for path, text in texts:
        if text is not None and expressions.is_template(text):
            templated = True
            yield from (Finding(path=path, problem=problem) for problem in expressions.check_template(text))
    if target.orchestrator is not None:
        if not expressions.is_template(target.orchestrator) and target.orchestrator not in declared.orchestrators:
            yield _unknown((*at, "orchestrator"), "orchestrator", target.orchestrator, declared.orchestrators)
        return
    if "orchestrators" in declared.mended:
        return
    yield from _somebody(file, at, target, templated=templated)


def _somebody(file: FleetFile, at: Path, target: RouteTarget, *, templated: bool) -> Iterator[Finding]:
    """The literal parts of a target must match somebody, each and together."""
    every = file.orchestrators.values()
    discipline = target.discipline
    if discipline is not None and not expressions.is_template(discipline):
        disciplines = {orchestrator.discipline for orchestrator in every}
        if discipline not in disciplines:
            yield _unknown((*at, "discipline"), "orchestrator of the discipline", discipline, disciplines)
            return
    labels = {name: value for name, value in target.labels.items() if not expressions.is_template(value)}
    if not any(labels.items() <= orchestrator.labels.items() for orchestrator in every):
        problem = f"no orchestrator has the labels {_labels(labels)}"
        yield Finding(path=(*at, "labels"), problem=problem, hint=_label_hint(labels, every))
    elif not templated and not any(
        orchestrator.discipline == (discipline or orchestrator.discipline)
        and labels.items() <= orchestrator.labels.items()
        for orchestrator in every
    ):
        problem = f"no orchestrator of the discipline {discipline} has the labels {_labels(labels)}"
        yield Finding(path=(*at, "labels"), problem=problem, hint="correct one of them")


def _task_keys(at: Path, task: Mapping[str, Any]) -> Iterator[Finding]:
    for name in task:
        if name not in _TASK_INPUT:
            advice = hint(name, _TASK_INPUT, otherwise="anything more goes into metadata")
            yield Finding(path=(*at, name), problem=f"a task has no field {name}", hint=advice, key=True)


# --- limits, schedules, rollout, alerts -----------------------------------------------------------------------


def _limits(file: FleetFile, declared: Declared) -> Iterator[Finding]:  # noqa: ARG001 - one shape for all parts
    yield from _unique("limits", "limit", [limit.name for limit in file.limits])
    for number, limit in enumerate(file.limits):
        yield from _expression(("limits", number, "key"), limit.key, expressions.TASK_ROOTS)


def _schedules(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    disciplines = {orchestrator.discipline for orchestrator in file.orchestrators.values()}
    everybody_is_sound = "orchestrators" not in declared.mended
    for name, schedule in file.schedules.items():
        at: Path = ("schedules", name)
        yield from _says((*at, "cron"), _parse_cron, schedule.cron)
        yield from _time_zone((*at, "timezone"), schedule.timezone)
        task = schedule.task
        if task.orchestrator is not None and task.orchestrator not in declared.orchestrators:
            yield _unknown((*at, "task", "orchestrator"), "orchestrator", task.orchestrator, declared.orchestrators)
        if everybody_is_sound and task.discipline is not None and task.discipline not in disciplines:
            what = "orchestrator of the discipline"
            yield _unknown((*at, "task", "discipline"), what, task.discipline, disciplines)


def _rollout(file: FleetFile, declared: Declared) -> Iterator[Finding]:  # noqa: ARG001 - one shape for all parts
    rollout = file.rollout
    deadline = format_duration(rollout.healthy_deadline)
    if rollout.min_healthy >= rollout.healthy_deadline:
        problem = (
            f"is {format_duration(rollout.min_healthy)}, not under healthy_deadline, {deadline}: no machine could pass"
        )
        yield Finding(path=("rollout", "min_healthy"), problem=problem, hint="raise healthy_deadline")
    if rollout.progress_deadline < rollout.healthy_deadline:
        longest = format_duration(rollout.progress_deadline)
        problem = f"is {longest}, under healthy_deadline, {deadline}: one slow machine would end every rollout"
        yield Finding(path=("rollout", "progress_deadline"), problem=problem, hint="raise it")


def _alerts(file: FleetFile, declared: Declared) -> Iterator[Finding]:
    yield from _unique("alerts", "alert", [alert.name for alert in file.alerts])
    for number, alert in enumerate(file.alerts):
        yield from _expression(("alerts", number, "when"), alert.when, expressions.ALERT_ROOTS)
        yield from _notified(file, declared, number, alert)


def _notified(file: FleetFile, declared: Declared, number: int, alert: Alert) -> Iterator[Finding]:
    known = {f"webhook:{name}" for name in file.notify.webhook} | ({"slack"} if file.notify.slack else set())
    for index, target in enumerate(alert.notify):
        if target in known or "notify" in declared.mended:
            continue
        path: Path = ("alerts", number, "notify", index)
        if target == "slack":
            yield Finding(path=path, problem="notify has no slack", hint="add notify.slack with its token")
        elif target.startswith("webhook:"):
            missing = f"add notify.webhook.{target.removeprefix('webhook:')}"
            yield Finding(path=path, problem=f"no {target} in notify", hint=hint(target, known, otherwise=missing))
        else:
            advice = hint(target, {"slack", *known})
            yield Finding(path=path, problem=f"got {shown(target)}, wanted slack or webhook:<name>", hint=advice)


# --- what several parts ask -----------------------------------------------------------------------------------


def _unique(section: str, what: str, written: list[str]) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for number, name in enumerate(written):
        if name in first:
            problem = f"is the name of {section}[{first[name]}] too"
            yield Finding(path=(section, number, "name"), problem=problem, hint=f"give each {what} a name of its own")
        first.setdefault(name, number)


def _expression(path: Path, text: str | None, roots: Mapping[str, frozenset[str] | None]) -> Iterator[Finding]:
    if text is not None:
        yield from (Finding(path=path, problem=problem) for problem in expressions.check(text, roots=roots))


def _says(path: Path, parse: Callable[[str], object], text: str) -> Iterator[Finding]:
    try:
        parse(text)
    except ValueError as error:
        yield Finding(path=path, problem=str(error))


def _parse_cron(text: str) -> None:
    from cronsim import CronSim, CronSimError  # noqa: PLC0415 - 17 ms, only for fleets with schedules

    fields = len(text.split())
    if fields != _CRON_FIELDS:
        raise ValueError(f"got {shown(text)}, {fields} fields, wanted five: minute hour day month weekday")
    try:
        first = next(CronSim(text, datetime(2026, 1, 1, tzinfo=UTC)), None)
    except CronSimError as error:
        problem = str(error)
        raise ValueError(f"got {shown(text)}: {problem[:1].lower()}{problem[1:]}; see `man 5 crontab`") from None
    if first is None:
        raise ValueError(f"got {shown(text)}, which never comes; see `man 5 crontab`")


def _time_zone(path: Path, name: str) -> Iterator[Finding]:
    if name == "UTC":
        return
    import zoneinfo  # noqa: PLC0415 - most fleets keep UTC

    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        advice = hint(name, zoneinfo.available_timezones(), otherwise="such as Europe/Berlin")
        yield Finding(path=path, problem=f"no time zone {shown(name)}", hint=advice)
