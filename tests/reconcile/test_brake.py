"""Stopping a pass from another thread: the machines in hand are finished, the others are not begun."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from fleet_home import FleetHome

from orchestrator_fleet.reconcile import fleet
from orchestrator_fleet.reconcile.interrupts import Brake
from orchestrator_fleet.reconcile.report import Event, RolloutFailed


def test_a_pass_that_is_stopped_finishes_what_is_in_hand(home: FleetHome) -> None:
    """The canary gets done; the report says that it was interrupted; the next pass goes on."""
    brake = Brake()

    def told(event: Event) -> None:
        home.events.append(event)
        if event.kind == "switching":
            brake.pull()

    with ThreadPoolExecutor(1) as pool, pytest.raises(RolloutFailed, match="interrupted") as stopped:
        pool.submit(fleet.apply_plan, home.plan(), on_event=told, register_keys=home.register, brake=brake).result()
    assert stopped.value.report.interrupted
    results = home.results(stopped.value.report)
    assert sorted(results.values()) == ["applied", "applied", *["skipped"] * 5]
    assert set(home.results(home.apply()).values()) == {"applied", "unchanged"}


def test_a_pass_under_a_pulled_brake_begins_nothing(home: FleetHome) -> None:
    """It was pulled before the pass came to its machines."""
    brake = Brake()
    brake.pull()
    with pytest.raises(RolloutFailed, match="interrupted"):
        home.apply(brake=brake)
    assert [event.target for event in home.events if event.kind == "switching"] == []
