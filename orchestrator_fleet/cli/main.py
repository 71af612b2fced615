"""`fleet`: the table of commands, and the one place where an error becomes a text and an exit code."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click
import rich_click

from orchestrator_fleet import __version__
from orchestrator_fleet.cli.command import Lazy, LazyGroup
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, FleetError, SpecInvalid

EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE
# A plan of a large fleet is millions of values that live until it is printed: the default thresholds walk over them
# again and again, which makes the cost grow faster than the fleet.
GC_THRESHOLDS = (50_000, 20, 100)
DEBUG = "FLEET_DEBUG"
_COMPLETION = "_FLEET_COMPLETE"
_MODULES = "orchestrator_fleet.cli"

TABLE = {
    "init": Lazy(f"{_MODULES}.init", "Scaffold a fleet: fleet.yaml, a charter, a runner, a CI workflow."),
    "validate": Lazy(f"{_MODULES}.validate", "Check fleet.yaml, charters and routing tests; print every error."),
    "schema": Lazy(f"{_MODULES}.schema", "Print the JSON Schema of fleet.yaml, for editors."),
    "plan": Lazy(f"{_MODULES}.plan", "Show what apply would do, and why."),
    "apply": Lazy(f"{_MODULES}.apply", "Make the machines match fleet.yaml."),
    "status": Lazy(f"{_MODULES}.status", "Show machines and programs as they are."),
    "destroy": Lazy(f"{_MODULES}.destroy", "Take the fleet down: leave no process and no file."),
    "serve": Lazy(f"{_MODULES}.serve", "Run the control plane: the HTTP API and the daemons' link."),
    "task": Lazy(f"{_MODULES}.task", "Add, list, show, follow, decide on, cancel and retry tasks."),
    "vp": Lazy(f"{_MODULES}.vp", "Show orchestrators; pause, drain, restart, talk to them; conflicts, analytics."),
    "route": Lazy(f"{_MODULES}.route", "Explain which orchestrator a task goes to."),
    "key": Lazy(f"{_MODULES}.key", "Create, rotate, revoke and list API keys."),
    "audit": Lazy(f"{_MODULES}.audit", "Show who changed what, by which key, from where."),
    "sql": Lazy(f"{_MODULES}.sql", "Ask the history anything, in SQL."),
    "store": Lazy(f"{_MODULES}.store", "Migrate, check, back up and restore the live database."),
}

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 changes found (plan --exit-code), 3 refused, 4 rolled back, 64 usage, "
    "130 interrupted.\n\n"
    "Environment: FLEET_URL and FLEET_KEY (the control plane and its key), FLEET_STATE (default: .fleet beside "
    "fleet.yaml), FLEET_STORE (the live database's URL), NO_COLOR, FLEET_DEBUG=1 (tracebacks)."
)


@rich_click.group(cls=LazyGroup, table=TABLE, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@rich_click.version_option(__version__, prog_name="fleet", message="%(prog)s %(version)s")
def root() -> None:
    """Declare a fleet of AI agents in fleet.yaml; make the machines match; give it work."""


def main() -> None:
    """The console script: run the command line and leave with its exit code."""
    if _COMPLETION in os.environ:
        root.main(prog_name="fleet")
    gc.set_threshold(*GC_THRESHOLDS)
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run a command line; answer with its exit code. Prints errors; raises nothing but SystemExit."""
    as_json = "--json" in argv  # also when the command line can't be parsed
    try:
        code = _invoke(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us is gone (`| head`): say nothing, and keep Python from flushing into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)  # noqa: T201 - the console is this module's output
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        return _report_click(error, as_json=as_json)
    except FleetError as error:
        _report(error, as_json=as_json)
        return error.exit_code
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _report_unforeseen(error, as_json=as_json)
        return EXIT_FAILED
    return code


def _invoke(argv: Sequence[str]) -> int:
    """Run the command; commands answer with an exit code or with None for done."""
    try:
        with root.make_context("fleet", list(argv)) as context:
            code = root.invoke(context)
    except click.exceptions.Exit as stop:  # --help, --version
        return stop.exit_code
    return code if isinstance(code, int) else EXIT_DONE


def _report_click(error: click.ClickException, *, as_json: bool) -> int:
    usage = isinstance(error, click.UsageError)
    if as_json:
        _print_error(error.format_message(), code="usage" if usage else "failed", as_json=True)
    else:
        error.show(sys.stderr)
    return EXIT_USAGE if usage else EXIT_FAILED


def _report(error: FleetError, *, as_json: bool) -> None:
    more: dict[str, Any] = {}
    if as_json and isinstance(error, SpecInvalid):
        from orchestrator_fleet.cli.output import diagnostics_json  # noqa: PLC0415 - only for this error

        more["diagnostics"] = diagnostics_json(error.diagnostics)
    _print_error(str(error), code=_code(error), as_json=as_json, **more)


def _report_unforeseen(error: Exception, *, as_json: bool) -> None:
    """A disk, a folder or its rights are for the user to mend; anything else is our bug."""
    if isinstance(error, OSError) and error.filename is not None:
        _print_error(f"{os.fsdecode(error.filename)}: {error.strerror}; mend that", code="os", as_json=as_json)
        return
    text = f"bug: {type(error).__name__}: {error}; run with {DEBUG}=1 for the traceback"
    _print_error(text, code="bug", as_json=as_json)


def _code(error: FleetError) -> str:
    """The API's word for it where there is one, else the error's own name: `StalePlan` -> `stale_plan`."""
    name = type(error).__name__
    snake = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
    return str(getattr(error, "code", "") or snake)


def _print_error(text: str, *, code: str, as_json: bool, **more: Any) -> None:
    if as_json:
        text = json.dumps({"error": {"code": code, "message": text, **more}})
    print(text, file=sys.stderr)  # noqa: T201 - the console is this module's output


if __name__ == "__main__":
    main()
