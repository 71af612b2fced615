"""Who gets a task, and why: tables of rules and tasks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_fleet.tasks.routing import Decision, Router

VPS = {
    "vp-eng-1": {"discipline": "engineering", "labels": {"team": "core", "tier": "1"}},
    "vp-eng-2": {"discipline": "engineering", "labels": {"team": "web"}},
    "vp-sec": {"discipline": "security", "labels": {"team": "core"}},
    "vp-cto": {"discipline": "general"},
}
SECURITY = {
    "name": "security-first",
    "when": 'task.priority == "CRITICAL" && "security" in task.tags',
    "to": {"orchestrator": "vp-sec"},
}
BY_DISCIPLINE = {
    "name": "by-discipline",
    "when": "has(task.discipline)",
    "to": {"discipline": "{{ task.discipline }}", "labels": {}},
}
REST = {"name": "rest", "when": None, "to": {"orchestrator": "vp-cto"}}


def router(*rules: dict[str, Any]) -> Router:
    return Router.of_spec({"orchestrators": VPS, "routing": list(rules)})


def to(*rules: dict[str, Any], task: dict[str, Any], **known: Any) -> Decision:
    return router(*rules).route({"priority": "MEDIUM", "tags": [], "discipline": None, **task}, **known)


@pytest.mark.parametrize(
    ("task", "orchestrator", "rule"),
    [
        ({"priority": "CRITICAL", "tags": ["security"]}, "vp-sec", "security-first"),
        ({"priority": "CRITICAL", "tags": ["security"], "discipline": "engineering"}, "vp-sec", "security-first"),
        ({"priority": "CRITICAL", "tags": ["security-ish"]}, "vp-cto", "rest"),
        ({"priority": "HIGH", "tags": ["security"]}, "vp-cto", "rest"),
        ({"discipline": "engineering"}, "vp-eng-1", "by-discipline"),
        ({"discipline": "security"}, "vp-sec", "by-discipline"),
        ({"discipline": "cooking"}, "vp-cto", "rest"),
        ({"discipline": None}, "vp-cto", "rest"),
        ({}, "vp-cto", "rest"),
        ({"orchestrator": "vp-eng-2", "priority": "CRITICAL", "tags": ["security"]}, "vp-eng-2", "explicit"),
    ],
)
def test_the_first_rule_that_matches_and_has_somebody_wins(task: dict[str, Any], orchestrator: str, rule: str) -> None:
    """An orchestrator that the task names wins over all rules."""
    decision = to(SECURITY, BY_DISCIPLINE, REST, task=task)
    assert (decision.orchestrator, decision.rule) == (orchestrator, rule)


def test_every_rule_that_was_looked_at_says_why() -> None:
    """The reasons are what `route explain` prints."""
    decision = to(SECURITY, BY_DISCIPLINE, REST, task={"discipline": "cooking"})
    assert [(c.rule, c.matched, c.reason) for c in decision.considered] == [
        ("security-first", False, "`when` is false"),
        ("by-discipline", False, "no orchestrator has discipline cooking"),
        ("rest", True, "the only one it means"),
    ]


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        ('task.metadata.repo == "x"', "`when` can't be evaluated: the task has no repo"),
        ("task.due_at == 'x'", "`when` can't be evaluated: the task has no due_at"),
        ("task.title", "`when` gives 't', not true or false"),
        ("task.title + 1 == 2", "`when` can't be evaluated: "),
        ("1 / 0 == 1", "`when` can't be evaluated: "),
    ],
)
def test_a_rule_that_can_not_be_evaluated_does_not_match_and_says_why(when: str, reason: str) -> None:
    """The task goes on to the next rule: an error never loses it."""
    decision = to({**REST, "name": "bad", "when": when}, REST, task={"title": "t"})
    assert decision.rule == "rest"
    assert decision.considered[0].reason.startswith(reason)


def test_a_task_that_no_rule_takes_goes_nowhere_with_the_reason() -> None:
    """Nobody is guessed."""
    decision = to(SECURITY, task={})
    assert (decision.orchestrator, decision.rule, decision.reason) == (None, None, "no routing rule matches it")
    assert to(task={}).reason == "there are no routing rules"


def test_a_named_orchestrator_that_is_not_there_is_told() -> None:
    """It does not fall back to a rule."""
    decision = to(REST, task={"orchestrator": "vp-gone"})
    assert (decision.orchestrator, decision.rule) == (None, "explicit")
    assert "vp-gone" in decision.reason


@pytest.mark.parametrize(
    ("target", "orchestrator"),
    [
        ({"labels": {"team": "core"}}, "vp-eng-1"),
        ({"labels": {"team": "core"}, "discipline": "security"}, "vp-sec"),
        ({"labels": {"team": "{{ task.discipline }}"}}, None),
        ({"orchestrator": "vp-{{ task.metadata.who }}"}, "vp-sec"),
        ({"orchestrator": "vp-{{task.metadata.nobody}}"}, None),
        ({"orchestrator": "vp-{{ task.metadata.who.more }}"}, None),
        ({"discipline": "{{ task.discipline }}"}, None),
    ],
)
def test_targets_by_labels_and_templates(target: dict[str, Any], orchestrator: str | None) -> None:
    """A template whose field is missing means nobody."""
    decision = to({"name": "r", "to": target}, task={"metadata": {"who": "sec"}})
    assert decision.orchestrator == orchestrator


def test_least_loaded_takes_the_emptiest_and_the_first_name_of_equals() -> None:
    """Load is open tasks."""
    assert to(BY_DISCIPLINE, task={"discipline": "engineering"}, load={"vp-eng-1": 3}).orchestrator == "vp-eng-2"
    assert to(BY_DISCIPLINE, task={"discipline": "engineering"}, load={"vp-eng-2": 1}).orchestrator == "vp-eng-1"
    assert to(BY_DISCIPLINE, task={"discipline": "engineering"}).orchestrator == "vp-eng-1"


def test_round_robin_takes_turns() -> None:
    """By how many the rule has sent."""
    rule = {**BY_DISCIPLINE, "strategy": "round-robin"}
    got = [to(rule, task={"discipline": "engineering"}, sent={"by-discipline": n}).orchestrator for n in range(4)]
    assert got == ["vp-eng-1", "vp-eng-2"] * 2


@settings(max_examples=60, deadline=None)
@given(first=st.integers(min_value=0, max_value=60), second=st.integers(min_value=0, max_value=60))
def test_weighted_is_exact_over_each_period(first: int, second: int) -> None:
    """And weight 0 gets nothing."""
    rule = {"name": "w", "to": {"labels": {"team": "core"}}, "strategy": "weighted"}
    rule["weights"] = {"vp-eng-1": first, "vp-sec": second}
    table = router(rule)
    total = first + second
    got = Counter(table.route({}, sent={"w": n}).orchestrator for n in range(2 * total))
    if not total:
        decision = table.route({})
        assert decision.orchestrator is None
        assert "weight 0" in decision.considered[0].reason
    assert got == Counter({name: 2 * n for name, n in (("vp-eng-1", first), ("vp-sec", second)) if n})


def test_weighted_does_not_send_in_bursts() -> None:
    """Three to one never sends four of the heavy one in a row."""
    rule = {"name": "w", "to": {"labels": {"team": "core"}}, "strategy": "weighted"}
    table = router({**rule, "weights": {"vp-eng-1": 30, "vp-sec": 10}})
    turns = "".join("a" if table.route({}, sent={"w": n}).orchestrator == "vp-eng-1" else "b" for n in range(80))
    assert "aaaaa" not in turns
    assert "bb" not in turns


def test_sticky_keeps_a_key_and_moves_only_who_must_when_somebody_joins() -> None:
    """Rendezvous hashing."""
    rule = {
        "name": "s",
        "to": {"labels": {"team": "core"}},
        "strategy": "sticky",
        "key": "task.metadata.repo",
    }
    keys = [f"repo-{n}" for n in range(200)]

    def choices(vps: dict[str, Any]) -> dict[str, str | None]:
        table = Router.of_spec({"orchestrators": vps, "routing": [rule]})
        return {key: table.route({"metadata": {"repo": key}}).orchestrator for key in keys}

    before = choices(VPS)
    assert set(before.values()) == {"vp-eng-1", "vp-sec"}
    after = choices({**VPS, "vp-new": {"labels": {"team": "core"}}})
    assert {after[key] for key in keys if after[key] != before[key]} == {"vp-new"}
    missing = to(rule, task={})
    assert missing.considered[0].reason == "`key` can't be evaluated: the task has no repo"


def test_routing_tests_of_the_spec_say_what_they_wanted_and_got() -> None:
    """One sentence for each that fails."""
    tests = [
        {"task": {"title": "anything"}, "expect": "vp-cto"},
        {"task": {"discipline": "security"}, "expect": "vp-cto"},
    ]
    (failed,) = router(BY_DISCIPLINE, {**REST, "tests": tests}).run_tests()
    assert (failed.rule, failed.number) == (1, 1)
    assert failed.problem == "the test task goes to vp-sec by by-discipline (the only one it means), wanted vp-cto"
    (nowhere,) = router({**BY_DISCIPLINE, "tests": tests[:1]}).run_tests()
    assert nowhere.problem == "the test task goes to nobody (no routing rule matches it), wanted vp-cto"


@pytest.mark.parametrize("strategy", ["least-loaded", "round-robin", "weighted"])
def test_who_has_a_task_keeps_it_where_the_rule_leaves_a_choice(strategy: str) -> None:
    """Whatever the load or the turn; not when the rule does not mean him."""
    rule = {"name": "r", "to": {"labels": {"team": "core"}}, "strategy": strategy}
    for name in ("vp-eng-1", "vp-sec"):
        decision = to(rule, task={}, with_=name, load={name: 100})
        assert (decision.orchestrator, decision.reason) == (name, "it has it already, and is one of the 2 it means")
    assert to(rule, task={}, with_="vp-cto").orchestrator in ("vp-eng-1", "vp-sec")
    none = {**rule, "strategy": "weighted", "weights": {"vp-sec": 0}}
    assert to(none, task={}, with_="vp-sec").orchestrator == "vp-eng-1"


def test_a_sticky_rule_moves_a_task_to_where_its_key_belongs() -> None:
    """All of a key with one; that outweighs staying."""
    rule = {"name": "s", "to": {"labels": {"team": "core"}}, "strategy": "sticky", "key": "task.metadata.repo"}
    belongs = to(rule, task={"metadata": {"repo": "x"}}).orchestrator
    for name in ("vp-eng-1", "vp-sec"):
        assert to(rule, task={"metadata": {"repo": "x"}}, with_=name).orchestrator == belongs


def test_a_decision_tells_whom_each_rule_means() -> None:
    """As `route explain` shows it."""
    rule = {"name": "core", "to": {"labels": {"team": "core"}}}
    assert to(SECURITY, rule, task={}).considered[-1].among == ("vp-eng-1", "vp-sec")


def test_a_broken_expression_is_found_when_the_router_is_made() -> None:
    """Never at the first task."""
    with pytest.raises(ValueError, match="CEL"):
        router({**REST, "when": "task.title =="})
