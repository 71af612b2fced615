"""Machines as fixtures; whatever a test starts is ended by pid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_fleet import Machine, end, fake_machine, local_machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A real machine: an empty root of this host."""
    made = local_machine(tmp_path / "m1")
    yield made
    end(made)


@pytest.fixture(params=["fake", pytest.param("local", marks=pytest.mark.supervisord)])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """The same tests on the machine in memory and on a real supervisord."""
    made = fake_machine() if request.param == "fake" else local_machine(tmp_path / "m1")
    yield made
    end(made)
