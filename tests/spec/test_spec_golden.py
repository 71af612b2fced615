"""Broken fleets and the exact text they answer with.

A case is a folder under golden/: a fleet as people write it, wrong in some way, and expected.txt. The name of the
folder stands there as <folder>.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.spec.load import load_fleet

CASES = sorted(path for path in (Path(__file__).parent / "golden").iterdir())


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_a_broken_fleet_says_exactly_what_is_wrong(case: Path):
    """Every diagnostic, its place and its advice, to the letter."""
    with pytest.raises(SpecInvalid) as refused:
        load_fleet(case / "fleet.yaml")
    assert str(refused.value).replace(str(case), "<folder>") + "\n" == (case / "expected.txt").read_text()


def test_every_kind_of_bad_input_has_a_case():
    """The folder is really there, and as full as it should be."""
    assert len(CASES) >= 70


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_each_diagnostic_names_a_file_and_says_something(case: Path):
    """No empty problem, no line 0 with a column, no text of many lines."""
    with pytest.raises(SpecInvalid) as refused:
        load_fleet(case / "fleet.yaml")
    for diagnostic in refused.value.diagnostics:
        assert diagnostic.file
        assert diagnostic.problem
        assert bool(diagnostic.line) == bool(diagnostic.column)
        assert "\n" not in str(diagnostic)
