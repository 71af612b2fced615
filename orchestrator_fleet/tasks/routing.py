"""Which orchestrator gets a task: the routing rules of fleet.yaml, first match wins. Pure.

`Router` is made once per applied spec (it compiles every expression); `route` takes the task, how loaded everybody is
and how many tasks each rule has sent so far, and answers a Decision that says, rule by rule, why.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

from orchestrator_fleet.spec import expressions

# What stands for a rule's name where a task, a person or an orchestrator named somebody: no rule takes that back.
EXPLICIT, ASSIGNED, DELEGATED, HANDED_OFF, RETURNED = "explicit", "assigned", "delegated", "handed_off", "returned"
NAMED = frozenset({EXPLICIT, ASSIGNED, DELEGATED, HANDED_OFF, RETURNED})
TURNING = frozenset({"round-robin", "weighted"})
STRATEGIES: Mapping[str, str] = MappingProxyType(
    {
        "least-loaded": "the one with the fewest tasks, waiting and running; of equals the first by name",
        "round-robin": "one after the other, in the order of their names",
        "weighted": "in turn, each as often as its weight says (1 where there is none), spread evenly",
        "sticky": "always the same one for the same value of `key`; who joins or leaves moves only his share",
    }
)
MAX_KEY_CHARS = 1_000
MAX_TURNS = 10_000

_FIELD = re.compile(r"\{\{\s*task((?:\.[A-Za-z_][A-Za-z0-9_]*)+)\s*\}\}")


class Expression(Protocol):
    """A compiled CEL expression."""

    def execute(self, context: Any) -> Any:
        """Its value; raises when a name it uses is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An orchestrator as routing sees it."""

    name: str
    discipline: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule, its expressions compiled. `when` None matches always."""

    name: str
    when: Expression | None
    orchestrator: str | None
    discipline: str | None
    labels: Mapping[str, str]
    strategy: str
    key: Expression | None
    weights: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """One rule's part in a decision, and why. `among`: whom its target means, where it was asked."""

    rule: str
    matched: bool
    reason: str
    among: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a task goes. `orchestrator` None: nowhere yet; `reason` says why, for people."""

    rule: str | None
    orchestrator: str | None
    reason: str
    considered: tuple[Considered, ...] = ()

    @property
    def condition(self) -> str | None:
        """What a task says that nobody gets."""
        if self.orchestrator is not None:
            return None
        return f"nobody gets it: {self.reason}; assign it, or add a routing rule"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTest:
    """A routing test that got something else: which one (`routing[rule].tests[number]`), and what."""

    rule: int
    number: int
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The rules and orchestrators of one applied spec."""

    rules: tuple[Rule, ...]
    candidates: Mapping[str, Candidate]
    _tests: tuple[tuple[int, int, Mapping[str, Any], str], ...] = field(default=(), repr=False)

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any]) -> Router:
        """From the spec as JSON (`ControlDoc.spec`). Raises what `compile_cel` raises on a broken expression."""
        routing = spec.get("routing") or []
        return cls(
            rules=tuple(_rule(route) for route in routing),
            candidates={name: _candidate(name, fields) for name, fields in sorted(spec["orchestrators"].items())},
            _tests=tuple(
                (rule, number, test["task"], test["expect"])
                for rule, route in enumerate(routing)
                for number, test in enumerate(route.get("tests") or [])
            ),
        )

    def needs_load(self) -> bool:
        """Whether any rule chooses by load."""
        return any(rule.strategy == "least-loaded" and rule.orchestrator is None for rule in self.rules)

    def route(
        self,
        task: Mapping[str, Any],
        *,
        load: Mapping[str, int] | None = None,
        sent: Mapping[str, int] | None = None,
        with_: str | None = None,
    ) -> Decision:
        """Decide. `task`: fields as the API shows them; `load`: open tasks by orchestrator; `sent`: tasks by rule.

        `with_`: who has it now, and keeps it where the rule that matches leaves a choice.
        """
        known = _Known(candidates=self.candidates, load=load or {}, sent={} if sent is None else sent, with_=with_)
        return route(task, rules=self.rules, known=known)

    def run_tests(self) -> list[FailedTest]:
        """The routing tests written in the spec, as if all were idle; those that fail."""
        failed = []
        for rule, number, task, expect in self._tests:
            decision = self.route(task)
            if decision.orchestrator != expect:
                got = f"{decision.orchestrator} by {decision.rule}" if decision.orchestrator else "nobody"
                problem = f"the test task goes to {got} ({decision.reason}), wanted {expect}"
                failed.append(FailedTest(rule=rule, number=number, problem=problem))
        return failed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What a rule's choice may depend on beside the task."""

    candidates: Mapping[str, Candidate]
    load: Mapping[str, int]
    sent: Mapping[str, int]
    with_: str | None


