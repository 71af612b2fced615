"""`fleet sql`: the history in SQL, asked of the control plane while it runs, else of the file itself."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from typing import Any

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.client import ControlPlane, key_of, running
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.cli.values import url_option
from orchestrator_fleet.errors import ControlPlaneError, FleetError
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.wire.http import MAX_SQL_ROWS

MAX_QUERY_BYTES = 100_000  # the API's own limit


@click.command(cls=Command)
@click.argument("query")
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "csv", "json")),
    default="table",
    show_default=True,
    help="How rows are printed.",
)
@click.option("--limit", type=click.IntRange(1, MAX_SQL_ROWS), default=1_000, show_default=True, help="Rows at most.")
@url_option
def command(*, query: str, form: str, limit: int, url: str | None) -> None:
    """Ask the history anything: `fleet sql "select status, count(*) from tasks group by 1"`.

    Tables: tasks, attempts, events, orchestrators; `fleet sql "show tables"` lists them all. The query is read-only;
    - reads it from stdin. The answer has everything up to now, whether `fleet serve` runs or not.
    """
    text = sys.stdin.read(MAX_QUERY_BYTES + 1) if query == "-" else query
    answer = _ask(text, url=url, limit=limit)
    form = "json" if place().json else form
    if form == "json":
        output.write_json({"columns": answer.columns, "rows": answer.rows, "truncated": answer.more})
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer.rows)
    else:
        output.table(answer.columns, answer.rows)
    if answer.more:
        output.say(f"the first {len(answer.rows)} rows; --limit shows more", err=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`more`: rows were left out."""

    columns: list[str]
    rows: list[list[Any]]
    more: bool


def _ask(query: str, *, url: str | None, limit: int) -> Answer:
    """The answer of whoever holds the history now."""
    served = running(State(place().file))
    where = url or (served.url if served is not None else None)
    if where is not None:
        try:
            with ControlPlane(url=where, key=key_of(place().file)) as plane:
                answer = plane.post("/api/sql", {"query": query, "limit": limit})
            return Answer(columns=answer["columns"], rows=answer["rows"], more=answer["truncated"])
        except ControlPlaneError as error:
            # serve.json of a control plane that was killed: the file is free then, unless a URL was asked for
            if url is not None or error.code != "unreachable":
                raise
    return _read(query, limit=limit)


def _read(query: str, *, limit: int) -> Answer:
    """Bring what is in the store to the history file, and ask that."""
    from orchestrator_fleet.history.door import ask_files  # noqa: PLC0415 - duckdb, only without a control plane

    state = State(place().file)
    url = state.store_url(store_of(state))
    if url.startswith("sqlite") and not state.store.exists() and not state.history.exists():
        raise FleetError(f"{state.dir}: no history yet; it begins with the first `fleet serve`")
    result = ask_files(url, state.history, query, limit=limit)
    return Answer(columns=result.columns, rows=result.rows, more=result.truncated)


def store_of(state: State) -> str:
    """`control_plane.store` as applied, else as fleet.yaml has it."""
    from orchestrator_fleet.api.control import current_generation, load  # noqa: PLC0415 - only without a control plane

    generation = current_generation(state.control_root)
    if generation is not None:
        return str(load(state.control_root, generation).doc.spec["control_plane"]["store"])
    from orchestrator_fleet.spec.load import load_fleet  # noqa: PLC0415 - only before the first apply

    return load_fleet(state.fleet_file).file.control_plane.store
