"""`fleet vp`: orchestrators as the control plane sees them."""

from __future__ import annotations

from typing import Any

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.client import ControlPlane
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.values import url_option
from orchestrator_fleet.ids import is_name

COLUMNS = ("name", "status", "discipline", "machine", "sessions", "open", "running", "seen", "reason")


@click.group(cls=Group)
def command() -> None:
    """List and show orchestrators as the control plane sees them."""


@command.command("list")
@click.option(
    "--status",
    multiple=True,
    type=click.Choice(("ONLINE", "OFFLINE", "BUSY", "AWAY"), case_sensitive=False),
    help="Repeatable.",
)
@click.option("--discipline", multiple=True, metavar="NAME", help="Repeatable.")
@click.option("--machine", multiple=True, metavar="NAME", help="Repeatable.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="At most so many.")
@url_option
def list_(*, limit: int, url: str | None, **filters: tuple[str, ...]) -> None:
    """List orchestrators: status, machine, work."""
    with ControlPlane.of(place().file, url=url) as plane:
        vps, total = plane.list("/api/vps", {k: list(v) for k, v in filters.items()}, limit=limit)
    if place().json:
        output.write_json({"data": vps, "total": total})
        return
    output.table(COLUMNS, [_row(vp) for vp in vps])
    if total > len(vps):
        output.say(f"{len(vps)} of {total}; --limit shows more", err=True)


def _row(vp: dict[str, Any]) -> tuple[Any, ...]:
    spec, backlog = vp.get("spec") or {}, vp.get("backlog") or {}
    limit = (spec.get("sessions") or {}).get("max", "-")
    return (
        vp["id"],
        vp["status"],
        spec.get("discipline"),
        vp.get("machine"),
        f"{len(vp.get('sessions') or [])}/{limit}",
        backlog.get("open"),
        backlog.get("in_progress"),
        output.age(vp.get("last_seen_at")),
        vp.get("status_reason"),
    )


@command.command("show")
@click.argument("name")
@url_option
def show(*, name: str, url: str | None) -> None:
    """Show one orchestrator: its declaration, state and sessions."""
    if not is_name(name):
        raise click.UsageError(f"got {name!r}, wanted an orchestrator's name")
    with ControlPlane.of(place().file, url=url) as plane:
        vp = plane.get(f"/api/vps/{name}")
    if place().json:
        output.write_json(vp)
    else:
        output.fields(vp)
