"""`fleet vp`: orchestrators as the control plane sees them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import rich_click as click

from orchestrator_fleet.cli import insight, output
from orchestrator_fleet.cli.client import ControlPlane
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.values import DURATION, url_option
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, ControlPlaneError
from orchestrator_fleet.ids import is_name

ACT_TIMEOUT_S = 60.0  # a restart is answered after 30 s at the latest
COLUMNS = ("name", "status", "discipline", "machine", "sessions", "open", "running", "seen", "reason")


@click.group(cls=Group)
def command() -> None:
    """List, show, pause, drain and restart orchestrators, and talk to them."""


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
        "; ".join([*(f"{one['action']} since {output.age(one['at'])}" for one in vp["actions"]), vp["status_reason"]]),
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


command.add_command(pause, "deactivate")
command.add_command(resume, "activate")


@command.command("drain")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--reason", default="", metavar="TEXT", help="Shown to whoever asks why.")
@url_option
def drain(*, names: tuple[str, ...], reason: str, url: str | None) -> int:
    """Pause orchestrators; `vp actions` shows when their last session has ended."""
    return _switch(names, "actions", {"action": "drain", "reason": reason}, url)


@command.command("restart")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--reason", default="", metavar="TEXT", help="Kept with the action.")
@url_option
def restart(*, names: tuple[str, ...], reason: str, url: str | None) -> int:
    """Restart orchestrators' daemons, one after the other; their sessions go on."""
    return _switch(names, "actions", {"action": "restart", "reason": reason}, url)


@command.command("stop-sessions")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--reason", default="", metavar="TEXT", help="Kept with the action and its tasks.")
@url_option
def stop_sessions(*, names: tuple[str, ...], reason: str, url: str | None) -> int:
    """End what runs; those tasks go back in line, and may be claimed at once."""
    return _switch(names, "actions", {"action": "stop_sessions", "reason": reason}, url)


@command.command("actions")
@click.argument("name")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="At most so many.")
@url_option
def actions(*, name: str, limit: int, url: str | None) -> None:
    """Show what was done to an orchestrator, newest first."""
    _check(name)
    with ControlPlane.of(place().file, url=url) as plane:
        done, total = plane.list(f"/api/vps/{name}/actions", limit=limit)
    if place().json:
        output.write_json({"data": done, "total": total})
        return
    rows = [
        (output.age(one["at"]), one["action"], one["state"], one["by"], one["reason"], one["detail"]) for one in done
    ]
    output.table(("age", "action", "state", "by", "reason", "detail"), rows)
    if total > len(done):
        output.say(f"{len(done)} of {total}; --limit shows more", err=True)


@command.command("say")
@click.argument("name")
@click.argument("to")
@click.argument("text")
@click.option("--task", metavar="TASK", help="What it is about.")
@click.option("--thread", metavar="CONVERSATION", help="Go on with this one.")
@url_option
def say(*, name: str, to: str, text: str, task: str | None, thread: str | None, url: str | None) -> None:
    """Say something in an orchestrator's name: to another, to human:NAME, or to #CHANNEL."""
    _check(name)
    body = {"to": to, "content": text, "task": task, "thread": thread}
    with ControlPlane.of(place().file, url=url) as plane:
        said = plane.post(f"/api/vps/{name}/conversations/initiate", body)
    if place().json:
        output.write_json(said)
        return
    message = said["message"]
    output.say(f"{message['id']}  {message['state']}  {name} to {message['to']} in {message['conversation']}")


@command.command("inbox")
@click.argument("name")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="At most so many.")
@url_option
def inbox(*, name: str, limit: int, url: str | None) -> None:
    """Show what an orchestrator has not been told yet, oldest first."""
    _check(name)
    with ControlPlane.of(place().file, url=url) as plane:
        waiting, total = plane.list(f"/api/vps/{name}/inbox", limit=limit)
    if place().json:
        output.write_json({"data": waiting, "total": total})
        return
    rows = [(one["id"], output.age(one["at"]), one["kind"], *_gist(one["data"])) for one in waiting]
    output.table(("notice", "age", "kind", "from", "task", "about"), rows)
    if total > len(waiting):
        output.say(f"{len(waiting)} of {total}; --limit shows more", err=True)


def _gist(data: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Who, which task, and what they said of it."""
    return data.get("from"), data.get("task"), data.get("content") or data.get("note") or data.get("reason")


@command.command("status")
@click.argument("name")
@click.option("--post", metavar="TEXT", help="Post a status update in its name.")
@click.option("--kind", type=click.Choice(("progress", "blocked", "completed", "info")), help="Of the update.")
@click.option("--task", metavar="TASK", help="What the update is about.")
@click.option("--channel", metavar="CHANNEL", help="Tell the update there, too.")
@url_option
def status(*, name: str, post: str | None, url: str | None, **of_post: str | None) -> None:
    """Show what an orchestrator does and says of it, or post an update."""
    _check(name)
    given = {field: value for field, value in of_post.items() if value is not None}
    if post is None and given:
        raise click.UsageError(f"--{next(iter(given))} is of an update; give its text with --post")
    with ControlPlane.of(place().file, url=url) as plane:
        path = f"/api/vps/{name}/status"
        answer = plane.get(path) if post is None else plane.post(path, {"message": post, **given})
    if place().json:
        output.write_json(answer)
    elif post is not None:
        output.say(f"{answer['id']}  {answer['kind']}  {answer['message']}")
    else:
        output.say(f"{name}  {answer['status']}: {answer['status_reason']}")
        for session in answer["current"]:
            output.say(f"runs {session['task']} since {output.age(session['since'])}")
        told = [(output.age(one["at"]), one["kind"], one["task"], one["message"]) for one in answer["updates"]]
        if told:
            output.table(("age", "kind", "task", "message"), told)


command.add_command(insight.conflicts)
command.add_command(insight.resolve)
command.add_command(insight.analytics)


def _switch(names: tuple[str, ...], verb: str, body: dict[str, Any], url: str | None) -> int:
    """Do it to each; those that can't be are told, the others are done."""
    results, failed = [], 0
    for name in names:
        _check(name)
    with ControlPlane.of(place().file, url=url) as plane:
        for name in names:
            try:
                done = plane.post(f"/api/vps/{name}/{verb}", body, timeout_s=ACT_TIMEOUT_S)
            except ControlPlaneError as error:
                if not error.status:
                    raise
                failed += 1
                results.append({"id": name, "ok": False, "error": str(error)})
            else:
                is_failed = done.get("outcome") == "failed"
                failed += is_failed
                results.append({"action_id": done["id"], **done, "id": name, "ok": not is_failed})
    if place().json:
        output.write_json({"results": results})
    for one in [] if place().json else results:
        output.say(_said(one), err=not one["ok"])
    return EXIT_FAILED if failed else EXIT_DONE


def _said(one: dict[str, Any]) -> str:
    """What came of it, in a line."""
    if "error" in one:
        return f"{one['id']}  {one['error']}"
    if "state" in one:
        return f"{one['id']}  {one['action']} {one['state']}: {one['detail'] or 'it goes on'}"
    unchanged = "" if one["changed"] else " (it was so already)"
    return f"{one['id']}  {one['previous']} -> {one['status']}{unchanged}: {one['status_reason']}"


def _check(name: str) -> None:
    if not is_name(name):
        raise click.UsageError(f"got {name!r}, wanted an orchestrator's name")
