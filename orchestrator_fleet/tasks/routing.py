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
from typing import Any, Protocol

from orchestrator_fleet.spec import expressions

EXPLICIT = "explicit"
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
    """One rule's part in a decision, and why."""

    rule: str
    matched: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a task goes. `orchestrator` None: nowhere yet; `reason` says why, for people."""

    rule: str | None
    orchestrator: str | None
    reason: str
    considered: tuple[Considered, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The rules and orchestrators of one applied spec."""

    rules: tuple[Rule, ...]
    candidates: Mapping[str, Candidate]
    _tests: tuple[tuple[str, Mapping[str, Any], str], ...] = field(default=(), repr=False)

    @classmethod
    def of_spec(cls, spec: Mapping[str, Any]) -> Router:
        """From the spec as JSON (`ControlDoc.spec`). Raises what `compile_cel` raises on a broken expression."""
        routing = spec.get("routing") or []
        return cls(
            rules=tuple(_rule(route) for route in routing),
            candidates={name: _candidate(name, fields) for name, fields in sorted(spec["orchestrators"].items())},
            _tests=tuple(
                (route["name"], test["task"], test["expect"]) for route in routing for test in route.get("tests") or []
            ),
        )

    def needs_load(self) -> bool:
        """Whether any rule chooses by load."""
        return any(rule.strategy == "least-loaded" and rule.orchestrator is None for rule in self.rules)

    def route(
        self, task: Mapping[str, Any], *, load: Mapping[str, int] | None = None, sent: Mapping[str, int] | None = None
    ) -> Decision:
        """Decide. `task`: fields as the API shows them; `load`: open tasks by orchestrator; `sent`: tasks by rule."""
        return route(task, rules=self.rules, candidates=self.candidates, load=load or {}, sent=sent or {})

    def run_tests(self) -> list[str]:
        """The routing tests written in the spec; one sentence per failure."""
        failures = []
        for rule, task, expect in self._tests:
            decision = self.route(task)
            if decision.orchestrator != expect:
                got = decision.orchestrator or "nobody"
                failures.append(
                    f"routing.{rule}: the test task {dict(task)} wants {expect},"
                    f" got {got} by {decision.rule or 'no rule'} ({decision.reason})"
                )
        return failures


def route(
    task: Mapping[str, Any],
    *,
    rules: Sequence[Rule],
    candidates: Mapping[str, Candidate],
    load: Mapping[str, int],
    sent: Mapping[str, int],
) -> Decision:
    """Where `task` goes: its own `orchestrator` if it names one, else by the first rule that matches and has somebody.

    A field that is null counts as absent, so `has(task.discipline)` is false without one. An expression that can't be
    evaluated does not match; its error is the reason.
    """
    fields = {"metadata": {}, "tags": [], **{name: value for name, value in task.items() if value is not None}}
    explicit = fields.get("orchestrator")
    if explicit is not None:
        known = explicit in candidates
        reason = "the task names it" if known else f"the task names {explicit}, and there is no such orchestrator"
        return Decision(rule=EXPLICIT, orchestrator=explicit if known else None, reason=reason)
    considered: list[Considered] = []
    for rule in rules:
        name, reason = _try(rule, fields, candidates, load=load, sent=sent.get(rule.name, 0))
        considered.append(Considered(rule=rule.name, matched=name is not None, reason=reason))
        if name is not None:
            return Decision(rule=rule.name, orchestrator=name, reason=reason, considered=tuple(considered))
    why = "no routing rule matches it" if rules else "there are no routing rules"
    return Decision(rule=None, orchestrator=None, reason=why, considered=tuple(considered))


def _try(
    rule: Rule, fields: Mapping[str, Any], candidates: Mapping[str, Candidate], *, load: Mapping[str, int], sent: int
) -> tuple[str | None, str]:
    """(who, why) of one rule."""
    if rule.when is not None:
        value, problem = _evaluate(rule.when, fields)
        if problem:
            return None, f"`when` can't be evaluated: {problem}"
        if value is not True:
            return None, "`when` is false" if value is False else f"`when` gives {value!r}, not true or false"
    able, problem = _able(rule, fields, candidates)
    if not able:
        return None, problem
    return _choose(rule, fields, able, load=load, sent=sent)


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


def _choose(
    rule: Rule, fields: Mapping[str, Any], able: tuple[str, ...], *, load: Mapping[str, int], sent: int
) -> tuple[str | None, str]:
    if len(able) == 1:
        return able[0], "the only one it means"
    match rule.strategy:
        case "round-robin":
            return able[sent % len(able)], f"turn {sent + 1} of {len(able)} in turn"
        case "weighted":
            return _weighted(rule, able, sent)
        case "sticky":
            return _sticky(rule, fields, able)
    name = min(able, key=lambda one: (load.get(one, 0), one))
    return name, f"the least loaded of {len(able)}, with {load.get(name, 0)} open tasks"


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
