"""`fleet task`: tasks, over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click

from orchestrator_fleet.cli import output, submission
from orchestrator_fleet.cli.client import END, ControlPlane
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.progress import ProgressLine
from orchestrator_fleet.cli.values import BLOCKED_REASONS, DURATION, PAIR, PRIORITIES, STATUSES, task_id, url_option
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, ControlPlaneError, FleetError

COLUMNS = ("id", "status", "priority", "orchestrator", "age", "title")
MAX_FILE_BYTES = 64 << 20
F = TypeVar("F", bound=Callable[..., Any])


def _word(*words: str) -> click.Choice[str]:
    return click.Choice(words, case_sensitive=False)


def _filters(function: F) -> F:
    """The options that choose tasks, as `GET /api/tasks` does."""
    options = (
        click.option("--status", multiple=True, type=_word(*STATUSES), help="Repeatable."),
        click.option("--blocked-reason", multiple=True, type=_word(*BLOCKED_REASONS), help="Repeatable."),
        click.option("--priority", multiple=True, type=_word(*PRIORITIES), help="Repeatable."),
        click.option("--orchestrator", multiple=True, metavar="NAME", help="Repeatable."),
        click.option("--discipline", multiple=True, metavar="NAME", help="Repeatable."),
        click.option("--tag", multiple=True, metavar="WORD", help="Repeatable."),
        click.option("-q", "--text", "q", metavar="TEXT", help="Words in the title or description."),
        click.option("--due-before", metavar="TIME", help="RFC 3339."),
        click.option("--due-after", metavar="TIME", help="RFC 3339."),
        click.option("--created-after", metavar="TIME", help="RFC 3339."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.group(cls=Group)
def command() -> None:
    """Add, list, show, follow, decide on, cancel and retry tasks."""


@command.command("add")
@click.option("--title", metavar="TEXT", help="What to do, in a line.")
@click.option("--description", metavar="TEXT", help="What to do, in full.")
@click.option("--priority", type=_word(*PRIORITIES), help="Its class [MEDIUM].")
@click.option("--discipline", metavar="NAME", help="Its trade; routing sends tasks by it.")
@click.option("--orchestrator", metavar="NAME", help="Who gets it; default: by routing.")
@click.option("--tag", "tags", multiple=True, metavar="WORD", help="A free word; repeatable.")
@click.option("--metadata", multiple=True, type=PAIR, help="More about it; repeatable.")
@click.option("--depends-on", multiple=True, metavar="TASK", help="A task that must be done first; repeatable.")
@click.option("--due", "due_at", metavar="TIME", help="When it should be done, RFC 3339.")
@click.option("--not-before", "available_at", metavar="TIME", help="When it may begin, RFC 3339.")
@click.option("--estimate", "estimate_s", type=DURATION, help="How long it takes: 90s, 15m, 2h.")
@click.option("--max-attempts", type=click.IntRange(1, 100), help="Attempts before it waits for a person.")
@click.option("--idempotency-key", metavar="TEXT", help="The same key and task again creates nothing new.")
@click.option("--from", "source", metavar="FILE", help="Many tasks: a JSON list of the API's fields; - is stdin.")
@click.option("--wait", is_flag=True, help="Wait until done; exit 1 unless all are DONE.")
@click.option("--timeout", type=DURATION, default=600.0, show_default="10m", help="The longest --wait.")
@url_option
def add(
    *, source: str | None, wait: bool, timeout: float, url: str | None, idempotency_key: str | None, **given: Any
) -> int:
    """Add a task, or many with --from.

    Items of --from may have `ref`, a name of their own, and `after`, refs that must be done first.
    """
    items = _items(source, given)
    if idempotency_key and len(items) > 1:
        raise click.UsageError("--idempotency-key is for one task")
    with ControlPlane.of(place().file, url=url) as plane, ProgressLine() as line:
        tasks: list[submission.Task] = []

        def created(task: submission.Task) -> None:
            tasks.append(task)
            if len(items) > 1:
                line.show(f"{len(tasks)} of {len(items)} tasks submitted")

        submission.submit(plane, items, told=created, idempotency_key=idempotency_key)
        in_time = True
        if wait:
            tasks, in_time = submission.wait(
                plane, tasks, timeout_s=timeout, told=lambda now: line.show(submission.counts(now))
            )
    _print_added(tasks, many=source is not None)
    if not wait or submission.all_done(tasks):
        return EXIT_DONE
    if not in_time:
        output.say(f"not all done within {timeout:g} s: {submission.counts(tasks)}", err=True)
    return EXIT_FAILED


def _items(source: str | None, given: dict[str, Any]) -> list[submission.Task]:
    """The tasks that the command line names: one by options, or those of a file."""
    fields: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value not in (None, ())
    }
    if source is None:
        if "title" not in fields:
            raise click.UsageError("give --title, or --from FILE")
        if "metadata" in fields:
            fields["metadata"] = dict(fields["metadata"])
        if "estimate_s" in fields:
            fields["estimate_s"] = round(fields["estimate_s"])
        return [fields]
    if fields:
        options = [one.opts[0] for one in add.params if one.name in fields]
        raise click.UsageError(f"--from takes all fields from the file; drop {', '.join(options)}")
    return submission.parse(_read(source), name=source)


def _read(source: str) -> str:
    try:
        with sys.stdin.buffer if source == "-" else Path(source).open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise FleetError(f"{source}: more than {MAX_FILE_BYTES >> 20} MiB; split the file")
        return data.decode()
    except OSError as error:
        raise FleetError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FleetError(f"{source}: not UTF-8: {error.reason} at byte {error.start}") from None


def _print_added(tasks: list[submission.Task], *, many: bool) -> None:
    if place().json:
        output.write_json({"data": tasks} if many else tasks[0])
    elif many:
        _print_tasks(tasks)
    else:
        task = tasks[0]
        output.say(f"{task['id']}  {task['status']}  {_whereto(task)}")
        if task["status"] in ("DONE", "BLOCKED", "CANCELLED"):
            output.fields({"result": task.get("result"), "error": task.get("error")})


def _whereto(task: submission.Task) -> str:
    if not task.get("orchestrator"):
        return str(task.get("condition") or "nobody gets it")
    return f"{task['orchestrator']} (route {task['route']})" if task.get("route") else str(task["orchestrator"])


def _print_tasks(tasks: list[submission.Task]) -> None:
    output.table(
        COLUMNS,
        [
            (
                t["id"],
                t["status"],
                t["priority"],
                t.get("orchestrator"),
                output.age(t["created_at"]),
                t["title"],
            )
            for t in tasks
        ],
    )


@command.command("list")
@_filters
@click.option("--sort", type=_word("claim", "priority", "due_at", "created_at", "updated_at"), help="[claim]")
@click.option("--order", type=_word("asc", "desc"), help="Of --sort.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="At most so many.")
@url_option
def list_(*, limit: int, url: str | None, **filters: Any) -> None:
    """List tasks, in the order they will be claimed."""
    params = {name: list(value) if isinstance(value, tuple) else value for name, value in filters.items()}
    with ControlPlane.of(place().file, url=url) as plane:
        tasks, total = plane.list("/api/tasks", params, limit=limit)
    if place().json:
        output.write_json({"data": tasks, "total": total})
        return
    _print_tasks(tasks)
    if total > len(tasks):
        output.say(f"{len(tasks)} of {total}; --limit shows more", err=True)


@command.command("show")
@click.argument("task")
@click.option("--events", is_flag=True, help="Also what happened to it.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Of --events.")
@url_option
def show(*, task: str, events: bool, limit: int, url: str | None) -> None:
    """Show one task with its result."""
    with ControlPlane.of(place().file, url=url) as plane:
        found = plane.get(f"/api/tasks/{task_id(task)}")
        happened = plane.list(f"/api/tasks/{task_id(task)}/events", limit=limit)[0] if events else []
    if place().json:
        output.write_json({**found, "events": happened} if events else found)
        return
    output.fields(found)
    if events:
        output.say()
        output.table(
            ("at", "event", "attempt", "actor", "machine"),
            [(e.get("at"), e.get("kind"), e.get("attempt"), e.get("actor"), e.get("machine")) for e in happened],
        )


@command.command("why")
@click.argument("task")
@url_option
def why(*, task: str, url: str | None) -> None:
    """Say what holds a task, its place in line, and when it may begin."""
    with ControlPlane.of(place().file, url=url) as plane:
        found = plane.get(f"/api/tasks/{task_id(task)}/why")
    if place().json:
        output.write_json(found)
        return
    binding, line, estimate = found["binding"], found["place_in_line"], found["estimate"]
    output.say(f"{found['task']}  {found['status']}  {binding['kind']}: {binding['reason']}")
    told = {"place in line": None if line is None else f"{line['ahead']} of {line['of']} come before it"}
    if estimate is not None:
        told["may begin"] = f"{estimate['starts_at']} ({_based_on(estimate['based_on'])})"
    output.fields(told)
    others = found["holds"][1:]
    if others:
        output.say()
        output.table(("also held by", "until", "why"), [(one["kind"], one["until"], one["reason"]) for one in others])


def _based_on(known: dict[str, Any]) -> str:
    """What an estimate was made of."""
    slots = "" if known["slots"] is None else f", {known['running']} of {known['slots']} sessions taken"
    if known["mean_run_s"] is None:
        return f"{known['ahead']} ahead{slots}"
    return f"{known['ahead']} ahead{slots}, {known['mean_run_s']:g} s each in the last {known['attempts']}"


@command.command("events")
@click.argument("task")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task ends; a broken connection is taken up again.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Without --follow.")
@url_option
def events(*, task: str, follow: bool, limit: int, url: str | None) -> None:
    """Print what happened to a task, a line each; --follow goes on live."""
    path = f"/api/tasks/{task_id(task)}/events"
    with ControlPlane.of(place().file, url=url) as plane:
        if not follow:
            for happened in plane.list(path, limit=limit)[0]:
                _print_event(happened)
            return
        for kind, data in plane.events(path):
            if kind != END:
                _print_event(json.loads(data))


def _print_event(event: dict[str, Any]) -> None:
    if place().json:
        output.write(json.dumps(event, ensure_ascii=False) + "\n")
        return
    data = event.get("data") or {}
    attempt = f"attempt {event['attempt']}" if event.get("attempt") else ""
    where = event.get("machine") or event.get("orchestrator") or ""
    said = data.get("message") or data.get("reason") or data.get("error") or ""
    told = [event["at"], event["kind"], attempt, where, f"by {event['actor']}", output.cell(said) if said else ""]
    output.say("  ".join(word for word in told if word))
    sys.stdout.flush()


@command.command("logs")
@click.argument("task")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task ends; a broken connection is taken up again.")
@url_option
def logs(*, task: str, follow: bool, url: str | None) -> None:
    """Print what the task's sessions wrote; --follow goes on live."""
    with ControlPlane.of(place().file, url=url) as plane:
        path = f"/api/tasks/{task_id(task)}/log"
        if follow:
            for event, data in plane.events(path):
                if event == "log":
                    _print_piece(json.loads(data))
            return
        cursor = None
        while True:
            page = plane.get(path, {"limit": 100, "cursor": cursor})
            for piece in page["data"]:
                _print_piece(piece)
            cursor = page["pagination"]["next_cursor"]
            if not cursor:
                return