def route(task: Mapping[str, Any], *, rules: Sequence[Rule], known: _Known) -> Decision:
    """Where `task` goes: its own `orchestrator` if it names one, else by the first rule that matches and has somebody.

    A field that is null counts as absent, so `has(task.discipline)` is false without one. An expression that can't be
    evaluated does not match; its error is the reason.
    """
    fields = {"metadata": {}, "tags": [], **{name: value for name, value in task.items() if value is not None}}
    explicit = fields.get("orchestrator")
    if explicit is not None:
        there = explicit in known.candidates
        reason = "the task names it" if there else f"the task names {explicit}, and there is no such orchestrator"
        return Decision(rule=EXPLICIT, orchestrator=explicit if there else None, reason=reason)
    considered: list[Considered] = []
    for rule in rules:
        name, reason, among = _try(rule, fields, known)
        considered.append(Considered(rule=rule.name, matched=name is not None, reason=reason, among=among))
        if name is not None:
            return Decision(rule=rule.name, orchestrator=name, reason=reason, considered=tuple(considered))
    why = "no routing rule matches it" if rules else "there are no routing rules"
    return Decision(rule=None, orchestrator=None, reason=why, considered=tuple(considered))


def _try(rule: Rule, fields: Mapping[str, Any], known: _Known) -> tuple[str | None, str, tuple[str, ...]]:
    """(who, why, of whom) by one rule."""
    if rule.when is not None:
        value, problem = _evaluate(rule.when, fields)
        if problem:
            return None, f"`when` can't be evaluated: {problem}", ()
        if value is not True:
            return None, "`when` is false" if value is False else f"`when` gives {value!r}, not true or false", ()
    able, problem = _able(rule, fields, known.candidates)
    if not able:
        return None, problem, ()
    return *_choose(rule, fields, able, known), able


def _able(rule: Rule, fields: Mapping[str, Any], candidates: Mapping[str, Candidate]) -> tuple[tuple[str, ...], str]:
    """(names that the rule's target means, why there are none)."""
    wanted: dict[str, str | None] = {}
    for part, template in (("orchestrator", rule.orchestrator), ("discipline", rule.discipline)):
        wanted[part], missing = _fill(template, fields)
        if missing:
            return (), f"the task has no {missing}, which `to.{part}` needs"
    if wanted["orchestrator"] is not None:
        name = wanted["orchestrator"]
        return ((name,), "") if name in candidates else ((), f"there is no orchestrator {name}")
    able = tuple(
        name
        for name, candidate in candidates.items()
        if wanted["discipline"] in (None, candidate.discipline)
        and all(candidate.labels.get(label) == value for label, value in rule.labels.items())
    )
    words = [f"discipline {wanted['discipline']}"] if wanted["discipline"] else []
    words += [f"label {label}={value}" for label, value in sorted(rule.labels.items())]
    return able, f"no orchestrator has {' and '.join(words)}"


