"""A running control plane for whoever needs one, on either store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ControlPlane

# The routes of tasks answer the same on both stores.
ON_BOTH_STORES = {"test_tasks", "test_contract", "test_bulk", "test_backlog", "test_pauses", "test_own_tasks"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of ON_BOTH_STORES that share a control plane with one on each."""
    if "shared" in metafunc.fixturenames and metafunc.module.__name__ in ON_BOTH_STORES:
        metafunc.parametrize("shared", ["sqlite", "postgresql"], indirect=True, scope="module")


@pytest.fixture
def control_plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """A control plane of one's own, not started yet."""
    plane = ControlPlane(tmp_path / "home")
    yield plane
    plane.close()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A running control plane for tests that change nothing of it but tasks."""
    store = ""
    if getattr(request, "param", "sqlite") == "postgresql":
        server = request.getfixturevalue("postgres_server")
        store = server.empty()
    plane = ControlPlane(tmp_path_factory.mktemp("shared") / "home", store=store).start()
    yield plane
    plane.close()
