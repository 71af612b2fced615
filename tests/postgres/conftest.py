"""Two control planes on one PostgreSQL, each with a state folder of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import PostgresServer

sys.path.insert(0, str(Path(__file__).parent.parent / "api"))

from serving import ControlPlane


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may stop."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def two(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ControlPlane, ControlPlane]]:
    """Both running, for tests that leave them so."""
    with postgres_server.lent() as url:
        yield from _started(url, tmp_path_factory.mktemp("two"))


@pytest.fixture
def two_on_own(own_server: PostgresServer, tmp_path: Path) -> Iterator[tuple[ControlPlane, ControlPlane]]:
    """Both running, on the test's own PostgreSQL."""
    yield from _started(own_server.url("template"), tmp_path)


def _started(url: str, folder: Path) -> Iterator[tuple[ControlPlane, ControlPlane]]:
    planes = ControlPlane(folder / "a", store=url), ControlPlane(folder / "b", store=url)
    try:
        for plane in planes:
            plane.process = plane.popen()
        for plane in planes:
            plane.ready()
        yield planes
    finally:
        for plane in planes:
            plane.close()
