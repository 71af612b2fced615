"""Placement: where the rules put everybody, and that nobody moves without need."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from builders import fleet
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.render.placement import MAX_EXPLAINED, place
from orchestrator_fleet.spec.model import FleetFile


def spec(machines: dict[str, Any], orchestrators: dict[str, Any]) -> FleetFile:
    return fleet(machines=machines, orchestrators=orchestrators).file


def test_a_named_machine_wins_over_load_labels_and_cordon() -> None:
    """`machine:` is a person's word."""
    file = spec({"m1": {"cordoned": True}, "m2": {}}, {"a": {"machine": "m1"}, "b": {"machine": "m1"}})
    assert place(file, {}) == {"a": "m1", "b": "m1"}


def test_the_smallest_share_of_slots_taken_goes_first_then_the_name() -> None:
    """A machine of twice the slots gets twice as many."""
    file = spec({"m1": {"slots": 2}, "m2": {"slots": 4}}, {name: {} for name in "abcdef"})
    assert Counter(place(file, {}).values()) == {"m1": 2, "m2": 4}
    assert place(file, {})["a"] == "m1"


def test_labels_are_kept_to() -> None:
    """Only machines that have them all."""
    machines = {"m1": {"labels": {"zone": "a"}}, "m2": {"labels": {"zone": "b", "gpu": "yes"}}}
    file = spec(
        machines, {"a": {"placement": {"labels": {"gpu": "yes"}}}, "b": {"placement": {"labels": {"zone": "a"}}}}
    )
    assert place(file, {}) == {"a": "m2", "b": "m1"}


def test_avoid_holds_both_ways() -> None:
    """The one that is avoided doesn't come after either."""
    file = spec({"m1": {}, "m2": {}}, {"a": {"placement": {"avoid": ["b"]}}, "b": {}})
    assert len(set(place(file, {}).values())) == 2
    assert len(set(place(file, {"b": "m1"}).values())) == 2


def test_spread_covers_the_values_of_a_label_for_each_discipline() -> None:
    """Two zones with three machines against one get as many of a discipline each."""
    machines = {f"m{n}": {"labels": {"zone": "a" if n < 4 else "b"}, "slots": 20} for n in range(1, 5)}
    orchestrators = {
        f"{trade}-{n}": {"discipline": trade, "placement": {"spread": "zone"}}
        for trade in ("eng", "sec")
        for n in range(4)
    }
    places = place(spec(machines, orchestrators), {})
    zones = Counter((name[:3], machines[machine]["labels"]["zone"]) for name, machine in places.items())
    assert set(zones.values()) == {2}


def test_a_cordoned_machine_keeps_what_it_has_and_gets_nothing() -> None:
    """Cordon stops arrivals, not residents."""
    file = spec({"m1": {"cordoned": True}, "m2": {}}, {"a": {}, "b": {}})
    assert place(file, {"a": "m1"}) == {"a": "m1", "b": "m2"}


def test_a_drained_machine_is_left() -> None:
    """Drain moves the residents."""
    assert place(spec({"m1": {"drained": True}, "m2": {}}, {"a": {}}), {"a": "m1"}) == {"a": "m2"}


def test_a_resident_makes_room_for_one_that_can_go_nowhere_else() -> None:
    """The choosier one gets the only place that it can have; the other moves."""
    machines = {"m1": {"labels": {"zone": "a"}, "slots": 1}, "m2": {"slots": 1}}
    file = spec(machines, {"a": {}, "z": {"placement": {"labels": {"zone": "a"}}}})
    assert place(file, {"a": "m1"}) == {"a": "m2", "z": "m1"}


def test_the_order_in_the_file_does_not_matter() -> None:
    """Only names do."""
    machines, orchestrators = {"m1": {}, "m2": {}, "m3": {}}, {name: {} for name in "abcde"}
    backwards = spec(dict(reversed(machines.items())), dict(reversed(orchestrators.items())))
    assert place(spec(machines, orchestrators), {}) == place(backwards, {})


