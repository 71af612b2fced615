"""`fleet vp`: orchestrators as the control plane sees them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.client import ControlPlane
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.values import DURATION, url_option
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, ControlPlaneError
from orchestrator_fleet.ids import is_name

COLUMNS = ("name", "status", "discipline", "machine", "sessions", "open", "running", "seen", "reason")


@click.group(cls=Group)
def command() -> None:
    """List, show, pause and resume orchestrators."""


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
    _check(name)
    with ControlPlane.of(place().file, url=url) as plane:
        vp = plane.get(f"/api/vps/{name}")
    if place().json:
        output.write_json(vp)
    else:
        output.fields(vp)


@command.command("pause")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--for", "for_s", type=DURATION, metavar="TIME", help="Resume by itself after that: 90s, 15m, 2h.")
@click.option("--until", metavar="TIME", help="Resume by itself then, RFC 3339.")
@click.option("--now", is_flag=True, help="Also end what runs; those tasks go back in line.")
@click.option("--reason", default="", metavar="TEXT", help="Shown to whoever asks why.")
@url_option
def pause(
    *, names: tuple[str, ...], for_s: float | None, until: str | None, now: bool, reason: str, url: str | None
) -> int:
    """Let orchestrators claim nothing until they are resumed; what runs is finished."""
    if for_s is not None and until is not None:
        raise click.UsageError("give --for or --until, not both")
    if for_s is not None:
        until = (datetime.now(UTC) + timedelta(seconds=for_s)).isoformat()
    body: dict[str, Any] = {"reason": reason, "drain": not now}
    return _switch(names, "deactivate", body if until is None else {**body, "until": until}, url)


@command.command("resume")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--reason", default="", metavar="TEXT", help="Kept with the event.")
@url_option
def resume(*, names: tuple[str, ...], reason: str, url: str | None) -> int:
    """Let orchestrators claim again: a pause ends, and a wait for a provider's quota."""
    return _switch(names, "activate", {"reason": reason}, url)


def _switch(names: tuple[str, ...], verb: str, body: dict[str, Any], url: str | None) -> int:
    """Do it to each; those that can't be are told, the others are done."""
    results, failed = [], 0
    for name in names:
        _check(name)
    with ControlPlane.of(place().file, url=url) as plane:
        for name in names:
            try:
                results.append({**plane.post(f"/api/vps/{name}/{verb}", body), "id": name, "ok": True})
            except ControlPlaneError as error:
                if not error.status:
                    raise
                failed += 1
                results.append({"id": name, "ok": False, "error": str(error)})
    if place().json:
        output.write_json({"results": results})
    for one in [] if place().json else results:
        if one["ok"]:
            unchanged = "" if one["changed"] else " (it was so already)"
            output.say(f"{one['id']}  {one['previous']} -> {one['status']}{unchanged}: {one['status_reason']}")
        else:
            output.say(f"{one['id']}  {one['error']}", err=True)
    return EXIT_FAILED if failed else EXIT_DONE


def _check(name: str) -> None:
    if not is_name(name):
        raise click.UsageError(f"got {name!r}, wanted an orchestrator's name")
