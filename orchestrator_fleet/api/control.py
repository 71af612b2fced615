"""What the control plane works by: control.json of the applied generation, read into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.orchestrators.access import KnownKey, declared
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.rules import Rules
from orchestrator_fleet.wire.documents import CONTROL, ControlDoc

MAX_CONTROL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One applied generation of the control plane.

    `keys`: those of people and services, by id. `dispatch`: its routing rules and retry policies. `rules`: what binds
    claims.
    """

    generation: str
    doc: ControlDoc
    keys: Mapping[str, KnownKey]
    dispatch: Dispatch
    rules: Rules

    @property
    def orchestrators(self) -> Mapping[str, Mapping[str, Any]]:
        """Declared orchestrators with defaults merged, by name."""
        section: Mapping[str, Mapping[str, Any]] = self.doc.spec["orchestrators"]
        return section


def current_generation(root: Path) -> str | None:
    """The digest that the `current` link names, None before the first apply."""
    try:
        return (root / "current").readlink().name
    except OSError:
        return None


def load(root: Path, generation: str) -> Control:
    """Read one generation; raises FleetError when it is not readable."""
    path = root / "generations" / generation / CONTROL
    try:
        data = path.read_bytes()
        doc = msgspec.json.decode(data, type=ControlDoc) if len(data) <= MAX_CONTROL_BYTES else None
    except (OSError, msgspec.DecodeError) as error:
        raise FleetError(f"{path}: cannot be read: {error}; run `fleet apply`") from error
    if doc is None:
        raise FleetError(f"{path}: {len(data)} bytes is more than {MAX_CONTROL_BYTES}; it is not one of ours")
    return Control(
        generation=generation,
        doc=doc,
        keys=declared(doc.spec.get("keys") or {}),
        dispatch=Dispatch.of_spec(doc.spec),
        rules=Rules.of_spec(doc.spec, within=doc.limits),
    )
