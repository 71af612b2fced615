"""A plan as text for a terminal, as Markdown for a pull request, and as the JSON of `plan.json`."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import msgspec

from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.plan.between import plan_id
from orchestrator_fleet.plan.changes import digest_shown
from orchestrator_fleet.plan.model import CONTROL_PLANE, Action, FieldChange, Plan, Target
from orchestrator_fleet.wire.documents import encode

MAX_PLAN_BYTES = 64 << 20
MAX_SHOWN = 120
VERSION = 1

_SYMBOLS = {"start": "+", "stop": "-", "restart": "-/+", "reload": "~", "write": "~", "prune": "-"}
_COLOURS = {"+": "32", "-": "31", "-/+": "33", "~": "33"}
_GAINED = "authority_gained"


def text(plan: Plan, *, color: bool) -> str:
    """What `fleet plan` prints: targets with something to do, their actions, and one line that sums up."""
    paint = _painted if color else _plain
    sections = ["\n".join(_target_lines(target, actions, paint)) for target, actions in _busy(plan)]
    problems = [f"{target.name}: {_clean(target.problem)}" for target in plan.targets if target.problem]
    if problems:
        sections.append("\n".join([paint("Out of reach, so not planned for:", "31"), *(f"  {p}" for p in problems)]))
    if plan.notes:
        sections.append("\n".join(["Notes:", *(f"  {_clean(note)}" for note in plan.notes)]))
    sections.append(paint(summary(plan), "1"))
    return "\n\n".join(sections) + "\n"


def summary(plan: Plan) -> str:
    """One line, as `Plan: 3 to start, 1 to restart, 2 to reload, 0 to stop on 2 of 16 machines; 14 unchanged`."""
    machines = sum(target.name != CONTROL_PLANE for target in plan.targets)
    counts = plan.summary
    if plan.empty:
        return f"No changes. {_machines(machines)} match{'es' if machines == 1 else ''} fleet.yaml."
    steps = [
        f"{counts.start} to start",
        f"{counts.restart} to restart",
        f"{counts.reload} to reload",
        f"{counts.stop} to stop",
        *([f"{counts.write} to write"] if counts.write else []),
    ]
    rest = [f"{counts.unchanged} unchanged"]
    rest += [f"{counts.prune} to take down"] if counts.prune else []
    rest += [f"{counts.unreachable} out of reach"] if counts.unreachable else []
    return f"Plan: {', '.join(steps)} on {counts.machines} of {_machines(machines)}; {', '.join(rest)}."


def markdown(plan: Plan) -> str:
    """A comment for a pull request: authority gained first, then one fold for each machine."""
    gained = [action for action in plan.actions if action.change == _GAINED]
    blocks = [f"### Plan for fleet {_code(plan.fleet)}"]
    if gained:
        warnings = [f"> - {_code(a.subject)} on {_code(a.target)}: {_code(a.reason)}" for a in gained]
        blocks.append("\n".join(["> [!WARNING]", "> **Authority gained**", *warnings]))
    blocks.append(f"**{html.escape(summary(plan))}**")
    for target, actions in _busy(plan):
        body = "\n".join(line for action in actions for line in _action_lines(action, _plain))
        fence = _fence(body)
        title = f"<code>{html.escape(target.name)}</code>: {_kinds(actions)}"
        blocks.append(
            f"<details><summary>{title}</summary>\n\n{fence}diff\n{_diff_columns(body)}\n{fence}\n\n</details>"
        )
    problems = [f"- {_code(t.name)}: {_code(t.problem)}" for t in plan.targets if t.problem]
    if problems:
        blocks.append("\n".join(["**Out of reach, so not planned for:**", *problems]))
    if plan.notes:
        blocks.append("\n".join(f"- {_code(note)}" for note in plan.notes))
    blocks.append(f"<sub>plan {_code(plan.id)}, revision {_code(plan.revision or 'none')}</sub>")
    return "\n\n".join(blocks) + "\n"


def to_json(plan: Plan) -> bytes:
    """`plan.json`: `from_json` gives the same plan back."""
    return msgspec.json.format(encode(plan), indent=2) + b"\n"


def from_json(data: bytes) -> Plan:
    """Read a saved plan; raises `FleetError` for anything that is not one, whole and of this version."""
    cure = "make a new one with `fleet plan -o plan.json`"
    if len(data) > MAX_PLAN_BYTES:
        raise FleetError(f"the plan has {len(data)} bytes, at most {MAX_PLAN_BYTES} are read; {cure}")
    try:
        plan = msgspec.json.decode(data, type=Plan)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FleetError(f"this is not a saved plan: {error}; {cure}") from error
    if plan.version != VERSION:
        raise FleetError(f"the plan has version {plan.version}, this program reads {VERSION}; {cure}")
    if plan_id(plan) != plan.id:
        raise FleetError(f"the plan was changed after it was made: its content is not that of plan {plan.id}; {cure}")
    return plan


def _busy(plan: Plan) -> Iterator[tuple[Target, list[Action]]]:
    """Targets with something to do, in the plan's order."""
    targets = {target.name: target for target in plan.targets}
    for name, group in groupby(plan.actions, key=lambda action: action.target):
        actions = [action for action in group if action.kind != "no-op"]
        if actions:
            yield targets[name], actions


