"""What was applied here before, as the control plane's generations tell: fleet.yaml may say otherwise by now.

Only the little that finding a machine needs is read. A generation that can't be read tells nothing.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator_fleet.machines import generations
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.wire.documents import CONTROL

MAX_BYTES = 64 << 20


class Machine(msgspec.Struct, kw_only=True, frozen=True):
    """Where a machine stood."""

    address: str = "local"
    root: str | None = None


class _Spec(msgspec.Struct, kw_only=True, frozen=True):
    machines: dict[str, Machine]


class Applied(msgspec.Struct, kw_only=True, frozen=True):
    """The part of a control.json that says where its machines stood."""

    fleet: str
    spec: _Spec


_decoder = msgspec.json.Decoder(Applied)


def read(control_root: Path) -> list[Applied]:
    """Every generation of the control plane that is still there, the current one first."""
    layout = Layout(control_root)
    current = generations.current(layout)
    digests = sorted(generations.present(layout), key=lambda digest: digest != current)
    return [found for digest in digests if (found := _read(layout.generation(digest) / CONTROL)) is not None]


def _read(path: Path) -> Applied | None:
    try:
        with path.open("rb") as file:
            return _decoder.decode(file.read(MAX_BYTES))
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None