def test_who_fits_nowhere_is_told_why_by_each_machine() -> None:
    """All at once, each machine's reason."""
    machines = {
        "m1": {"labels": {"zone": "a"}, "drained": True},
        "m2": {"labels": {"zone": "a"}, "cordoned": True},
        "m3": {"labels": {"zone": "a"}, "slots": 1},
        "m4": {},
        "m5": {"labels": {"zone": "a"}},
    }
    orchestrators = {
        "a": {"machine": "m3"},
        "b": {"machine": "m5"},
        "c": {"placement": {"labels": {"zone": "a"}, "avoid": ["b"]}},
        "d": {"machine": "m9"},
    }
    with pytest.raises(SpecInvalid) as caught:
        place(spec(machines, orchestrators), {})
    assert str(caught.value) == (
        "fleet.yaml: orchestrators.c.placement: fits on no machine (m1: is drained; m2: is cordoned; "
        "m3: is full (1 of 1 slots); m4: lacks label zone=a; m5: has b, which may not share a machine with it); "
        "add a machine or slots, or ask for less in placement\n"
        "fleet.yaml: orchestrators.d.machine: cannot go to m9: it is not declared; "
        "give it another machine, or leave the choice to placement"
    )


@pytest.mark.parametrize("machine", [{"drained": True}, {"slots": 1}])
def test_a_machine_by_name_that_cannot_take_it_is_an_error(machine: dict[str, Any]) -> None:
    """A drained machine, and a full one, are not overruled in silence."""
    with pytest.raises(SpecInvalid, match=r"orchestrators\.b\.machine: cannot go to m1"):
        place(spec({"m1": machine, "m2": {}}, {"a": {"machine": "m1"}, "b": {"machine": "m1"}}), {})


def test_of_very_many_that_fit_nowhere_some_are_explained() -> None:
    """An error has an end."""
    with pytest.raises(SpecInvalid) as caught:
        place(spec({"m1": {"slots": 1}}, {f"vp-{n}": {} for n in range(100)}), {})
    assert len(caught.value.diagnostics) == MAX_EXPLAINED + 1
    assert "79 more orchestrators fit on no machine" in str(caught.value)


_zones = st.sampled_from(["a", "b"])
_machines = st.dictionaries(
    st.sampled_from([f"m{n}" for n in range(5)]),
    st.fixed_dictionaries(
        {
            "labels": st.dictionaries(st.just("zone"), _zones),
            "slots": st.integers(1, 4),
            "cordoned": st.booleans(),
            "drained": st.booleans(),
        }
    ),
    min_size=1,
)
_rules = st.fixed_dictionaries(
    {
        "labels": st.dictionaries(st.just("zone"), _zones),
        "avoid": st.lists(st.sampled_from("abcdefgh"), max_size=2, unique=True),
        "spread": st.sampled_from([None, "zone"]),
    }
)
_orchestrators = st.dictionaries(st.sampled_from("abcdefgh"), st.fixed_dictionaries({"placement": _rules}), min_size=1)
_kept = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from([f"m{n}" for n in range(6)]))


@settings(max_examples=300, deadline=None)
@given(_machines, _orchestrators, _kept)
def test_every_placement_keeps_the_rules_and_is_stable(
    machines: dict[str, Any], orchestrators: dict[str, Any], kept: dict[str, str]
) -> None:
    """Slots, labels, avoid, cordon and drain; and who was placed stays when asked again."""
    file = spec(machines, orchestrators)
    try:
        places = place(file, kept)
    except SpecInvalid:
        return  # these rules can't all be kept, or only by moving more than we try
    assert places.keys() == orchestrators.keys()
    for machine, count in Counter(places.values()).items():
        assert count <= machines[machine]["slots"]
    for name, machine in places.items():
        rules, there = orchestrators[name]["placement"], machines[machine]
        assert rules["labels"].items() <= there["labels"].items()
        assert not there["drained"]
        assert not there["cordoned"] or kept.get(name) == machine
        assert not [other for other in rules["avoid"] if other != name and places.get(other) == machine]
    assert place(file, places) == places


@settings(max_examples=100, deadline=None)
@given(_machines, _orchestrators)
def test_with_enough_of_everything_all_are_placed(machines: dict[str, Any], orchestrators: dict[str, Any]) -> None:
    """Open machines with room and no rules against it take everybody."""
    roomy = {name: {"labels": machine["labels"], "slots": 8} for name, machine in machines.items()}
    plain = {name: {"placement": {"spread": spec["placement"]["spread"]}} for name, spec in orchestrators.items()}
    assert place(spec(roomy, plain), {}).keys() == orchestrators.keys()
