"""An open store on a fresh database of either kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator_fleet.store.database import Store, open_store


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def url(store_url: str) -> str:
    return store_url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = open_store(url)
    yield opened
    opened.close()
