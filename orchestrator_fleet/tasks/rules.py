"""What binds claims, as declared: hours, sessions, budgets, limits. Pure; made once per applied spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from orchestrator_fleet.spec.expressions import Program, compile_cel
from orchestrator_fleet.spec.hours import Window, parse_hours
from orchestrator_fleet.wire.documents import InForce


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Working hours: open in any of these windows of the zone's week. `text` is what people wrote."""

    timezone: str
    windows: tuple[Window, ...]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be used in any 24 hours, and in any hour."""

    usd_per_day: float | None = None
    tokens_per_hour: int | None = None
    on_breach: Literal["pause", "escalate"] = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrchestratorRules:
    """What binds one orchestrator. None: nothing does."""

    sessions_max: int | None = None
    hours: Hours | None = None
    budget: Budget | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit of how many tasks run, or start in a minute, for each value of its key."""

    name: str
    key: Program
    max_running: int | None = None
    max_per_minute: int | None = None


NO_RULES = OrchestratorRules()
_CHARTERS_SAY_NOTHING: Mapping[str, InForce] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """All that binds claims. `sessions_on`: the most sessions at once on a machine, where one is declared."""

    orchestrators: Mapping[str, OrchestratorRules] = field(default_factory=dict)
    sessions_on: Mapping[str, int] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any], *, within: Mapping[str, InForce] = _CHARTERS_SAY_NOTHING) -> Rules:
        """From the spec as JSON (`ControlDoc.spec`), its defaults merged.

        `within` (`ControlDoc.limits`): what is left of it under each orchestrator's charter. Raises what `compile_cel`
        and `parse_hours` raise on what `fleet validate` would have refused.
        """
        machines = {name: (fields or {}).get("sessions") for name, fields in (spec.get("machines") or {}).items()}
        return cls(
            orchestrators={
                name: _of_orchestrator(fields, within.get(name)) for name, fields in spec["orchestrators"].items()
            },
            sessions_on={name: most for name, most in machines.items() if most is not None},
            limits=tuple(_limit(fields) for fields in spec.get("limits") or []),
        )

    def of(self, orchestrator: str) -> OrchestratorRules:
        """What binds an orchestrator."""
        return self.orchestrators.get(orchestrator, NO_RULES)


ANYTHING_GOES = Rules()


def _of_orchestrator(fields: Mapping[str, Any], in_force: InForce | None) -> OrchestratorRules:
    declared = (fields.get("sessions") or {}).get("max")
    return OrchestratorRules(
        sessions_max=in_force.sessions if in_force is not None else declared,
        hours=_hours(fields.get("schedule")),
        budget=_budget(fields.get("budget") or {}, in_force),
    )


def _hours(schedule: Mapping[str, Any] | None) -> Hours | None:
    if schedule is None:
        return None
    text = schedule["hours"]
    return Hours(timezone=schedule.get("timezone") or "UTC", windows=parse_hours(text), text=text)


def _budget(fields: Mapping[str, Any], in_force: InForce | None) -> Budget | None:
    tokens = in_force.tokens_per_hour if in_force is not None else fields.get("tokens_per_hour")
    usd = fields.get("usd_per_day")
    if tokens is None and usd is None:
        return None
    return Budget(usd_per_day=usd, tokens_per_hour=tokens, on_breach=fields.get("on_breach") or "pause")


def _limit(fields: Mapping[str, Any]) -> Limit:
    return Limit(
        name=fields["name"],
        key=compile_cel(fields["key"]),
        max_running=fields.get("max_running"),
        max_per_minute=fields.get("max_per_minute"),
    )
