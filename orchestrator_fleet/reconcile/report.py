"""What came of an apply, target by target, and what is told while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator_fleet.errors import ApplyFailed, RolledBack


class Result(StrEnum):
    """What became of one target."""

    APPLIED = "applied"
    UNCHANGED = "unchanged"
    FAILED = "failed"
    ROLLED_BACK = "rolled_back"
    SKIPPED = "skipped"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened during an apply or destroy, for whoever watches.

    `kind`: leased, staged, switching, waiting, applied, rejected, rolled_back, failed, skipped, unreachable, pruned,
    destroyed, keys, interrupted, spec_invalid (a destroy goes on without it). `target`: a machine, `control-plane`,
    or empty for the fleet.
    """

    kind: str
    target: str
    text: str


OnEvent = Callable[[Event], None]


def nobody(_: Event) -> None:
    """Watch nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one target, and why. `generation` is the one it has now, None when that is not known."""

    target: str
    result: Result
    reason: str = ""
    generation: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyReport:
    """One apply. `keys_registered`: daemon keys that the store did not know yet."""

    fleet: str
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    keys_registered: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def having(self, *results: Result) -> list[Outcome]:
        """The outcomes with one of these results, in order."""
        return [outcome for outcome in self.outcomes.values() if outcome.result in results]


def to_json(report: ApplyReport) -> dict[str, Any]:
    """A report as JSON values."""
    return {
        "fleet": report.fleet,
        "seconds": round(report.seconds, 3),
        "interrupted": report.interrupted,
        "keys_registered": report.keys_registered,
        "outcomes": [asdict(outcome) for outcome in report.outcomes.values()],
    }


class RolloutFailed(ApplyFailed):
    """Some machines are not what the plan says; `report` has all of them."""

    def __init__(self, message: str, report: ApplyReport) -> None:
        self.report = report
        super().__init__(message)


class RolloutReverted(RolledBack):
    """Machines went back to their last good generation; `report` has all of them."""

    def __init__(self, message: str, report: ApplyReport) -> None:
        self.report = report
        super().__init__(message)


def told(outcomes: list[Outcome]) -> str:
    """`m01: why; m02: why`."""
    return "; ".join(f"{outcome.target}: {outcome.reason}" for outcome in outcomes)
