"""What every command shares: the options `-f`, `-C` and `--json`, and commands that are imported when called.

The shared options are accepted before and after the subcommand; the last one given wins. They stand in the
click context's `meta`, and commands read them as one value, `place()`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click as plain
import rich_click as click

from orchestrator_fleet.cli.output import is_terminal

DEFAULT_FILE = "fleet.yaml"
_FILE, _JSON = "orchestrator_fleet.file", "orchestrator_fleet.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Which fleet, and how to answer. `file` is absolute; it may not exist."""

    file: Path
    json: bool


def place() -> Place:
    """The shared options of the running command."""
    meta = plain.get_current_context().meta
    return Place(file=Path(meta.get(_FILE, DEFAULT_FILE)).absolute(), json=bool(meta.get(_JSON)))


def _enter(_ctx: plain.Context, _param: plain.Parameter, folder: str | None) -> None:
    if folder is None:
        return
    try:
        os.chdir(folder)
    except OSError as error:
        problem = f"-C {folder}: {error.strerror}; name a folder that exists"
        raise plain.UsageError(problem) from None


def _keep_file(ctx: plain.Context, _param: plain.Parameter, file: str | None) -> None:
    if file is not None:
        ctx.meta[_FILE] = file


def _keep_json(ctx: plain.Context, _param: plain.Parameter, asked: bool) -> None:  # noqa: FBT001 - click's callback form
    if asked:
        ctx.meta[_JSON] = True


def shared_options(*, taken: set[str]) -> list[plain.Parameter]:
    """The three options; a short form that the command uses itself (`logs -f`) is left to it."""
    forms = {
        name: [form for form in (short, name) if form not in taken]
        for short, name in (("-f", "--file"), ("-C", "--directory"))
    }
    # -C is eager: it is entered before any other path of the same command is read.
    return [
        plain.Option(
            forms["--file"], metavar="FILE", expose_value=False, callback=_keep_file, help="The fleet [./fleet.yaml]."
        ),
        plain.Option(
            forms["--directory"],
            metavar="DIR",
            expose_value=False,
            is_eager=True,
            callback=_enter,
            help="Run as if started in DIR.",
        ),
        plain.Option(
            ["--json"], is_flag=True, expose_value=False, callback=_keep_json, help="Answer in JSON; errors too."
        ),
    ]


def plain_usage(command: plain.Command, ctx: plain.Context) -> str:
    """The line `Usage: ...`, as errors show it."""
    formatter = plain.HelpFormatter()
    plain.Command.format_usage(command, ctx, formatter)
    return formatter.getvalue().rstrip("\n")


def plain_help(command: plain.Command, ctx: plain.Context) -> str:
    """Help for a pipe: no frames, no escape codes, and rich is not imported."""
    formatter = plain.HelpFormatter()
    plain.Command.format_usage(command, ctx, formatter)
    plain.Command.format_help_text(command, ctx, formatter)
    plain.Command.format_options(command, ctx, formatter)
    if isinstance(command, plain.Group):
        plain.Group.format_commands(command, ctx, formatter)
    plain.Command.format_epilog(command, ctx, formatter)
    return formatter.getvalue().rstrip("\n")


class Command(click.RichCommand):
    """A command with the shared options; its help is drawn by rich on a terminal, and plain in a pipe."""

    def __init__(self, *args: Any, params: list[plain.Parameter] | None = None, **kwargs: Any) -> None:
        own = list(params or [])
        taken = {form for param in own for form in param.opts}
        kwargs["params"] = [*own, *shared_options(taken=taken)]
        super().__init__(*args, **kwargs)

    def get_help(self, ctx: plain.Context) -> str:
        """The help as text."""
        return super().get_help(ctx) if is_terminal(sys.stdout) else plain_help(self, ctx)

    def get_usage(self, ctx: plain.Context) -> str:
        """The usage line."""
        return plain_usage(self, ctx)


class Group(click.RichGroup):
    """Commands under one word (`fleet task ...`), with the shared options."""

    command_class = Command

    def __init__(self, *args: Any, params: list[plain.Parameter] | None = None, **kwargs: Any) -> None:
        kwargs["params"] = [*(params or []), *shared_options(taken=set())]
        super().__init__(*args, **kwargs)

    def list_commands(self, ctx: plain.Context) -> list[str]:
        """In the order they are declared, which is the order people need them."""
        del ctx
        return list(self.commands)

    def get_help(self, ctx: plain.Context) -> str:
        """The help as text."""
        return super().get_help(ctx) if is_terminal(sys.stdout) else plain_help(self, ctx)

    def get_usage(self, ctx: plain.Context) -> str:
        """The usage line."""
        return plain_usage(self, ctx)


@dataclass(frozen=True, slots=True)
class Lazy:
    """Where a command is (`module` has it as `command`), and its line in `fleet --help`."""

    module: str
    summary: str


class LazyGroup(Group):
    """A group whose commands are imported when called; its help prints the table alone."""

    def __init__(self, *args: Any, table: Mapping[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table
        for name, lazy in table.items():
            self.add_command(click.RichCommand(name=name, help=lazy.summary))

    def resolve_command(
        self, ctx: plain.Context, args: list[str]
    ) -> tuple[str | None, plain.Command | None, list[str]]:
        """The real command behind the name on the command line."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, found and self.load(name), rest

    def load(self, name: str | None) -> plain.Command:
        """Import a command."""
        command: plain.Command = importlib.import_module(self.table[name or ""].module).command
        return command