def _print_piece(piece: dict[str, Any]) -> None:
    """A piece of output: as JSON a line each; else its text, stderr to stderr."""
    if place().json:
        output.write(json.dumps(piece, ensure_ascii=False) + "\n")
        return
    stream = sys.stderr if piece.get("stream") == "stderr" else sys.stdout
    stream.write(output.printable(piece.get("text", "")))
    stream.flush()


def _each(tasks: tuple[str, ...], url: str | None, act: Callable[[ControlPlane, str], Any]) -> int:
    """Do the same to several tasks; those that can't be done are told, the others are done."""
    results, failed = [], 0
    with ControlPlane.of(place().file, url=url) as plane:
        for task in map(task_id, tasks):
            try:
                results.append({"id": task, "ok": True, "task": act(plane, task)})
            except ControlPlaneError as error:
                if not error.status:
                    raise
                failed += 1
                results.append({"id": task, "ok": False, "error": str(error)})
    if place().json:
        output.write_json({"results": results})
    else:
        for result in results:
            text = _outcome(result["id"], result["task"]) if result["ok"] else result["error"]
            output.say(f"{result['id']}  {text}", err=not result["ok"])
    return EXIT_FAILED if failed else EXIT_DONE


def _outcome(asked: str, task: submission.Task) -> str:
    """`CANCELLED`, or where doing it again made a new task `TODO as task-...`."""
    return str(task["status"]) if task["id"] == asked else f"{task['status']} as {task['id']}"


