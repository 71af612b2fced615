"""`fleet apply`: make the machines match; show the plan first, then how it goes, then what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.cli.main import EXIT_INTERRUPTED
from orchestrator_fleet.cli.progress import RolloutProgress
from orchestrator_fleet.cli.values import allow_deletes_option, only_option, yes_option
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, FleetError
from orchestrator_fleet.plan import show
from orchestrator_fleet.plan.model import Plan
from orchestrator_fleet.reconcile.fleet import Planned, apply_plan, plan_again, plan_fleet
from orchestrator_fleet.reconcile.report import ApplyReport, Result, RolloutFailed, RolloutReverted, to_json


@click.command(cls=Command)
@click.argument("saved_plan", required=False, metavar="[PLAN]")
@yes_option
@only_option
@allow_deletes_option
def command(*, saved_plan: str | None, yes: bool, only: list[str] | None, allow_deletes: bool) -> int:
    """Make the machines match fleet.yaml: plan, ask, do it in health-gated batches, report.

    With PLAN (of `fleet plan -o PLAN`) exactly that is done, or refused when something has moved since. Ctrl-C once
    finishes the machines in hand, twice aborts. Exit codes: 0 done, 1 failed, 3 refused, 4 rolled back.
    """
    if saved_plan is not None and only is not None:
        raise click.UsageError("PLAN says which machines; drop --only, or make the plan with --only")
    output.require_consent(yes=yes)
    fleet_file = place().file
    saved = _read(Path(saved_plan)) if saved_plan is not None else None
    if saved is None:
        planned = plan_fleet(fleet_file, only=only, allow_deletes=allow_deletes)
    else:
        planned = plan_again(fleet_file, saved, allow_deletes=allow_deletes)
    if not place().json:
        output.write(show.text(planned.plan, color=output.colour(sys.stdout)))
    if not (yes or planned.plan.empty or output.confirmed("Apply this?")):
        output.say("nothing was changed", err=True)
        return EXIT_FAILED
    try:
        report = _apply(planned, saved)
    except (RolloutFailed, RolloutReverted) as failed:
        print_report(failed.report)
        if failed.report.interrupted:
            output.say(str(failed), err=True)
            return EXIT_INTERRUPTED
        raise
    print_report(report)
    return EXIT_DONE


def _read(path: Path) -> Plan:
    try:
        with path.open("rb") as file:
            return show.from_json(file.read(show.MAX_PLAN_BYTES + 1))
    except OSError as error:
        raise FleetError(f"{path}: {error.strerror}; make a plan with `fleet plan -o {path}`") from None


def _apply(planned: Planned, saved: Plan | None) -> ApplyReport:
    """Do it, and tell meanwhile; an empty plan still brings the daemons' keys to a store that lacks them."""
    touched = {action.target for action in planned.plan.actions if action.kind != "no-op"}
    with RolloutProgress(total=len(touched)) as progress:
        return apply_plan(planned, saved=saved, on_event=progress.tell)


def print_report(report: ApplyReport) -> None:
    """What became of each target; those with nothing to do are only counted."""
    if place().json:
        output.write_json(to_json(report))
        return
    changed = [outcome for outcome in report.outcomes.values() if outcome.result is not Result.UNCHANGED]
    if changed:
        output.say()
        output.table(
            ("target", "result", "generation", "took", "reason"),
            [(o.target, o.result.value, (o.generation or "")[:12], output.span(o.seconds), o.reason) for o in changed],
        )
    counts = {result: len(report.having(result)) for result in Result}
    told = ", ".join(f"{number} {result.value.replace('_', ' ')}" for result, number in counts.items() if number)
    output.say(f"\n{told or 'nothing to do'} in {output.span(report.seconds)}")
