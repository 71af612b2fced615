"""`fleet audit`: who changed what, by which key, from where."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.client import PAGE, ControlPlane
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.cli.values import DURATION, url_option

MAX_VALUE_CHARS = 60


@click.command(cls=Command)
@click.option("--owner", metavar="WHO", help="Only what keys of person:<name>, service:<name> or an orchestrator did.")
@click.option("--key", metavar="ID", help="Only what this key did.")
@click.option("--kind", metavar="KIND", help="Only one kind of event, such as task_cancelled or key_revoked.")
@click.option("--orchestrator", metavar="NAME", help="Only what was done to this orchestrator, or to tasks of its.")
@click.option("--task", metavar="TASK", help="Only what was done to this task.")
@click.option("--since", type=DURATION, metavar="TIME", help="Only the newest, such as 24h or 7d; default: all.")
@click.option("--limit", type=click.IntRange(1, PAGE), default=20, show_default=True, help="At most so many.")
@url_option
def command(*, since: float | None, limit: int, url: str | None, **only: str | None) -> None:
    """Show who changed what over HTTP, newest first.

    Each line is an event; --json has what was there before and after. What daemons report of their own work is no
    audit: `fleet task show` and `fleet sql` have that.
    """
    asked: dict[str, Any] = {**only, "limit": limit}
    if since is not None:
        asked["since"] = (datetime.now(UTC) - timedelta(seconds=since)).isoformat()
    with ControlPlane.of(place().file, url=url) as plane:
        page = plane.get("/api/audit", asked)
    found, total = page["data"], page["pagination"]["total"]
    if place().json:
        output.write_json({"data": found, "total": total})
        return
    output.table(
        ("at", "who", "key", "from", "what", "of", "before", "why"),
        [
            (
                one["at"][:19],
                one["owner"],
                one["key"],
                one["address"],
                one["kind"],
                one["task"] or one["orchestrator"],
                _short(one["before"]),
                one["reason"],
            )
            for one in found
        ],
    )
    if total > len(found):
        output.say(f"{len(found)} of {total}; --limit and --since show others", err=True)


def _short(before: dict[str, Any] | None) -> str | None:
    """`{"status": "TODO"}` -> `status TODO`."""
    if not before:
        return None
    told = ", ".join(f"{name} {value}" for name, value in before.items() if not isinstance(value, dict | list))
    return told if len(told) <= MAX_VALUE_CHARS else f"{told[: MAX_VALUE_CHARS - 1]}…"
