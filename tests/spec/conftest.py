"""Fleet folders made to measure: the smallest sound fleet, with parts put in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

CHARTER = "---\nrole: CTO\n---\nYou run technology at Acme.\n"
MACHINES = "machines:\n  m01: {labels: {zone: a}}\n  m02: {labels: {zone: b}}\n"
ORCHESTRATORS = "orchestrators:\n  vp-cto: {charter: charters/cto.md}\n  vp-eng: {charter: charters/cto.md}\n"
HEAD = "version: 1\nfleet: acme\n"

WriteFleet = Callable[..., Path]


@pytest.fixture
def write_fleet(tmp_path: Path) -> WriteFleet:
    """Write a fleet folder; answers with the path of its fleet.yaml."""

    def write(
        more: str = "",
        *,
        machines: str = MACHINES,
        orchestrators: str = ORCHESTRATORS,
        head: str = HEAD,
        files: Mapping[str, str | bytes] | None = None,
    ) -> Path:
        every = {"charters/cto.md": CHARTER, "fleet.yaml": head + machines + orchestrators + more, **(files or {})}
        for name, content in every.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / "fleet.yaml"

    return write
