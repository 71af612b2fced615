"""What a client wants an orchestrator to be: its body read, tried on the fleet as it stands, all that is wrong told.

The same words as in fleet.yaml, with the same errors: an unknown key has its `did you mean`, a charter has to be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from orchestrator_fleet.api import declaring
from orchestrator_fleet.api.bodies import MAX_ERRORS
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.errors import Diagnostic, Invalid, SpecInvalid
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.reconcile.declare import Declaration, Edit, NewFile, Section
from orchestrator_fleet.spec import brevity
from orchestrator_fleet.spec.folder import Folder
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.model import Fleet, FleetFile
from orchestrator_fleet.spec.references import WORDS_OF_API
from orchestrator_fleet.spec.suggest import path_text, shown
from orchestrator_fleet.wire.nesting import is_too_deep
from orchestrator_fleet.wire.vps import MAX_CHARTER_CHARS

SECTION: Section = "orchestrators"
_NAME_WORDS = "a name of a-z, 0-9 and -, starting with a letter, at most 63 characters"
_STAND_IN = "a-name-that-is-still-to-be-given"

Field = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An orchestrator as a client wants it. `charter_text` is that of a new charter, if there is to be one."""

    name: str
    value: dict[str, Any]
    charter_text: str | None = None

    @property
    def charter(self) -> Any:
        """The path of its charter, as it was sent."""
        return self.value.get("charter")


def read_new(plane: Plane, body: dict[str, Any]) -> Wanted:
    """The body of a new orchestrator; raises Invalid with every wrong field. Reads files, so: in a thread."""
    value = dict(body)
    name, text = value.pop("name", None), value.pop("charter_text", None)
    wrong = list(_wrong_texts(body))
    if "name" not in body:
        wrong.append(("name", f"is required: {_NAME_WORDS}"))
    elif not isinstance(name, str) or not is_name(name):
        wrong.append(("name", f"got {shown(name)}, wanted {_NAME_WORDS}"))
    elif name in WORDS_OF_API:
        wrong.append(("name", f"got {name}, which is a word of the API's own; take another"))
    if text is not None:
        wrong += _wrong_charter(text, value.get("charter"), Folder(plane.fleet_file.parent))
    named = name if isinstance(name, str) and is_name(name) else _STAND_IN
    wanted = Wanted(name=named, value=value, charter_text=text if isinstance(text, str) else None)
    _refuse(plane, wanted, wrong)
    return wanted


def read_spec(plane: Plane, vp: str, body: dict[str, Any]) -> Wanted:
    """The body that takes the place of an orchestrator's spec; raises Invalid. Reads files, so: in a thread."""
    value = dict(body)
    wrong = list(_wrong_texts(body))
    if value.pop("name", vp) != vp:
        wrong.append(("name", f"got {shown(body['name'])}, wanted {vp}: an orchestrator keeps its name"))
    wanted = Wanted(name=vp, value=value)
    _refuse(plane, wanted, wrong)
    return wanted


def _refuse(plane: Plane, wanted: Wanted, wrong: list[Field]) -> None:
    """Raise Invalid when something is wrong, with all that is wrong beside it."""
    if not wrong:
        return
    if not any(message == _TOO_DEEP for _, message in wrong):
        try:
            now = load_fleet(plane.fleet_file).file
        except SpecInvalid:
            raise Invalid(wrong[:MAX_ERRORS]) from None  # what is wrong with the fleet is told when the body is right
        try:
            _try(plane, wanted, now=now)
        except SpecInvalid as more:
            wrong += [one for one in _fields(wanted, more.diagnostics) if one[0] not in dict(wrong)]
    raise Invalid(wrong[:MAX_ERRORS])


def tried(plane: Plane, wanted: Wanted, found: Declaration) -> dict[str, Any]:
    """The spec that it would have, defaults merged, as GET shows it; raises Invalid with all that is wrong with it."""
    try:
        fleet = _try(plane, wanted, now=found.fleet)
    except SpecInvalid as wrong:
        raise Invalid(_fields(wanted, wrong.diagnostics)[:MAX_ERRORS]) from None
    return spec_of(fleet.file, wanted.name)


def spec_of(file: FleetFile, name: str) -> dict[str, Any]:
    """An orchestrator's spec with defaults merged, as GET shows it."""
    return file.orchestrators[name].model_dump(mode="json", by_alias=True)


def reads_as(wanted: Wanted, spec: dict[str, Any], found: Declaration) -> bool:
    """Whether what is declared is what is wanted already: an earlier request did it, whose answer got lost."""
    return brevity.merged(wanted.value, name=wanted.name, defaults=found.fleet.defaults) == spec


def edits(wanted: Wanted, found: Declaration) -> list[Edit | NewFile]:
    """What to write for it: no more than a person would."""
    before = found.raw(SECTION, wanted.name)
    value = brevity.entry(wanted.value, name=wanted.name, before=before, defaults=found.fleet.defaults)
    new: list[Edit | NewFile] = [Edit(section=SECTION, name=wanted.name, value=value)]
    if wanted.charter_text is not None:
        new.append(NewFile(path=wanted.charter, text=_ended(wanted.charter_text)))
    return new


def _try(plane: Plane, wanted: Wanted, *, now: FleetFile) -> Fleet:
    has_new_charter = wanted.charter_text is not None and isinstance(wanted.charter, str)
    files = {wanted.charter: _ended(wanted.charter_text or "")} if has_new_charter else {}
    return declaring.tried(plane, now=now, entries={SECTION: {wanted.name: wanted.value}}, files=files)


def _fields(wanted: Wanted, found: Sequence[Diagnostic]) -> list[Field]:
    """Diagnostics by the body's own fields; what is wrong elsewhere because of it keeps its place in fleet.yaml."""
    own = f"{SECTION}.{wanted.name}"
    fields = []
    for one in found:
        if one.path == own or one.path.startswith((f"{own}.", f"{own}[")):
            field = one.path.removeprefix(own).removeprefix(".") or "body"
        elif one.file == wanted.charter:
            field = "charter_text" if wanted.charter_text is not None else "charter"
        else:
            field = one.path or one.file or "body"
        place = f"line {one.line}: " if field == "charter_text" and one.line else ""
        fields.append((field, place + (f"{one.problem}; {one.hint}" if one.hint else one.problem)))
    return fields


_TOO_DEEP = "is nested too deep; make it flatter"


def _wrong_texts(body: dict[str, Any]) -> Iterator[Field]:
    """What no text may have in it, and no JSON may be."""
    if is_too_deep(body):
        yield "body", _TOO_DEEP
        return
    for path, text in _texts(body, ()):
        if "\0" in text:
            yield path_text(path), "got a NUL character; leave it out"


def _texts(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every text in it, keys too, with its place."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key), key
            yield from _texts(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _texts(inner, (*path, number))


def _wrong_charter(text: Any, path: Any, folder: Folder) -> Iterator[Field]:
    """A new file is a charter and nothing else: no hook, no hidden file, no program."""
    if not isinstance(text, str):
        yield "charter_text", f"got {shown(text)}, wanted text"
    elif len(text) > MAX_CHARTER_CHARS:
        yield "charter_text", f"has {len(text)} characters, wanted at most {MAX_CHARTER_CHARS}"
    if isinstance(path, str):
        pure = PurePosixPath(path)
        hidden = any(part.startswith(".") for part in pure.parts)
        if pure.suffix != ".md" or hidden or str(pure) != path or not path.isprintable() or not folder.is_inside(path):
            yield "charter", f"got {shown(path)}, wanted a new Markdown file, such as charters/name.md"


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
