"""`fleet task`: tasks, over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from orchestrator_fleet.cli import output, submission
from orchestrator_fleet.cli.client import ControlPlane
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.progress import ProgressLine
from orchestrator_fleet.cli.values import DURATION, PAIR, PRIORITIES, STATUSES, task_id, url_option
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, ControlPlaneError, FleetError

COLUMNS = ("id", "status", "priority", "orchestrator", "age", "title")
MAX_FILE_BYTES = 64 << 20


def _word(*words: str) -> click.Choice[str]:
    return click.Choice(words, case_sensitive=False)


@click.group(cls=Group)
def command() -> None:
    """Add, list, show, follow, cancel and retry tasks."""


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
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items() if v not in (None, ())}
    if source is None:
        if "title" not in fields:
            raise click.UsageError("give --title, or --from FILE")
        if "metadata" in fields:
            fields["metadata"] = dict(fields["metadata"])
        return [fields]
    if fields:
        raise click.UsageError(f"--from takes all fields from the file; drop {', '.join(f'--{n}' for n in fields)}")
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
        return "no orchestrator: no rule matched"
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
@click.option("--status", multiple=True, type=_word(*STATUSES), help="Repeatable.")
@click.option("--priority", multiple=True, type=_word(*PRIORITIES), help="Repeatable.")
@click.option("--orchestrator", multiple=True, metavar="NAME", help="Repeatable.")
@click.option("--discipline", multiple=True, metavar="NAME", help="Repeatable.")
@click.option("--tag", multiple=True, metavar="WORD", help="Repeatable.")
@click.option("-q", "--text", "q", metavar="TEXT", help="Words in the title or description.")
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


@command.command("logs")
@click.argument("task")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task ends.")
@url_option
def logs(*, task: str, follow: bool, url: str | None) -> None:
    """Print what the task's sessions wrote; --follow goes on live."""
    with ControlPlane.of(place().file, url=url) as plane:
        path = f"/api/tasks/{task_id(task)}/log"
        if follow:
            for event, data in plane.events(path, {"follow": "true"}):
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


@command.command("cancel")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option("--reason", default="", metavar="TEXT", help="Kept with the event.")
@url_option
def cancel(*, tasks: tuple[str, ...], reason: str, url: str | None) -> int:
    """Cancel tasks; a running session is ended."""
    return _each(tasks, url, lambda plane, task: plane.post(f"/api/tasks/{task}/cancel", {"reason": reason}))


@command.command("retry")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option("--reason", default="", metavar="TEXT", help="Kept with the event.")
@url_option
def retry(*, tasks: tuple[str, ...], reason: str, url: str | None) -> int:
    """Do tasks again: blocked ones go back in line, ended ones become new tasks."""
    return _each(tasks, url, lambda plane, task: plane.post(f"/api/tasks/{task}/retry", {"reason": reason}))
