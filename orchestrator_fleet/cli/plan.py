"""`fleet plan`: what apply would do, and why. Changes nothing anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.cli.values import allow_deletes_option, only_option
from orchestrator_fleet.errors import EXIT_CHANGES, EXIT_DONE, FleetError
from orchestrator_fleet.plan import show
from orchestrator_fleet.plan.model import Plan
from orchestrator_fleet.reconcile.fleet import plan_fleet


@click.command(cls=Command)
@click.option("-o", "--out", metavar="FILE", help="Also save the plan; `fleet apply FILE` does exactly that.")
@click.option(
    "--format",
    "form",
    type=click.Choice(("text", "json", "markdown")),
    default="text",
    show_default=True,
    help="markdown: a comment for a pull request.",
)
@click.option("--exit-code", is_flag=True, help="Exit 2 when there is something to do.")
@only_option
@allow_deletes_option
def command(*, out: str | None, form: str, exit_code: bool, only: list[str] | None, allow_deletes: bool) -> int:
    """Show what apply would do, and why: per machine, orchestrator and field.

    Exit codes: 0, or with --exit-code 0 nothing to do, 2 changes; 1 error, 3 refused.
    """
    plan = plan_fleet(place().file, only=only, allow_deletes=allow_deletes).plan
    if out is not None:
        save(plan, Path(out))
    form = "json" if place().json else form
    if form == "json":
        output.write(show.to_json(plan).decode())
    elif form == "markdown":
        output.write(show.markdown(plan))
    else:
        output.write(show.text(plan, color=output.colour(sys.stdout)))
    if out is not None and form == "text":
        output.say(f"saved to {out}; `fleet apply {out}` does exactly this, or refuses when something has moved")
    return EXIT_CHANGES if exit_code and not plan.empty else EXIT_DONE


def save(plan: Plan, path: Path) -> None:
    """Write plan.json; raises FleetError."""
    try:
        path.write_bytes(show.to_json(plan))
    except OSError as error:
        raise FleetError(f"{path}: {error.strerror}; the plan was not saved") from None
