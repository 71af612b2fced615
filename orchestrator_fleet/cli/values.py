"""Kinds of values on the command line, and the options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
PRIORITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW")
STATUSES = ("TODO", "IN_PROGRESS", "BLOCKED", "DONE", "CANCELLED")
BLOCKED_REASONS = ("dependency", "approval", "escalation", "quota", "budget", "attempts_exhausted", "manual")


class _Duration(click.ParamType[float]):
    """`90s`, `15m`, `2h`, `7d`, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds; a default is given as such."""
        if isinstance(value, float):
            return value
        from orchestrator_fleet.spec.units import parse_duration  # noqa: PLC0415 - pydantic, 60 ms

        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Pair(click.ParamType[tuple[str, str]]):
    """`name=value`."""

    name = "k=v"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """(name, value)."""
        name, sign, text = str(value).partition("=")
        if not sign or not name:
            self.fail(f"got {value!r}, wanted name=value", param, ctx)
        return name, text


DURATION, PAIR = _Duration(), _Pair()


def url_option(function: F) -> F:
    """`--url`, else FLEET_URL."""
    return click.option(
        "--url", envvar="FLEET_URL", show_envvar=True, metavar="URL", help="The control plane [control_plane.url]."
    )(function)


def _names(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> list[str] | None:
    """`("m01,m02", "m03")` -> the names; None when the option is not used."""
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if given and not names:
        raise click.UsageError("--only: names no machine")
    return names or None


def only_option(function: F) -> F:
    """`--only m01,m02`: some machines, and the control plane."""
    return click.option(
        "--only", multiple=True, metavar="m01,...", callback=_names, help="These machines alone, and the control plane."
    )(function)


def allow_deletes_option(function: F) -> F:
    """`--allow-deletes`: lift rollout.max_deletes for this once."""
    return click.option(
        "--allow-deletes", is_flag=True, help="Delete more orchestrators than rollout.max_deletes allows."
    )(function)


def yes_option(function: F) -> F:
    """`--yes`: don't ask."""
    return click.option("--yes", is_flag=True, help="Don't ask; needed where nobody can answer.")(function)


def task_id(text: str) -> str:
    """A task's id, safe in a URL."""
    if not text or not all(c.isascii() and (c.isalnum() or c == "-") for c in text):
        raise click.UsageError(f"got {text!r}, wanted a task's id such as task-01kcs...")
    return text
