"""Whole applies on machines in memory: order, faults, and what is left undone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from fleet_home import ROLLOUT, FleetHome, MemoryMachines

from orchestrator_fleet.errors import FleetError, LeaseHeld, StalePlan, UsageError
from orchestrator_fleet.machines.fake import Faults
from orchestrator_fleet.plan.model import CONTROL_PLANE, Action
from orchestrator_fleet.reconcile import fleet
from orchestrator_fleet.reconcile.report import Event, RolloutFailed, RolloutReverted

ALL = {CONTROL_PLANE, "m1", "m2", "m3", "m4", "m5", "m6"}


def test_all_is_staged_before_anything_switches_and_pruned_after_everything(
    home: FleetHome, memory: MemoryMachines
) -> None:
    """Control plane, canary, batches of four; then old generations; then the leases."""
    assert set(home.results(home.apply()).values()) == {"applied"}
    asked = [(name, op) for name, op in memory.asked if op not in {"Observe", "Acquire"}]
    order = {op: [n for n, (_, o) in enumerate(asked) if o == op] for _, op in asked}
    for earlier, later in pairwise(["Stage", "Switch", "Prune", "Release"]):
        assert max(order[earlier]) < min(order[later]), (earlier, later)
    switched = [name for name, op in asked if op == "Switch"]
    assert switched[:2] == [CONTROL_PLANE, "m1"]
    assert set(switched[2:6]) == {"m2", "m3", "m4", "m5"}
    confirmed = asked.index(("m1", "Confirm"))
    assert confirmed < min(n for n, (name, op) in enumerate(asked) if op == "Switch" and name not in switched[:2])


def test_a_second_apply_looks_once_at_each_and_does_nothing_else(home: FleetHome, memory: MemoryMachines) -> None:
    """Keys are offered to the store again, as it may have been lost."""
    home.apply()
    keys, home.keys = home.keys, []
    memory.asked.clear()
    report = home.apply()
    assert set(home.results(report).values()) == {"unchanged"}
    assert sorted(memory.asked) == sorted((name, "Observe") for name in ALL)
    assert (home.keys, report.keys_registered) == (keys, 6)


def test_only_what_changed_is_touched(home: FleetHome, memory: MemoryMachines) -> None:
    """One runner's command: one machine, and the control plane."""
    home.apply()
    memory.asked.clear()
    home.commands["m3"] = "other"
    home.write()
    results = home.results(home.apply())
    assert {name for name, result in results.items() if result == "applied"} == {CONTROL_PLANE, "m3"}
    assert {name for name, op in memory.asked if op != "Observe"} == {CONTROL_PLANE, "m3"}


def test_a_sick_canary_goes_back_and_stops_the_rollout(home: FleetHome, memory: MemoryMachines) -> None:
    """Exit code 4; the others are not touched; the reason is remembered."""
    home.apply()
    good = {machine.name: machine.generation for machine in fleet.status(home.file).machines}
    for name in home.machines:
        home.commands[name] = "other"
    home.write()
    memory.faults["m1"] = Faults(never_run=frozenset({"vp-m1"}))
    planned = home.plan()

    def until_rejected(event: Event) -> None:
        if event.kind == "rejected":  # the new command was the cause: what ran before runs again
            memory.machines["m1"].faults = Faults()

    with pytest.raises(RolloutReverted, match=r"m1: vp-m1: FATAL: .*; back to ") as caught:
        fleet.apply_plan(planned, on_event=until_rejected, register_keys=home.register)
    assert caught.value.exit_code == 4
    results = home.results(caught.value.report)
    assert results.pop("m1") == "rolled_back"
    assert results.pop(CONTROL_PLANE) == "applied"
    assert set(results.values()) == {"skipped"}
    memory.faults.clear()
    assert {m.name: m.generation for m in fleet.status(home.file).machines} == good
    assert any("m1: generation" in note and "FATAL" in note for note in home.plan().plan.notes)


def test_going_back_that_fails_too_is_a_failure_that_tells_both(home: FleetHome, memory: MemoryMachines) -> None:
    """Exit code 1: the machine is neither new nor old."""
    home.apply()
    home.commands["m1"] = "other"
    home.write()
    memory.faults["m1"] = Faults(never_run=frozenset({"vp-m1"}))
    planned = home.plan()
    with pytest.raises(RolloutFailed, match=r"FATAL.*and going back to .* failed: .*FATAL"):
        home.apply(planned)


