"""`fleet serve`: the control plane, in this process, until it is told to stop."""

from __future__ import annotations

import rich_click as click

from orchestrator_fleet.cli.command import Command, place

MAX_PORT = 65_535


@click.command(cls=Command)
@click.option("--host", metavar="HOST", help="Where to listen [the host of control_plane.url].")
@click.option("--port", type=click.IntRange(0, MAX_PORT), help="0 takes any free one [the port of control_plane.url].")
def command(*, host: str | None, port: int | None) -> None:
    """Run the control plane: the HTTP API, the daemons' link, the history.

    Works by what was last applied; where nothing was, by fleet.yaml. Logs one JSON line a request. SIGTERM or Ctrl-C
    ends it; the daemons and their sessions go on and connect again.
    """
    from orchestrator_fleet.api.serve import serve  # noqa: PLC0415 - --help need not import the web server

    serve(place().file, host, port)
