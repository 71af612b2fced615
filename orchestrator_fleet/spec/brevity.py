"""What has to be written so that an entry reads as wanted: as little as a person would write.

A client that edits what it was shown sends every value, defaults and all. Written down so, the next change of a default
would reach nobody. So values that are there anyway are left out, and what stands in the file stays as it stands, in its
own spelling: `30m` and `1800s` are one value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orchestrator_fleet.spec.diagnose import validate
from orchestrator_fleet.spec.merge import with_defaults
from orchestrator_fleet.spec.model import Orchestrator, OrchestratorDefaults
from orchestrator_fleet.spec.yaml_tree import MappingNode, Place, tree_of

Raw = dict[str, Any]
Path = tuple[str, ...]

_NOWHERE = Place(file="", line=0, column=0)
_FIRST = ("charter", "discipline", "role", "machine", "placement", "labels", "runner", "sessions")
# Said, it binds whoever polls; as a default it is the daemon's own.
_SAYS_MORE_WRITTEN: Path = ("sessions", "max")


def entry(wanted: Raw, *, name: str, before: Raw | None, defaults: OrchestratorDefaults) -> Raw:
    """What to write for the orchestrator `name`, so that it reads as `wanted` would.

    `before`: the entry as it stands in the file, if it does. A `wanted` that is not sound is answered as it is.
    """

    def reads(raw: Raw) -> Raw | None:
        return merged(raw, name=name, defaults=defaults)

    goal = reads(wanted)
    if goal is None:
        return wanted
    draft = _with_old_words(wanted, before or {}, (), lambda raw: reads(raw) == goal)
    draft = _without_idle_words(draft, before, (), lambda raw: reads(raw) == goal)
    known = list(before or {}) + [key for key in _FIRST if key not in (before or {})]
    return {key: draft[key] for key in sorted(draft, key=lambda key: known.index(key) if key in known else len(known))}


def merged(raw: Raw, *, name: str, defaults: OrchestratorDefaults) -> Raw | None:
    """An entry with the defaults under it, as the API shows it; None when it is not sound."""
    inherited = defaults.model_dump(mode="json", by_alias=True, exclude_unset=True)
    tree = tree_of({"defaults": inherited, "orchestrators": {name: raw}}, at=_NOWHERE)
    section = with_defaults(tree)[0].child("orchestrators") if isinstance(tree, MappingNode) else None
    own = section.child(name) if isinstance(section, MappingNode) else None
    checked = validate(Orchestrator, own) if isinstance(own, MappingNode) else None
    if checked is None or checked.value is None or checked.problems:
        return None
    return checked.value.model_dump(mode="json", by_alias=True)


def _with_old_words(draft: Raw, before: Raw, at: Path, still: Callable[[Raw], bool]) -> Raw:
    """Put back what was written before, wherever it still says the same."""
    for key, old in _get(before, at).items():
        path = (*at, key)
        if still(trial := _put(draft, path, old)):
            draft = trial
        elif isinstance(old, dict) and isinstance(_get(draft, at).get(key), dict):
            draft = _with_old_words(draft, before, path, still)
    return draft


def _without_idle_words(draft: Raw, before: Raw | None, at: Path, still: Callable[[Raw], bool]) -> Raw:
    """Leave out what would be so anyway, and was not written before."""
    written = _get(before or {}, at)
    for key, value in list(_get(draft, at).items()):
        path = (*at, key)
        meant = before is None and _SAYS_MORE_WRITTEN[: len(path)] == path and _has(draft, _SAYS_MORE_WRITTEN)
        if key not in written and not meant and still(trial := _put(draft, path, _NOTHING)):
            draft = trial
        elif isinstance(value, dict) and (key not in written or isinstance(written[key], dict)):
            draft = _without_idle_words(draft, before, path, still)
    return draft


_NOTHING: Any = object()


def _get(raw: Raw, at: Path) -> Raw:
    for key in at:
        inner = raw.get(key)
        raw = inner if isinstance(inner, dict) else {}
    return raw


def _has(raw: Raw, path: Path) -> bool:
    return path[-1] in _get(raw, path[:-1])


def _put(raw: Mapping[str, Any], path: Path, value: Any) -> Raw:
    """A copy with another value at a path, or none."""
    key, below = path[0], path[1:]
    if below:
        return {**raw, key: _put(raw[key], below, value)}
    if value is _NOTHING:
        return {name: inner for name, inner in raw.items() if name != key}
    return {**raw, key: value}
