"""An empty desk on a fresh store of either kind, as the tests of tasks have it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tasks"))

from desk import Desk

from orchestrator_fleet.store.database import open_store


@pytest.fixture
def desk(store_url: str) -> Iterator[Desk]:
    """At 2026-01-01, with two orchestrators and one routing rule."""
    store = open_store(store_url)
    yield Desk(store)
    store.close()
