"""`fleet destroy`: take the fleet down. What was done stays, unless --data says otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.apply import print_report
from orchestrator_fleet.cli.client import running
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.cli.progress import RolloutProgress
from orchestrator_fleet.cli.values import yes_option
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, Refused
from orchestrator_fleet.reconcile.fleet import destroy
from orchestrator_fleet.reconcile.report import Result, RolloutFailed, to_json
from orchestrator_fleet.reconcile.state import State


@click.command(cls=Command)
@yes_option
@click.option("--data", is_flag=True, help="Also remove tasks, history and logs. There is no way back.")
def command(*, yes: bool, data: bool) -> int:
    """End every daemon, session and supervisord, and remove what apply made, on every machine.

    Tasks, history, keys and logs stay, so that a later apply goes on where this one ended; --data removes all but keys.
    A `fleet serve` goes on. A fleet.yaml that can't be read does not keep what runs on this host from being ended.
    """
    output.require_consent(yes=yes)
    state = State(place().file)
    served = running(state)
    if data and served is not None:
        raise Refused(f"`fleet serve` runs here, pid {served.pid}, and holds the data; end it first")
    what = "everything that runs, and all tasks, history and logs" if data else "everything that runs"
    if not (yes or output.confirmed(f"End and remove {what}?")):
        output.say("nothing was changed", err=True)
        return EXIT_FAILED
    try:
        with RolloutProgress(total=0) as progress:
            report = destroy(place().file, on_event=progress.tell)
    except RolloutFailed as failed:
        print_report(failed.report)
        raise
    if data:
        remove_data(state)
    if place().json:
        output.write_json(to_json(report))
    else:
        down = report.having(Result.APPLIED)
        took = f"{output.count(len(down), 'target')} taken down in {output.span(report.seconds)}"
        output.say(took if down else "nothing was there to take down")
    if served is not None:
        output.say(f"`fleet serve` still runs here, pid {served.pid}; Ctrl-C or `kill {served.pid}` ends it", err=True)
    return EXIT_DONE


def remove_data(state: State) -> None:
    """Remove what this host keeps of the fleet's past: the embedded store, history and logs. Keys stay."""
    for file in (state.store, state.history):
        for path in (file, *(Path(f"{file}{suffix}") for suffix in ("-wal", "-shm", ".wal"))):
            path.unlink(missing_ok=True)
    for folder in (state.history_folder, state.log):
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in (state.serve_file, state.serve_lock):
        leftover.unlink(missing_ok=True)
    if state.dir.is_dir() and not any(state.dir.iterdir()):
        state.dir.rmdir()
