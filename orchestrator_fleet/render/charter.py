"""What a charter becomes: its version, the prompt, Claude Code's settings, and the limits in force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator_fleet.errors import Diagnostic, SpecInvalid
from orchestrator_fleet.spec.model import CharterFront, Orchestrator, Safety
from orchestrator_fleet.spec.units import format_duration, format_size
from orchestrator_fleet.wire.documents import encode, sha256

TEMPLATE = "charter.md.j2"
VERSION_CHARACTERS = 12
MAX_PROMPT_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an orchestrator may use: the smaller of fleet.yaml and its charter; None is without limit."""

    sessions: int
    session_timeout_s: float
    session_memory_bytes: int | None
    tokens_per_hour: int | None
    usd_per_day: float | None


def version(front: dict[str, Any], prose: str) -> str:
    """12 hex digits that name a charter's content; `front` is its front matter as JSON."""
    return sha256(encode([front, prose]))[:VERSION_CHARACTERS]


def settings(safety: Safety) -> bytes:
    """`settings.json` for Claude Code: there, deny goes before ask, and ask before allow."""
    permissions = {
        "allow": safety.auto_approve,
        "ask": safety.escalate,
        "deny": safety.always_reject,
        # A session must not be able to talk its way out of these rules.
        "disableBypassPermissionsMode": "disable",
    }
    return encode({"permissions": permissions})


def limits(spec: Orchestrator, front: CharterFront) -> Limits:
    """The limits in force."""
    tokens = (spec.budget.tokens_per_hour if spec.budget else None, front.limits.tokens_per_hour)
    return Limits(
        sessions=min(spec.sessions.max, front.limits.sessions or spec.sessions.max),
        session_timeout_s=min(spec.sessions.timeout, front.limits.session_timeout or spec.sessions.timeout),
        session_memory_bytes=front.limits.memory,
        tokens_per_hour=min((count for count in tokens if count is not None), default=None),
        usd_per_day=spec.budget.usd_per_day if spec.budget else None,
    )


def template(own: Mapping[str, str]) -> Template:
    """The compiled prompt template: the fleet's own `templates/charter.md.j2`, or the one that comes with us.

    Raises `SpecInvalid` with the line where it does not compile.
    """
    return _compile(own[TEMPLATE]) if TEMPLATE in own else _compile(_packaged())


def prompt(
    compiled: Template,
    *,
    fleet: str,
    name: str,
    role: str,
    spec: Mapping[str, Any],
    front: Mapping[str, Any],
    prose: str,
    within: Limits,
) -> str:
    """`charter.md`: the system prompt of a session.

    A template sees `fleet`, `name`, `role`, `orchestrator` (its part of fleet.yaml), `charter` (its front matter),
    `prose` and `limits` (those in force), durations and sizes as people write them. Raises `SpecInvalid` for a
    template that names what is not there, or makes a text over 1 MiB.
    """
    try:
        text = compiled.render(
            fleet=fleet,
            name=name,
            role=role,
            orchestrator=spec,
            charter=front,
            prose=prose.strip(),
            limits=_written(within),
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _invalid(f"cannot be rendered for {name}: {error}", 0) from error
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise _invalid(f"makes {len(text)} characters for {name}, at most {MAX_PROMPT_CHARACTERS} are allowed", 0)
    return text.strip() + "\n"


def _written(within: Limits) -> dict[str, Any]:
    memory = within.session_memory_bytes
    return {
        "sessions": within.sessions,
        "session_timeout": format_duration(within.session_timeout_s),
        "session_memory": None if memory is None else format_size(memory),
        "tokens_per_hour": within.tokens_per_hour,
        "usd_per_day": None if within.usd_per_day is None else f"{within.usd_per_day:g}",
    }


@lru_cache(maxsize=1)
def _packaged() -> str:
    return resources.files(__package__).joinpath("templates", TEMPLATE).read_text(encoding="utf-8")


@lru_cache(maxsize=4)
def _compile(text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined,
        autoescape=False,  # a prompt is Markdown for a model, never HTML for a browser
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise _invalid(f"is not a template: {error.message}", error.lineno) from error


def _invalid(problem: str, line: int) -> SpecInvalid:
    column = 1 if line else 0
    return SpecInvalid([Diagnostic(file=f"templates/{TEMPLATE}", line=line, column=column, problem=problem)])