def _decide(verb: str, tasks: tuple[str, ...], reason: str, url: str | None) -> int:
    return _each(tasks, url, lambda plane, task: plane.post(f"/api/tasks/{task}/{verb}", {"reason": reason}))


def _many(action: str, tasks: tuple[str, ...], url: str | None, *, dry_run: bool, reason: str, **given: Any) -> int:
    """Do the same to the tasks that are named or that the filters choose, as many calls as that takes."""
    to = given.pop("to", None)
    chosen = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value}
    if bool(chosen) == bool(tasks):
        raise click.UsageError("name tasks, or choose them by --status, --orchestrator, ...; one of both")
    body: dict[str, Any] = {"action": action, "reason": reason, "dry_run": dry_run}
    if to is not None:
        body["orchestrator"] = to
    body |= {"filter": chosen} if chosen else {"task_ids": [task_id(task) for task in tasks]}
    done: dict[str, Any] = {"dry_run": dry_run, "matched": 0, "changed": 0, "failed": 0, "results": []}
    with ControlPlane.of(place().file, url=url) as plane:
        while True:
            answer = plane.post("/api/tasks/bulk", body)
            done["matched"] += len(answer["results"])
            for name in ("changed", "failed", "results"):
                done[name] += answer[name]
            if not place().json:
                _print_results(answer["results"])
            if answer["next_cursor"] is None:
                break
            body["cursor"] = answer["next_cursor"]
    if place().json:
        output.write_json(done)
    else:
        dry = " if this were no dry run" if dry_run else ""
        counts = f"{output.count(done['matched'], 'task')}, {done['changed']} changed, {done['failed']} refused"
        output.say(f"{counts}{dry}", err=True)
    return EXIT_FAILED if done["failed"] else EXIT_DONE