def test_without_auto_revert_it_stays_and_is_a_failure(home: FleetHome, memory: MemoryMachines) -> None:
    """A person wants to look."""
    home.apply()
    home.rollout = f"{ROLLOUT}, auto_revert: false"
    home.commands["m1"] = "other"
    home.write()
    memory.faults["m1"] = Faults(never_run=frozenset({"vp-m1"}))
    planned = home.plan()
    with pytest.raises(RolloutFailed, match=r"m1: vp-m1: FATAL.*auto_revert is off") as caught:
        home.apply(planned)
    assert caught.value.exit_code == 1
    status = {m.name: m for m in fleet.status(home.file).machines}
    assert status["m1"].generation == status["m1"].desired
    assert status["m1"].conditions[0].reason == "ProgramsDown"
    memory.faults.clear()
    assert home.results(home.apply())["m1"] == "applied"


def test_a_full_disk_anywhere_switches_nothing_anywhere(home: FleetHome, memory: MemoryMachines) -> None:
    """All are staged, or none is switched."""
    memory.faults["m4"] = Faults(disk_full=True)
    with pytest.raises(RolloutFailed, match="m4: stage: no space left on device") as caught:
        home.apply()
    results = home.results(caught.value.report)
    assert {name for name, result in results.items() if result == "skipped"} == ALL - {"m4"}
    assert "Switch" not in {op for _, op in memory.asked}
    assert [op for _, op in memory.asked if op == "Release"] == ["Release"] * 7


def test_a_machine_out_of_reach_does_not_hold_up_the_others(home: FleetHome, memory: MemoryMachines) -> None:
    """Up to max_unreachable; it is told, and done by a later apply."""
    memory.faults["m2"] = Faults(unreachable=True)
    results = home.results(home.apply())
    assert results.pop("m2") == "unreachable"
    assert set(results.values()) == {"applied"}
    memory.faults.clear()
    results = home.results(home.apply())
    assert {name for name, result in results.items() if result == "applied"} == {"m2"}


def test_too_many_out_of_reach_change_nothing(home: FleetHome, memory: MemoryMachines) -> None:
    """More than max_unreachable is no outage to work around."""
    memory.faults |= {name: Faults(unreachable=True) for name in ("m1", "m2", "m3")}
    with pytest.raises(RolloutFailed, match="max_unreachable"):
        home.apply()
    assert "Stage" not in {op for _, op in memory.asked}


def test_a_connection_lost_in_mid_switch_is_mended_by_the_next_apply(home: FleetHome, memory: MemoryMachines) -> None:
    """Whether it took effect is unknown, so it is looked at again."""
    for step in ("staged", "linked", "stopped", "started", "confirmed"):
        home.commands["m2"] = step
        home.write()
        memory.faults["m2"] = Faults(crash_after=step)
        planned = home.plan()
        try:
            home.apply(planned)
        except FleetError:
            assert step == "staged"
        memory.faults.clear()
        home.apply()
        assert home.plan().plan.empty, step


def test_a_lease_held_elsewhere_refuses_and_takes_none(home: FleetHome) -> None:
    """Who holds it is said, exit code 3, and what was taken is given back."""
    home.apply()
    home.charter("Another mandate.")
    planned = home.plan()
    events = []

    def while_first_works(event: object) -> None:
        events.append(event)
        if len(events) == 1:
            with pytest.raises(LeaseHeld, match="ada@here") as caught:
                in_thread(lambda: home.apply(planned, holder="bob@there"))
            assert caught.value.exit_code == 3

    fleet.apply_plan(planned, holder="ada@here", on_event=while_first_works, register_keys=home.register)
    assert home.plan().plan.empty
    assert all(machine.lease == "" for machine in fleet.status(home.file).machines)


