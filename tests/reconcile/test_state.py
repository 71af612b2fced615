"""Where run-time files stand, and what references lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.reconcile.state import State, resolve


def test_state_stands_beside_the_file_or_where_fleet_state_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made by asking."""
    monkeypatch.delenv("FLEET_STATE", raising=False)
    assert State(tmp_path / "fleet.yaml").machine_root("m1") == tmp_path / ".fleet/machines/m1"
    monkeypatch.setenv("FLEET_STATE", str(tmp_path / "elsewhere"))
    state = State(tmp_path / "fleet.yaml")
    assert state.control_root == tmp_path / "elsewhere/control"
    assert state.store_url("sqlite") == f"sqlite:///{tmp_path}/elsewhere/store.sqlite"
    assert list(tmp_path.iterdir()) == []


def test_references_are_resolved_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment, a file beside fleet.yaml, or a command."""
    monkeypatch.setenv("FLEET_STORE", "postgresql://db")
    (tmp_path / "url").write_text("postgresql://file\n")
    assert State(tmp_path / "fleet.yaml").store_url("env:FLEET_STORE") == "postgresql://db"
    assert resolve("file:url", home=tmp_path) == "postgresql://file"
    assert resolve("exec:cat url", home=tmp_path) == "postgresql://file"


@pytest.mark.parametrize("reference", ["env:FLEET_NO_SUCH", "file:none", "exec:false", "exec:", "exec:/no/such", "x"])
def test_a_reference_that_leads_nowhere_is_one_clear_error(tmp_path: Path, reference: str) -> None:
    """It names the reference."""
    with pytest.raises(FleetError, match=reference):
        resolve(reference, home=tmp_path)
