"""Whether a change lets an orchestrator do more, or less: limits, budgets and safety rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from orchestrator_fleet.spec.units import format_duration, format_size
from orchestrator_fleet.wire.documents import OrchestratorDoc


class _Rules(msgspec.Struct, kw_only=True, frozen=True):
    """The safety part of a charter."""

    auto_approve: tuple[str, ...] = ()
    always_reject: tuple[str, ...] = ()
    escalate: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """What was widened and what was narrowed, a few words each."""

    gained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """`authority gained: sessions 2 -> 4; lost: ...`, or nothing."""
        parts = [f"gained: {', '.join(self.gained)}"] if self.gained else []
        parts += [f"lost: {', '.join(self.lost)}"] if self.lost else []
        return f"authority {'; '.join(parts)}" if parts else ""


NONE = Authority()


def between(before: OrchestratorDoc, after: OrchestratorDoc) -> Authority:
    """Compare what is in force: a limit that the other side still caps gains nothing."""
    gained: list[str] = []
    lost: list[str] = []
    for name, old, new in _limits(before, after):
        if old != new:
            wider = new is None or (old is not None and new > old)
            (gained if wider else lost).append(f"{name} {_amount(name, old)} -> {_amount(name, new)}")
    rules_gained, rules_lost = _compare_rules(_rules(before.charter), _rules(after.charter))
    return Authority(gained=(*gained, *rules_gained), lost=(*lost, *rules_lost))


def _limits(before: OrchestratorDoc, after: OrchestratorDoc) -> tuple[tuple[str, float | None, float | None], ...]:
    return (
        ("sessions", before.sessions_max, after.sessions_max),
        ("session timeout", before.session_timeout_s, after.session_timeout_s),
        ("session memory", before.session_memory_bytes, after.session_memory_bytes),
        ("tokens an hour", before.tokens_per_hour, after.tokens_per_hour),
        ("dollars a day", before.usd_per_day, after.usd_per_day),
    )


def _amount(name: str, value: float | None) -> str:
    if value is None:
        return "unlimited"
    if name == "session timeout":
        return format_duration(value)
    return format_size(int(value)) if name == "session memory" else f"{value:,.12g}"


def _rules(charter: dict[str, Any]) -> _Rules:
    """The rules of a document; one that was changed by hand into something else has none."""
    try:
        return msgspec.convert(charter.get("safety", {}), _Rules)
    except msgspec.ValidationError:
        return _Rules()


def _compare_rules(before: _Rules, after: _Rules) -> tuple[list[str], list[str]]:
    """A rule may move between lists: it is judged once, by where it came from or where it went."""
    approve, approve_gone = _moves(before.auto_approve, after.auto_approve)
    reject, reject_gone = _moves(before.always_reject, after.always_reject)
    escalate, escalate_gone = _moves(before.escalate, after.escalate)
    gained = [f"auto_approve {rule}" for rule in approve]
    gained += [f"no longer always_reject {rule}" for rule in reject_gone if rule not in approve]
    gained += [f"no longer escalate {rule}" for rule in escalate_gone if rule not in {*approve, *reject}]
    lost = [f"always_reject {rule}" for rule in reject]
    lost += [f"no longer auto_approve {rule}" for rule in approve_gone if rule not in reject]
    lost += [f"escalate {rule}" for rule in escalate if rule not in {*approve_gone, *reject_gone}]
    return gained, lost


def _moves(before: tuple[str, ...], after: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(rules that came, rules that went)."""
    old, new = set(before), set(after)
    return sorted(new - old), sorted(old - new)