def _print_results(results: list[dict[str, Any]]) -> None:
    for one in results:
        if not one["ok"]:
            output.say(f"{one['id']}  {one['error']['message']}", err=True)
            continue
        made = f" as {one['task']}" if "task" in one else ""
        output.say(f"{one['id']}  {one['status']}{made}")


def _reason(function: F) -> F:
    return click.option("--reason", default="", metavar="TEXT", help="Kept with the event.")(function)


def _dry_run(function: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")(function)


@command.command("cancel")
@click.argument("tasks", nargs=-1, metavar="[TASK...]")
@_filters
@_dry_run
@_reason
@url_option
def cancel(*, tasks: tuple[str, ...], reason: str, dry_run: bool, url: str | None, **chosen: Any) -> int:
    """Cancel tasks: those named, or those that the options choose (without --status: open ones).

    A running session is ended.
    """
    if tasks and not dry_run and not any(chosen.values()):
        return _decide("cancel", tasks, reason, url)
    return _many("cancel", tasks, url, dry_run=dry_run, reason=reason, **chosen)


@command.command("retry")
@click.argument("tasks", nargs=-1, metavar="[TASK...]")
@_filters
@_dry_run
@_reason
@url_option
def retry(*, tasks: tuple[str, ...], reason: str, dry_run: bool, url: str | None, **chosen: Any) -> int:
    """Do tasks again: those named, or those that the options choose (without --status: BLOCKED ones).

    Blocked ones go back in line, ended ones become new tasks.
    """
    if tasks and not dry_run and not any(chosen.values()):
        return _decide("retry", tasks, reason, url)
    return _many("retry", tasks, url, dry_run=dry_run, reason=reason, **chosen)


@command.command("assign")
@click.argument("tasks", nargs=-1, metavar="[TASK...]")
@click.option("--to", required=True, metavar="NAME", help="The orchestrator that gets them.")
@_filters
@_dry_run
@_reason
@url_option
def assign(*, tasks: tuple[str, ...], to: str, reason: str, dry_run: bool, url: str | None, **chosen: Any) -> int:
    """Give tasks to an orchestrator: those named, or those that the options choose (without --status: open ones).

    Running ones are taken from their session first.
    """
    return _many("assign", tasks, url, dry_run=dry_run, reason=reason, to=to, **chosen)


@command.command("approve")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@_reason
@url_option
def approve(*, tasks: tuple[str, ...], reason: str, url: str | None) -> int:
    """Say yes to tasks that wait for an approval, an escalation or, past it, for a spent budget."""
    return _decide("approve", tasks, reason, url)


@command.command("reject")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@_reason
@url_option
def reject(*, tasks: tuple[str, ...], reason: str, url: str | None) -> int:
    """Say no to them: they are cancelled."""
    return _decide("reject", tasks, reason, url)


@command.command("unblock")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@_reason
@url_option
def unblock(*, tasks: tuple[str, ...], reason: str, url: str | None) -> int:
    """Put blocked tasks back in line; cancelled dependencies are waived."""
    return _decide("unblock", tasks, reason, url)