def in_thread(work: Callable[[], object]) -> None:
    """Run it in a thread of its own and raise here what it raised there."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(60)


def test_a_machine_that_moved_since_the_plan_is_refused(home: FleetHome) -> None:
    """Another apply was there in between."""
    home.charter("One.")
    planned = home.plan()
    home.apply(home.plan(only=["m2"]))
    with pytest.raises(StalePlan, match="control-plane, m2 moved"):
        home.apply(planned)


def test_a_saved_plan_is_applied_or_refused_by_what_changed(home: FleetHome) -> None:
    """The spec, or a machine, each named."""
    home.apply()
    home.charter("One.")
    saved = home.plan().plan
    home.charter("Two.")
    with pytest.raises(StalePlan, match=r"fleet\.yaml changed since the plan"):
        fleet.plan_again(home.file, saved)
    home.charter("One.")
    home.apply(home.plan(only=["m2"]))
    with pytest.raises(StalePlan, match="control-plane, m2 moved"):
        fleet.plan_again(home.file, saved)
    saved = home.plan(only=["m3"]).plan
    planned = fleet.plan_again(home.file, saved)
    assert home.results(home.apply(planned, saved=saved)) == {CONTROL_PLANE: "unchanged", "m3": "applied"}


def test_only_a_machine_there_is_can_be_named(home: FleetHome) -> None:
    """The others are listed."""
    with pytest.raises(UsageError, match="no machine m9; there are m1, m2"):
        home.plan(only=["m9"])


def test_a_part_of_a_plan_counts_its_own_actions(home: FleetHome) -> None:
    """And has an id of its own."""
    whole, part = home.plan().plan, home.plan(only=["m2"]).plan
    assert (part.summary.start, part.summary.machines) == (1, 1)
    assert {target.name for target in part.targets} == {CONTROL_PLANE, "m2"}
    assert part.id != whole.id


def test_a_machine_no_longer_declared_is_taken_down_last(home: FleetHome, memory: MemoryMachines) -> None:
    """After all else is healthy; a second apply has nothing to say of it."""
    home.apply()
    memory.asked.clear()
    home.machines = home.machines[:-1]
    home.write()
    assert home.results(home.apply())["m6"] == "applied"
    assert memory.asked.index(("m6", "Destroy")) > memory.asked.index((CONTROL_PLANE, "Confirm"))
    assert home.plan().plan.empty


def test_drift_is_corrected_where_it_is(home: FleetHome, memory: MemoryMachines) -> None:
    """An edited file comes back, and only that machine is touched."""
    home.apply()
    memory.machines["m2"].edit("orchestrators/vp-m2/charter.md", b"obey me")
    assert {a.change for a in home.plan().plan.actions if a.kind != "no-op"} == {"drift"}
    memory.asked.clear()
    home.apply()
    assert home.plan().plan.empty
    assert {name for name, op in memory.asked if op == "Switch"} == {"m2"}


def test_a_move_off_a_machine_that_leaves_the_file_shows_what_else_changes(home: FleetHome) -> None:
    """The files are compared with those on the machine that goes."""
    home.apply()
    home.file.write_text(home.file.read_text().replace('"m6"', '"m7"'))

    def moved() -> Action:
        return next(a for a in home.plan().plan.actions if (a.target, a.subject) == ("m7", "vp-m6"))

    assert (moved().kind, moved().change) == ("start", "moved")
    assert "charter.md" not in {field.path for field in moved().fields}
    home.charter("Another mandate.")
    assert "charter.md" in {field.path for field in moved().fields}


def test_the_status_says_what_is_wrong_and_why(home: FleetHome, memory: MemoryMachines) -> None:
    """One word and a sentence for each machine."""
    home.apply()
    memory.machines["m1"].stop_supervisord()
    memory.machines["m2"].kill_program("vp-m2", detail="Exited too quickly")
    memory.machines["m3"].edit("orchestrators/vp-m3/charter.md", b"x")
    memory.faults["m4"] = Faults(unreachable=True)
    status = fleet.status(home.file)
    told = {m.name: (m.conditions[0].status, m.conditions[0].reason) for m in status.machines}
    assert told == {
        "m1": ("False", "SupervisordDown"),
        "m2": ("False", "ProgramsDown"),
        "m3": ("False", "Drifted"),
        "m4": ("Unknown", "Unreachable"),
        "m5": ("True", "Converged"),
        "m6": ("True", "Converged"),
    }
    assert not status.ready
    assert status.machines[0].programs["vp-m1"].state == "STOPPED"
    home.charter("Another.")
    told = {m.name: m.conditions[0].reason for m in fleet.status(home.file).machines}
    assert told["m5"] == "Outdated"
