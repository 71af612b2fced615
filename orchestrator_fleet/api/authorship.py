"""Who a commit is by, and the words it carries: what `git log` tells of a change that came over the API."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator_fleet.api.asking import Asked
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.orchestrators.access import KnownKey
from orchestrator_fleet.reconcile.declare import Author
from orchestrator_fleet.spec.charters import read_charter
from orchestrator_fleet.spec.folder import Folder
from orchestrator_fleet.spec.model import Identity

WIDTH = 72
_CRUD = re.compile(r"[<>\x00-\x1f\x7f]")
_TRAILER = re.compile(r"^([A-Za-z0-9-]+):(?=\s)")


def author(key: KnownKey, *, fleet: str, identity: Identity | None = None) -> Author:
    """The key's owner as git names people; an orchestrator with an `identity` in its charter is that."""
    mailbox = re.sub(r"[:@]", ".", key.owner)
    name = _plain(identity.name if identity else None) or key.owner
    email = _plain(identity.email if identity else None) or f"{mailbox}@{fleet}.invalid"
    return Author(name=name, email=email)


def _plain(text: str | None) -> str:
    """Without what git's author lines can't hold."""
    return _CRUD.sub("", text or "").strip()


def author_of(plane: Plane, key: KnownKey) -> Author:
    """The author of what this key's owner does now. Reads the charter of an orchestrator, so: in a thread."""
    spec = plane.control.orchestrators.get(key.owner)
    identity = None if spec is None else _identity(spec, home=plane.fleet_file.parent)
    return author(key, fleet=plane.control.doc.fleet, identity=identity)


def _identity(spec: Mapping[str, Any], *, home: Path) -> Identity | None:
    try:
        return read_charter(Folder(home), spec["charter"]).front.identity
    except SpecInvalid:
        return None


def body(request: Asked, *, reason: str) -> str:
    """A commit's text below its subject: why, by whom, and the trailers that lead back to the request."""
    key = request.auth
    request_id = request.scope.get("state", {}).get("request_id", "")
    paragraphs = [*_prose(reason), _filled(f"Asked for by {key.owner} over the API.")]
    return "\n\n".join([*paragraphs, f"Fleet-Key: {key.id}\nRequest-Id: {request_id}"]) + "\n"


def _prose(reason: str) -> list[str]:
    """What somebody wrote, wrapped; none of its lines can be read as a trailer of ours."""
    parts = re.split(r"\n\s*\n", "".join(c if c.isprintable() or c == "\n" else " " for c in reason))
    return [_no_trailers(_filled(part)) for part in parts if part.strip()]


def _no_trailers(paragraph: str) -> str:
    return "\n".join(_TRAILER.sub(r"\1 :", line) for line in paragraph.split("\n"))


def _filled(paragraph: str) -> str:
    return textwrap.fill(" ".join(paragraph.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def subject(start: str, parts: Sequence[str]) -> str:
    """`start: a, b and 2 more`: as many of the parts as fit on one line of a log."""
    text = start
    for number, part in enumerate(parts):
        glue, left = ", " if number else ": ", len(parts) - number
        more = f" and {left - 1} more" if left > 1 else ""
        if len(text) + len(glue) + len(part) + len(more) > WIDTH:
            return f"{text} and {left} more" if number else f"{text}: {left} change{'s' if left > 1 else ''}"
        text += glue + part
    return text