def _choose(rule: Rule, fields: Mapping[str, Any], able: tuple[str, ...], known: _Known) -> tuple[str | None, str]:
    if len(able) == 1:
        return able[0], "the only one it means"
    if rule.strategy == "sticky":
        return _sticky(rule, fields, able)
    if known.with_ in able and (rule.strategy != "weighted" or rule.weights.get(known.with_, 1)):
        return known.with_, f"it has it already, and is one of the {len(able)} it means"
    match rule.strategy:
        case "round-robin":
            sent = known.sent.get(rule.name, 0)
            return able[sent % len(able)], f"turn {sent + 1}: one after the other of {len(able)}"
        case "weighted":
            return _weighted(rule, able, known.sent.get(rule.name, 0))
    name = min(able, key=lambda one: (known.load.get(one, 0), one))
    return name, f"the least loaded of {len(able)}, with {known.load.get(name, 0)} open tasks"


def _weighted(rule: Rule, able: tuple[str, ...], sent: int) -> tuple[str | None, str]:
    shares = tuple((name, rule.weights.get(name, 1)) for name in able)
    turns = _turns(shares)
    if not turns:
        return None, "every orchestrator that it means has weight 0"
    name = turns[sent % len(turns)]
    return name, f"by weight, {rule.weights.get(name, 1)} of {sum(weight for _, weight in shares)}"


@lru_cache(maxsize=256)
def _turns(shares: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """One period of turns: each name as often as its weight, its turns spread evenly over the period."""
    total = sum(weight for _, weight in shares)
    scale = max(1, -(-total // MAX_TURNS))
    counts = [(name, -(-weight // scale)) for name, weight in shares]
    return tuple(name for _, name in sorted(((n + 0.5) / count, name) for name, count in counts for n in range(count)))


def _sticky(rule: Rule, fields: Mapping[str, Any], able: tuple[str, ...]) -> tuple[str | None, str]:
    """Rendezvous hashing: who leaves or joins moves only the keys that were, or become, his."""
    if rule.key is None:
        return None, "sticky has no key"
    value, problem = _evaluate(rule.key, fields)
    if problem:
        return None, f"`key` can't be evaluated: {problem}"
    key = str(value)[:MAX_KEY_CHARS]
    return max(able, key=lambda name: hashlib.sha256(f"{key}\0{name}".encode()).digest()), f"sticky to {key!r}"


def _evaluate(expression: Expression, fields: Mapping[str, Any]) -> tuple[Any, str]:
    """(value, "") or (None, what is wrong)."""
    try:
        return expression.execute({"task": dict(fields)}), ""
    except KeyError as missing:
        return None, f"the task has no {missing.args[0]}"
    except Exception as problem:  # noqa: BLE001 (the evaluator raises many kinds, and all mean: this rule does not match)
        return None, str(problem).splitlines()[0][:MAX_KEY_CHARS] if str(problem) else type(problem).__name__


def _fill(template: str | None, fields: Mapping[str, Any]) -> tuple[str | None, str]:
    """(the template with the task's fields in place, "") or (None, the field that is missing)."""
    if template is None:
        return None, ""
    missing: list[str] = []

    def value(match: re.Match[str]) -> str:
        found: Any = fields
        for name in match[1][1:].split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if found is None:
            missing.append(match[1][1:])
        return str(found)

    filled = _FIELD.sub(value, template)
    return (None, missing[0]) if missing else (filled, "")


def _rule(route: Mapping[str, Any]) -> Rule:
    to = route["to"]
    return Rule(
        name=route["name"],
        when=_compiled(route.get("when")),
        orchestrator=to.get("orchestrator"),
        discipline=to.get("discipline"),
        labels=to.get("labels") or {},
        strategy=route.get("strategy") or "least-loaded",
        key=_compiled(route.get("key")),
        weights=route.get("weights") or {},
    )


def _compiled(text: str | None) -> Expression | None:
    return None if text is None else expressions.compile_cel(text)


def _candidate(name: str, fields: Mapping[str, Any]) -> Candidate:
    return Candidate(name=name, discipline=fields.get("discipline") or "general", labels=fields.get("labels") or {})