def _target_lines(target: Target, actions: list[Action], paint: Any) -> Iterator[str]:
    before = digest_shown(target.observed) if target.observed else "nothing"
    after = digest_shown(target.desired) if target.desired else "nothing"
    step = f"generation {after}" if before == after else f"generation {before} -> {after}"
    yield f"{paint(target.name, '1')}  {step}"
    for action in actions:
        yield from _action_lines(action, paint)


def _action_lines(action: Action, paint: Any) -> Iterator[str]:
    symbol = _SYMBOLS[action.kind]
    change = action.change.replace("_", " ")
    change = change.upper() if action.change == _GAINED else change
    reason = _clean(action.reason.removeprefix("authority "))  # the class has said so
    yield f"  {paint(f'{symbol:<3}', _COLOURS[symbol])} {_clean(action.subject)}  {action.kind} ({change}): {reason}"
    for field in action.fields:
        yield f"        {paint(field.op, _COLOURS[field.op])} {_clean(field.path)}{_values(field)}"


def _values(field: FieldChange) -> str:
    if field.op == "+":
        return f" = {_value(field.after)}"
    if field.op == "-":
        return f" (was {_value(field.before)})"
    return f": {_value(field.before)} -> {_value(field.after)}"


def _value(value: Any) -> str:
    """A value as JSON on one line, cut when long."""
    written = _clean(json.dumps(value, ensure_ascii=False))
    return written if len(written) <= MAX_SHOWN else f"{written[:MAX_SHOWN]}..."


def _clean(line: str) -> str:
    """Printable characters only: what people wrote must not drive a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)


def _painted(line: str, colour: str) -> str:
    return f"\x1b[{colour}m{line}\x1b[0m"


def _plain(line: str, _colour: str) -> str:
    return line


def _machines(count: int) -> str:
    return f"{count} machine{'' if count == 1 else 's'}"


def _kinds(actions: Iterable[Action]) -> str:
    """`1 start, 2 reload`."""
    counts: dict[str, int] = {}
    for action in actions:
        counts[action.kind] = counts.get(action.kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _code(line: str) -> str:
    """A code span: nothing in it is Markdown, HTML or a mention."""
    return f"`{_clean(line).replace('`', chr(39))}`"


def _fence(body: str) -> str:
    """Longer than any run of backticks inside."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", body)), default=0))


def _diff_columns(body: str) -> str:
    """Put each line's sign into the first column, where a `diff` block colours it."""
    signs = {"+": "+", "-": "-", "~": "!"}
    return "\n".join(f"{signs.get(line.lstrip()[:1], ' ')} {line}" for line in body.splitlines())
