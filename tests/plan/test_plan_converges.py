"""Whatever the spec and whatever the machines are like: after one apply there is nothing more to do."""

from __future__ import annotations

from builders import Living, fleets, plan
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from orchestrator_fleet.errors import SpecInvalid, Unreachable
from orchestrator_fleet.machines.fake import CRASHES, Faults
from orchestrator_fleet.plan.between import fingerprint
from orchestrator_fleet.plan.model import CONTROL_PLANE
from orchestrator_fleet.plan.show import from_json, markdown, text, to_json
from orchestrator_fleet.wire.machine import Observed

STATES = ("FATAL", "BACKOFF", "EXITED", "STOPPED", "UNKNOWN", "STOPPING")


def disturb(data: st.DataObject, living: Living) -> None:
    """Do to the machines what people, crashes and time do."""
    for name in sorted(living.machines):
        for what in data.draw(st.lists(st.sampled_from(["edit", "remove", "add", "programs", "stop", "alien"]))):
            if what == "stop":
                living[name].stop_supervisord()
            elif what == "alien" and name != CONTROL_PLANE:
                living[name].run_program("alien", digest="0" * 16)
            elif what == "programs":
                disturb_programs(data, living, name)
            elif what != "alien":
                disturb_files(data, living, name, what)


def disturb_files(data: st.DataObject, living: Living, name: str, what: str) -> None:
    """Edit, remove or add a file of the current generation, if there is one."""
    seen = living.observe()[name]
    assert isinstance(seen, Observed)
    if seen.current is None:
        return
    path = data.draw(st.sampled_from([*sorted(seen.documents), "manifest.json"]))
    contents = {
        "edit": data.draw(st.sampled_from([b"", b"{}", b"null", b"\xff[", b'{"spec": 1}'])),
        "remove": None,
        "add": b"by hand",
    }
    living[name].edit("orchestrators/notes.txt" if what == "add" else path, contents[what])


def disturb_programs(data: st.DataObject, living: Living, name: str) -> None:
    """Have some programs down, and some run that were started otherwise."""
    seen = living.observe()[name]
    assert isinstance(seen, Observed)
    for program in sorted(seen.programs):
        if data.draw(st.booleans()):
            living[name].kill_program(program, state=data.draw(st.sampled_from(STATES)), detail="by hand")
        else:
            generation = data.draw(st.none() | st.just("0" * 64))
            living[name].run_program(program, digest="0" * 16, generation=generation)


def interrupt(data: st.DataObject, living: Living, spec) -> None:
    """Begin to apply a spec, and lose a machine in the middle of it."""
    living.desired(spec)
    name = data.draw(st.sampled_from(sorted(living.machines)))
    living[name].faults = Faults(crash_after=data.draw(st.sampled_from(CRASHES)))
    try:
        living.apply(spec)
    except Unreachable:
        pass
    except SpecInvalid:
        assume(False)
    living[name].faults = Faults()
    living.clock.advance(120)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(fleets(), fleets(), fleets(protect=True), st.data())
def test_plan_then_apply_then_the_plan_is_empty(first, second, wanted, data) -> None:
    """From any spec, interrupted anywhere on the way to a second one, disturbed by hand, to any third."""
    living = Living()
    if data.draw(st.booleans()):
        living.apply(first)
    if data.draw(st.booleans()):
        interrupt(data, living, second)
    disturb(data, living)
    made = living.apply(wanted)
    assert living.plan(wanted).empty, text(living.plan(wanted), color=False)
    assert from_json(to_json(made)) == made
    assert text(made, color=True)
    assert markdown(made)
    for name, seen in living.observe().items():
        assert isinstance(seen, Observed)
        assert {program.state for program in seen.programs.values()} <= {"RUNNING"}, name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(fleets(), st.data())
def test_the_same_state_has_the_same_plan_and_fingerprint(spec, data) -> None:
    """A plan can be refused as stale by its fingerprints, and only then."""
    living = Living()
    living.apply(spec)
    disturb(data, living)
    desired, seen = living.desired(spec), living.observe()
    again = living.observe()
    assert plan(desired, seen) == plan(desired, again)
    assert {name: fingerprint(state) for name, state in seen.items() if isinstance(state, Observed)} == {
        name: fingerprint(state) for name, state in again.items() if isinstance(state, Observed)
    }
    if living.plan(spec).empty:
        return
    before = [target.fingerprint for target in living.plan(spec).targets]
    living.apply(spec)
    assert [target.fingerprint for target in living.plan(spec).targets] != before
