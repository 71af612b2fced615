"""`fleet route explain`: why a task goes where it goes, by the rules of fleet.yaml as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.client import ControlPlane
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.values import PAIR, PRIORITIES, task_id, url_option
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.tasks.routing import STRATEGIES, Decision, Router

MAX_NAMED = 12


@click.group(cls=Group)
def command() -> None:
    """Explain which orchestrator a task goes to."""


@command.command("explain")
@click.option("--task", "known", metavar="TASK", help="A task that exists; else describe one:")
@click.option("--title", default="a task", metavar="TEXT", help="Its title.")
@click.option("--description", metavar="TEXT", help="Its description.")
@click.option("--priority", type=click.Choice(PRIORITIES, case_sensitive=False), default="MEDIUM", help="Its class.")
@click.option("--discipline", metavar="NAME", help="Its trade.")
@click.option("--orchestrator", metavar="NAME", help="The orchestrator it names itself.")
@click.option("--tag", "tags", multiple=True, metavar="WORD", help="A free word; repeatable.")
@click.option("--metadata", multiple=True, type=PAIR, help="More about it; repeatable.")
@url_option
def explain(*, known: str | None, url: str | None, **given: Any) -> int:
    """Show each rule, why it matched or not, and who is chosen when all are idle.

    Exit 1 when nobody is. The rules are those of fleet.yaml as it stands, applied or not.
    """
    router = Router.of_spec(load_fleet(place().file).file.model_dump(mode="json", by_alias=True))
    task = _existing(known, url) if known else _described(given)
    decision = router.route(task)
    if place().json:
        output.write_json(_as_json(decision, router))
    else:
        _print(decision, router)
    return EXIT_DONE if decision.orchestrator else EXIT_FAILED


def _described(given: dict[str, Any]) -> dict[str, Any]:
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    return {**fields, "metadata": dict(fields["metadata"])}


def _existing(known: str, url: str | None) -> dict[str, Any]:
    """A task as it is, but for the orchestrator that routing has given it: that would explain itself."""
    with ControlPlane.of(place().file, url=url) as plane:
        task: dict[str, Any] = plane.get(f"/api/tasks/{task_id(known)}")
    return {**task, "orchestrator": None} if task.get("route") not in (None, "explicit") else task


def _as_json(decision: Decision, router: Router) -> dict[str, Any]:
    strategies = {rule.name: rule.strategy for rule in router.rules}
    return {
        "orchestrator": decision.orchestrator,
        "rule": decision.rule,
        "reason": decision.reason,
        "strategy": strategies.get(decision.rule or ""),
        "considered": [
            {
                "rule": one.rule,
                "matched": one.matched,
                "reason": one.reason,
                "strategy": strategies[one.rule],
                "among": list(one.among),
            }
            for one in decision.considered
        ],
    }


def _print(decision: Decision, router: Router) -> None:
    asked = {considered.rule for considered in decision.considered}
    rows = [(c.rule, "matched" if c.matched else "no", c.reason) for c in decision.considered]
    rows += [(rule.name, "-", "not asked: an earlier rule matched") for rule in router.rules if rule.name not in asked]
    if rows and decision.considered:
        output.table(("rule", "matches", "why"), rows)
        output.say()
    if not decision.orchestrator:
        output.say(f"-> nobody: {decision.reason}; the task waits until a rule is applied that sends it somewhere")
        return
    output.say(f"-> {decision.orchestrator} (by {decision.rule}: {decision.reason})")
    among = decision.considered[-1].among if decision.considered else ()
    if len(among) > 1:
        strategy = next(rule.strategy for rule in router.rules if rule.name == decision.rule)
        output.say(f"   {strategy} among {_names(among)}: {STRATEGIES[strategy]}")


def _names(among: Sequence[str]) -> str:
    more = f" and {len(among) - MAX_NAMED} more" if len(among) > MAX_NAMED else ""
    return ", ".join(among[:MAX_NAMED]) + more
