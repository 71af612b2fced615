"""`fleet vp conflicts`, `resolve` and `analytics`: what stands against what, and how an orchestrator did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.client import PAGE, ControlPlane
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.cli.values import url_option
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.wire.vps import Bucket, ConflictType, Range

OF_A_BUCKET = ("completed", "failed", "cancelled", "success_rate", "lead_time_s", "run_time_s", "tokens", "usd")
SHARES = ("success_rate", "on_time_rate")
MINUTE_CHARS = len("2026-01-01T00:00")


@click.command("conflicts", cls=Command)
@click.option("--type", "types", multiple=True, type=click.Choice(get_args(ConflictType)), help="Repeatable.")
@click.option("--resolved", is_flag=True, help="Also those that somebody has resolved.")
@click.option("--limit", type=click.IntRange(1, PAGE), default=PAGE, show_default=True, help="At most so many.")
@url_option
def conflicts(*, types: tuple[str, ...], resolved: bool, limit: int, url: str | None) -> None:
    """List what stands against what now, and what may end it."""
    asked = {"type": list(types), "resolved": "true" if resolved else None, "limit": limit}
    with ControlPlane.of(place().file, url=url) as plane:
        page = plane.get("/api/vps/conflicts", asked)
    found, total = page["data"], page["pagination"]["total"]
    if place().json:
        output.write_json({"data": found, "total": total, "truncated": page["truncated"]})
        return
    rows = [
        (
            one["id"],
            output.age(one["since"]),
            ", ".join(one["orchestrators"]),
            ", ".join(one["tasks"]),
            one["suggestion"]["text"] if one["resolved"] is None else f"resolved by {one['resolved']['by']}",
        )
        for one in found
    ]
    output.table(("conflict", "age", "orchestrators", "tasks", "what to do"), rows)
    if total > len(found):
        output.say(f"{len(found)} of {total}; --type narrows it", err=True)
    if page["truncated"]:
        output.say("there is more than is looked at; there may be more conflicts than these", err=True)


@click.command("resolve", cls=Command)
@click.argument("conflict")
@click.option("--note", default="", metavar="TEXT", help="What was decided.")
@url_option
def resolve(*, conflict: str, note: str, url: str | None) -> None:
    """Say that a conflict is decided: it is left out of the list from then on."""
    if "/" in conflict or not conflict:
        raise click.UsageError(f"got {conflict!r}, wanted a conflict's id, as `fleet vp conflicts` lists them")
    with ControlPlane.of(place().file, url=url) as plane:
        shown = plane.post(f"/api/vps/conflicts/{conflict}/resolve", {"note": note})
    if place().json:
        output.write_json(shown)
    else:
        output.say(f"{shown['id']}  resolved by {shown['resolved']['by']}")


@click.command("analytics", cls=Command)
@click.argument("name")
@click.option("--range", "span", type=click.Choice(get_args(Range)), default="7d", show_default=True, help="Up to now.")
@click.option(
    "--bucket", type=click.Choice(get_args(Bucket)), default="day", show_default=True, help="A row each of these."
)
@url_option
def analytics(*, name: str, span: str, bucket: str, url: str | None) -> None:
    """Show how an orchestrator did: what it completed, how long that took, what it cost."""
    if not is_name(name):
        raise click.UsageError(f"got {name!r}, wanted an orchestrator's name")
    with ControlPlane.of(place().file, url=url) as plane:
        told = plane.get(f"/api/vps/{name}/analytics", {"range": span, "bucket": bucket})
    if place().json:
        output.write_json(told)
        return
    before = told["previous"] or {}
    rows = [
        (metric, _shown(metric, value), _shown(metric, before.get(metric)), told["trend"][metric])
        for metric, value in told["summary"].items()
    ]
    output.table(("metric", span, "before", "trend"), rows)
    output.say()
    series = [(one["start"][:MINUTE_CHARS], *(_shown(of, one[of]) for of in OF_A_BUCKET)) for one in told["series"]]
    output.table((bucket, *OF_A_BUCKET), series)


def _shown(metric: str, value: Any) -> str | None:
    """A metric for people: shares in percent, of percentiles all three."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return None if value["p50"] is None else " / ".join(f"{value[name]:.1f}" for name in ("p50", "p90", "p99"))
    if metric in SHARES:
        return f"{value:.1%}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
