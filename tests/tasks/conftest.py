"""An empty desk on a fresh store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import Desk

from orchestrator_fleet.store.database import open_store


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """At 2026-01-01, with two orchestrators and one routing rule."""
    store = open_store(f"sqlite:///{tmp_path}/store.sqlite")
    yield Desk(store)
    store.close()
