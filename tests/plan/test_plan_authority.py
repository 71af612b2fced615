"""Charter classification: what widens an orchestrator's authority, what narrows it, what is mere wording."""

from __future__ import annotations

from typing import Any

import pytest
from builders import Living, charter, fleet

from orchestrator_fleet.plan.model import Action
from orchestrator_fleet.spec.model import Fleet

GAINED, LOST, WORDING, SETTINGS = "authority_gained", "authority_lost", "charter_wording", "settings"


def spec(front: dict[str, Any], own: dict[str, Any], prose: str = "Do.") -> Fleet:
    return fleet(
        machines=1,
        orchestrators={"vp-1": own},
        charters={"charters/vp.md": charter(prose=prose, **front)},
    )


def action(before: Fleet, after: Fleet) -> Action:
    living = Living()
    living.apply(before)
    return next(a for a in living.plan(after).actions if a.subject == "vp-1")


def safety(approve: str = "", reject: str = "", escalate: str = "") -> dict[str, Any]:
    rules = {"auto_approve": approve.split(), "always_reject": reject.split(), "escalate": escalate.split()}
    return {"safety": rules}


LIMITS = [
    ({"sessions": 2}, {"sessions": 3}, GAINED, "authority gained: sessions 2 -> 3"),
    ({"sessions": 3}, {"sessions": 2}, LOST, "authority lost: sessions 3 -> 2"),
    ({"sessions": 3}, {}, GAINED, "authority gained: sessions 3 -> 4"),
    ({}, {"sessions": 9}, WORDING, ""),
    ({"session_timeout": "10m"}, {"session_timeout": "20m"}, GAINED, "authority gained: session timeout 10m -> 20m"),
    ({"memory": "1GiB"}, {}, GAINED, "authority gained: session memory 1GiB -> unlimited"),
    ({}, {"memory": "1GiB"}, LOST, "authority lost: session memory unlimited -> 1GiB"),
    ({"tokens_per_hour": 1000}, {"tokens_per_hour": 5000}, GAINED, "authority gained: tokens an hour 1,000 -> 5,000"),
    ({"tokens_per_hour": 1000}, {"tokens_per_hour": 1}, LOST, "authority lost: tokens an hour 1,000 -> 1"),
    (
        {"sessions": 2, "memory": "2GiB"},
        {"sessions": 3, "memory": "1GiB"},
        GAINED,
        "authority gained: sessions 2 -> 3; lost: session memory 2GiB -> 1GiB",
    ),
]


@pytest.mark.parametrize(("before", "after", "change", "reason"), LIMITS)
def test_limits_of_a_charter(before: dict[str, Any], after: dict[str, Any], change: str, reason: str) -> None:
    """What is in force counts: a limit that fleet.yaml (4 sessions) still caps gains nothing."""
    own = {"sessions": {"max": 4, "timeout": "1h"}}
    made = action(spec({"limits": before}, own), spec({"limits": after}, own))
    assert (made.kind, made.change) == ("reload", change)
    assert made.reason.startswith(reason)


RULES = [
    (safety(), safety(approve="A"), GAINED, "authority gained: auto_approve A"),
    (safety(approve="A"), safety(), LOST, "authority lost: no longer auto_approve A"),
    (safety(reject="A"), safety(), GAINED, "authority gained: no longer always_reject A"),
    (safety(), safety(reject="A"), LOST, "authority lost: always_reject A"),
    (safety(escalate="A"), safety(), GAINED, "authority gained: no longer escalate A"),
    (safety(), safety(escalate="A"), LOST, "authority lost: escalate A"),
    (safety(approve="A"), safety(escalate="A"), LOST, "authority lost: no longer auto_approve A"),
    (safety(escalate="A"), safety(approve="A"), GAINED, "authority gained: auto_approve A"),
    (safety(escalate="A"), safety(reject="A"), LOST, "authority lost: always_reject A"),
    (safety(reject="A"), safety(escalate="A"), GAINED, "authority gained: no longer always_reject A"),
    (safety(reject="A"), safety(approve="A"), GAINED, "authority gained: auto_approve A"),
    (safety(approve="A"), safety(reject="A"), LOST, "authority lost: always_reject A"),
    (safety(approve="A B"), safety(approve="B A"), WORDING, "charter "),
    (
        safety(approve="A"),
        safety(approve="B"),
        GAINED,
        "authority gained: auto_approve B; lost: no longer auto_approve A",
    ),
]


@pytest.mark.parametrize(("before", "after", "change", "reason"), RULES)
def test_safety_rules(before: dict[str, Any], after: dict[str, Any], change: str, reason: str) -> None:
    """Each rule is judged once, also when it moves from one list to another."""
    made = action(spec(before, {}), spec(after, {}))
    assert (made.kind, made.change) == ("reload", change)
    assert made.reason.startswith(reason)
    assert "lost" in made.reason or change != LOST


OWN = [
    ({"sessions": {"max": 1}}, {"sessions": {"max": 2}}, GAINED),
    ({"budget": {"usd_per_day": 5}}, {"budget": {"usd_per_day": 6}}, GAINED),
    ({"budget": {"usd_per_day": 5}}, {}, GAINED),
    ({}, {"budget": {"tokens_per_hour": 5}}, LOST),
    ({"budget": {"on_breach": "pause"}}, {"budget": {"on_breach": "escalate"}}, SETTINGS),
    ({"role": "VP"}, {"role": "VP of all"}, SETTINGS),
    ({"labels": {"team": "a"}}, {"labels": {"team": "b"}}, SETTINGS),
]


@pytest.mark.parametrize(("before", "after", "change"), OWN)
def test_an_orchestrators_own_part_of_fleet_yaml(before: dict[str, Any], after: dict[str, Any], change: str) -> None:
    """Sessions and budgets are authority as much as the charter's limits are."""
    made = action(spec({}, before), spec({}, after))
    assert (made.kind, made.change) == ("reload", change)


def test_prose_is_wording() -> None:
    """The reason names both versions."""
    made = action(spec({}, {}), spec({}, {}, prose="Do, and say why."))
    assert (made.kind, made.change) == ("reload", WORDING)
    assert [field.path for field in made.fields] == ["charter.md"]


@pytest.mark.parametrize("kind", ["restart", "start"])
def test_authority_gained_is_not_hidden_by_what_else_happens(kind: str) -> None:
    """A restart or a start that also widens authority is classed by that."""
    living = Living()
    living.apply(spec({}, {}))
    own: dict[str, Any] = {"sessions": {"max": 50}}
    if kind == "restart":
        own["runner"] = {"type": "claude-code"}
    else:
        living["m1"].kill_program("vp-1")
    made = next(a for a in living.plan(spec({}, own)).actions if a.subject == "vp-1")
    assert (made.kind, made.change) == (kind, GAINED)
    assert "authority gained: sessions 2 -> 50" in made.reason
