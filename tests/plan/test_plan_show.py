"""Saved plans come back as they were, broken ones are named, and what people wrote drives no terminal or browser."""

from __future__ import annotations

import re

import msgspec
import pytest
from builders import Living, charter, fleet

from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.plan.between import plan_id
from orchestrator_fleet.plan.model import Plan
from orchestrator_fleet.plan.show import from_json, markdown, summary, text, to_json

NASTY = "x\x1b[31m``````\n</details><script>@all|`"


def nasty() -> Plan:
    """A plan whose values try to break out."""
    living = Living()
    living.apply(fleet())
    charters = {"charters/vp.md": charter(constraints=[NASTY], safety={"auto_approve": [NASTY]})}
    return living.plan(fleet(charters=charters, orchestrators={"vp-1": {"role": NASTY}, "vp-2": {}}))


def test_a_saved_plan_comes_back() -> None:
    """Equal, and written the same again."""
    made = nasty()
    assert from_json(to_json(made)) == made
    assert to_json(from_json(to_json(made))) == to_json(made)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "this is not a saved plan"),
        (b"\xff\xfe", "this is not a saved plan"),
        (b"[]", "this is not a saved plan"),
        (b'{"version": 1}', "this is not a saved plan: Object missing required field"),
        (b"[" * 100_000, "this is not a saved plan"),
        (to_json(Living().plan(fleet())).replace(b'"version": 1', b'"version": 2'), "the plan has version 2"),
        (to_json(Living().plan(fleet())).replace(b"vp-1", b"vp-9"), "the plan was changed after it was made"),
    ],
)
def test_what_is_not_a_saved_plan_is_refused_with_the_cure(data: bytes, problem: str) -> None:
    """One error, never a traceback."""
    with pytest.raises(FleetError, match=re.escape(problem)) as caught:
        from_json(data)
    assert str(caught.value).endswith("make a new one with `fleet plan -o plan.json`")


def test_what_people_wrote_does_not_drive_the_terminal() -> None:
    """Control characters are spelled out, lines stay lines."""
    shown = text(nasty(), color=False)
    assert "\x1b" not in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_what_people_wrote_does_not_leave_its_fence() -> None:
    """Markdown's fences are longer than any inside, and above them all is code."""
    shown = markdown(nasty())
    blocks = re.findall(r"(?ms)^(`{3,})diff$(.*?)^\1$", shown)
    assert any("``````" in body for _, body in blocks)
    assert all(fence not in body for fence, body in blocks)
    outside = re.sub(r"(?ms)^(`{3,})diff$.*?^\1$", "", shown)
    assert "```" not in outside
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", outside)
    assert "@all" not in re.sub(r"`[^`\n]*`", "", outside)


def test_colours_only_when_asked() -> None:
    """The same lines otherwise."""
    made = nasty()
    coloured, plain = text(made, color=True), text(made, color=False)
    assert "\x1b[33m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def test_the_line_that_sums_up() -> None:
    """Kinds, machines, what stays."""
    living = Living()
    living.apply(fleet(machines=3))
    spec = fleet(
        machines=3, orchestrators={"vp-1": {"machine": "m1"}, "vp-2": {"machine": "m3"}, "vp-3": {"machine": "m3"}}
    )
    assert summary(living.plan(spec)) == (
        "Plan: 1 to start, 0 to restart, 0 to reload, 1 to stop, 1 to write on 2 of 3 machines; 1 unchanged."
    )
    assert summary(living.plan(fleet(machines=3))) == "No changes. 3 machines match fleet.yaml."


def test_long_values_are_shortened() -> None:
    """A plan stays readable, and small."""
    living = Living()
    living.apply(fleet())
    made = living.plan(fleet(limits=[{"name": "long", "key": "task.title + " + "'x'" * 1000, "max_running": 1}]))
    assert max(len(line) for line in text(made, color=False).splitlines()) < 250
    assert len(to_json(made)) < 10_000


def test_the_id_is_of_the_whole_content() -> None:
    """A saved plan can be checked by itself."""
    made = nasty()
    assert plan_id(made) == made.id
    assert plan_id(msgspec.structs.replace(made, created_at="later")) == made.id
    assert plan_id(msgspec.structs.replace(made, notes=("x",))) != made.id
