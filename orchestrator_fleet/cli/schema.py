"""`fleet schema`: the JSON Schema of fleet.yaml, for editors."""

from __future__ import annotations

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import Command


@click.command(cls=Command)
def command() -> None:
    """Print the JSON Schema of fleet.yaml.

    `fleet schema > fleet.schema.json`, and as the first line of fleet.yaml
    `# yaml-language-server: $schema=fleet.schema.json`.
    """
    from orchestrator_fleet.spec.schema import json_schema  # noqa: PLC0415 - pydantic's schemas, only here

    output.write_json(json_schema())
