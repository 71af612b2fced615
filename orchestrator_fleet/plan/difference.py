"""What differs between the files of one orchestrator in two generations, and what that means for its daemon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from orchestrator_fleet.plan import authority, changes
from orchestrator_fleet.plan.authority import Authority
from orchestrator_fleet.plan.model import FieldChange
from orchestrator_fleet.render.bundle import Bundle
from orchestrator_fleet.wire.documents import Manifest, OrchestratorDoc, RunnerDoc
from orchestrator_fleet.wire.machine import Observed

MAX_PATHS_NAMED = 3
_TOLD_BY_AUTHORITY = frozenset({"sessions.max", "sessions.timeout", "budget.tokens_per_hour", "budget.usd_per_day"})


class _ProfileSpec(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    charter: str


class _Profile(msgspec.Struct, kw_only=True, frozen=True, gc=False):
    """The few fields of an orchestrator.json that introduce it; the rest isn't even decoded."""

    discipline: str
    role: str
    charter_version: str
    runner: RunnerDoc
    sessions_max: int
    spec: _ProfileSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """`program`: what must restart the daemon, in words; `wording`: only its charter's text differs."""

    fields: tuple[FieldChange, ...] = ()
    authority: Authority = authority.NONE
    program: str = ""
    runtime: str = ""
    wording: bool = False
    reason: str = ""

    @property
    def change(self) -> str:
        """The class of a change that restarts nothing."""
        if self.authority.gained:
            return "authority_gained"
        if self.authority.lost:
            return "authority_lost"
        return "charter_wording" if self.wording else "settings"

    def rather(self, change: str) -> str:
        """The class of an action of another nature; authority gained is never hidden by it."""
        return "authority_gained" if self.authority.gained else change


NONE = Difference()


def between(*, name: str, seen: Observed, manifest: Manifest | None, bundle: Bundle) -> Difference:
    """Compare the current generation of a machine with the one it ought to have, for one orchestrator."""
    folder, program_file = f"orchestrators/{name}/", f"programs/{name}.conf"
    had: Mapping[str, str] = manifest.files if manifest else {}
    wanted = bundle.manifest.files
    paths = [f"{folder}orchestrator.json", f"{folder}charter.md", f"{folder}settings.json", program_file]
    changed = [path for path in paths if had.get(path) != wanted[path]]
    if not changed:
        return NONE
    old, new = _read(seen.documents.get(paths[0])), msgspec.json.decode(bundle.files[paths[0]], type=OrchestratorDoc)
    if old is None:
        return Difference(reason=f"{', '.join(path.removeprefix(folder) for path in changed)} changed")
    told = tuple(_told(old, new))
    texts = tuple(_texts(folder, changed, seen, bundle))
    runtime = _runtime(seen.documents.get(program_file, b""), bundle.files[program_file])
    fields = (*told, *texts, *([runtime] if runtime else []))
    compared = authority.between(old, new)
    others = [field.path for field in told if not field.path.startswith("charter")]
    return Difference(
        fields=fields,
        authority=compared,
        program=_program(old, new, told),
        runtime=f"{runtime.path} {runtime.before} -> {runtime.after}" if runtime else "",
        wording=not others and any(field.path.startswith("charter") for field in fields),
        reason="; ".join(_reasons(compared, old, new, fields, others)),
    )


def profile(name: str, bundle: Bundle) -> tuple[FieldChange, ...]:
    """A new orchestrator in a few fields."""
    doc = msgspec.json.decode(bundle.files[f"orchestrators/{name}/orchestrator.json"], type=_Profile)
    shown = {
        "charter": f"{doc.spec.charter} ({doc.charter_version})",
        "discipline": doc.discipline,
        "role": doc.role,
        "runner": {doc.runner.type: list(doc.runner.command) or doc.runner.model},
        "sessions.max": doc.sessions_max,
    }
    return tuple(FieldChange(op="+", path=path, after=changes.shown(value)) for path, value in shown.items())


def _read(document: bytes | None) -> OrchestratorDoc | None:
    """A document as it is on the machine; None when it was not looked at or was written over."""
    try:
        return msgspec.json.decode(document, type=OrchestratorDoc) if document is not None else None
    except msgspec.DecodeError:
        return None


def _told(old: OrchestratorDoc, new: OrchestratorDoc) -> Iterator[FieldChange]:
    """Fields in the words of fleet.yaml and the charter's front matter; what is derived from them is left out."""
    yield from changes.between(_around(old), _around(new))
    yield from changes.between(old.spec, new.spec)
    yield from changes.between(old.charter, new.charter, path="charter")
    yield from changes.between(_assets(old), _assets(new))


def _around(doc: OrchestratorDoc) -> dict[str, str]:
    return {"control_plane.url": doc.control_url, "fleet": doc.fleet, "placed on": doc.machine}


def _assets(doc: OrchestratorDoc) -> dict[str, str]:
    return {f"file {path}": changes.digest_shown(digest) for path, digest in doc.assets.items()}


def _texts(folder: str, changed: list[str], seen: Observed, bundle: Bundle) -> Iterator[FieldChange]:
    charter = f"{folder}charter.md"
    if charter in changed and charter in seen.documents:
        yield changes.text_changed("charter.md", seen.documents[charter], bundle.files[charter])


def _runtime(before: bytes, after: bytes) -> FieldChange | None:
    """The first line of a program's file says which runtime wrote it, as `; orchestrator_fleet 0.1.0`."""
    old, new = (text.partition(b"\n")[0].decode(errors="replace").rpartition(" ")[2] for text in (before, after))
    return FieldChange(op="~", path="runtime", before=old, after=new) if old and old != new else None


def _program(old: OrchestratorDoc, new: OrchestratorDoc, told: tuple[FieldChange, ...]) -> str:
    if old.runner == new.runner:
        return ""
    paths = dict.fromkeys(field.path for field in told if field.path.partition(".")[0] == "runner")
    return _changed([*paths]) if paths else "other files of runner.command travel along"


def _reasons(
    compared: Authority, old: OrchestratorDoc, new: OrchestratorDoc, fields: tuple[FieldChange, ...], others: list[str]
) -> Iterator[str]:
    if compared.reason:
        yield compared.reason
        others = [path for path in others if path not in _TOLD_BY_AUTHORITY]
    if old.charter_version != new.charter_version:
        yield f"charter {old.charter_version} -> {new.charter_version}"
    elif any(field.path == "charter.md" for field in fields) and not others:
        yield "the prompt is rendered otherwise"
    if others:
        yield _changed(list(dict.fromkeys(others)))
    if not fields:
        yield "its documents are written in another form"


def _changed(paths: list[str]) -> str:
    more = len(paths) - MAX_PATHS_NAMED
    return f"{', '.join(paths[:MAX_PATHS_NAMED])}{f' and {more} more' if more > 0 else ''} changed"
