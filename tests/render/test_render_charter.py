"""Charters: prompt, settings, limits in force, version."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from builders import charter, fleet

from orchestrator_fleet.errors import SpecInvalid
from orchestrator_fleet.render.bundle import Desired
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.model import Fleet
from orchestrator_fleet.wire.documents import ControlDoc, InForce, OrchestratorDoc


def one(
    *,
    prose: str = "Be exact.",
    templates: dict[str, str] | None = None,
    spec: dict[str, Any] | None = None,
    **front: Any,
) -> Fleet:
    return fleet(
        machines=1,
        orchestrators={"vp-1": spec or {}},
        charters={"charters/vp.md": charter(prose=prose, **front)},
        templates=templates,
    )


def file(desired: Desired, name: str) -> bytes:
    return desired.machines["m1"].files[f"orchestrators/vp-1/{name}"]


def document(spec: Fleet) -> OrchestratorDoc:
    return msgspec.json.decode(file(render(spec), "orchestrator.json"), type=OrchestratorDoc)


def test_the_smaller_of_fleet_yaml_and_the_charter_is_in_force() -> None:
    """Either may be the smaller; what neither limits is without limit."""
    low = {"sessions": 1, "session_timeout": "5m", "tokens_per_hour": 10, "memory": "1GiB"}
    spec = {"sessions": {"max": 4, "timeout": "1h"}, "budget": {"tokens_per_hour": 99, "usd_per_day": 3}}
    capped = document(one(spec=spec, limits=low))
    assert (capped.sessions_max, capped.session_timeout_s, capped.tokens_per_hour) == (1, 300.0, 10)
    assert (capped.session_memory_bytes, capped.usd_per_day) == (1 << 30, 3.0)
    high = {"sessions": 9, "session_timeout": "5h", "tokens_per_hour": 1000}
    loose = document(one(spec=spec, limits=high))
    assert (loose.sessions_max, loose.session_timeout_s, loose.tokens_per_hour) == (4, 3600.0, 99)
    free = document(one())
    assert (free.tokens_per_hour, free.session_memory_bytes, free.usd_per_day) == (None, None, None)


def test_the_control_plane_holds_an_orchestrator_to_what_its_daemon_is_told() -> None:
    """The limits in force stand in both documents."""
    spec = {"sessions": {"max": 4}, "budget": {"tokens_per_hour": 99}}
    for front in ({"sessions": 1, "tokens_per_hour": 10}, {"sessions": 9, "tokens_per_hour": 1000}, {}):
        made = one(spec=spec, limits=front)
        told = document(made)
        control = msgspec.json.decode(render(made).control.files["control.json"], type=ControlDoc)
        assert control.limits == {
            "vp-1": InForce(sessions=told.sessions_max, tokens_per_hour=told.tokens_per_hour),
        }


def test_safety_becomes_claude_codes_permissions() -> None:
    """Allow, ask and deny; and no way around them."""
    safety = {"auto_approve": ["Read"], "escalate": ["WebFetch"], "always_reject": ["Bash(rm:*)"]}
    settings = msgspec.json.decode(file(render(one(safety=safety)), "settings.json"))
    assert settings == {
        "permissions": {
            "allow": ["Read"],
            "ask": ["WebFetch"],
            "deny": ["Bash(rm:*)"],
            "disableBypassPermissionsMode": "disable",
        }
    }


def test_the_prompt_holds_the_mandate_and_all_that_is_enforced() -> None:
    """As a person would write it, each part only when there is something in it."""
    spec = {"role": "VP of Engineering", "discipline": "engineering", "escalate_to": ["vp-cto", "human:oncall"]}
    prompt = file(
        render(
            one(
                prose="You run engineering.\n",
                spec=spec,
                identity={"name": "Ada"},
                responsibilities=["triage"],
                objectives={"response_time": "30s"},
                constraints=["Never guess"],
                safety={"always_reject": ["Bash(rm -rf /*)"]},
            )
        ),
        "charter.md",
    ).decode()
    assert prompt == (
        "# VP of Engineering\n\n"
        "You are Ada (vp-1), VP of Engineering of the fleet acme. Your discipline is engineering.\n\n"
        "You run engineering.\n\n"
        "## Responsibilities\n\n- triage\n\n"
        "## Objectives\n\n- Begin a task within 30s of getting it.\n\n"
        "## Constraints\n\n- Never guess\n\n"
        "## Limits\n\nThese are enforced from outside.\n\n- A session ends after 30m.\n- Sessions at once: 2.\n\n"
        "## Tools\n\nNever:\n\n- Bash(rm -rf /*)\n\n"
        "## What you can't do\n\n"
        "Hand it up, with what you tried and what you need, to: vp-cto, human:oncall.\n"
    )


def test_a_fleets_own_template_is_used() -> None:
    """It sees the same names; braces in the prose are not a template."""
    own = {"charter.md.j2": "{{ name }} of {{ fleet }}, {{ limits.sessions }}, {{ charter.tier }}: {{ prose }}"}
    assert file(render(one(prose="{{ 7 * 7 }}", templates=own)), "charter.md") == b"vp-1 of acme, 2, 1: {{ 7 * 7 }}\n"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("line\n{% if %}", "templates/charter.md.j2:2:1: is not a template: Expected an expression"),
        ("{{ nobody }}", "templates/charter.md.j2: cannot be rendered for vp-1: 'nobody' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "templates/charter.md.j2: cannot be rendered for vp-1: access to attribute"),
        ("{{ 1 / 0 }}", "templates/charter.md.j2: cannot be rendered for vp-1: division by zero"),
        ("{{ range(99999999) }}", "templates/charter.md.j2: cannot be rendered for vp-1: Range too big"),
        ("{{ 'x' * 2000000 }}", "templates/charter.md.j2: makes 2000000 characters for vp-1, at most 1048576"),
    ],
)
def test_a_template_that_fails_is_an_error_of_the_spec(template: str, problem: str) -> None:
    """One that does not compile, names what is not there, leaves its sandbox, or makes too much."""
    with pytest.raises(SpecInvalid) as caught:
        render(one(templates={"charter.md.j2": template}))
    assert str(caught.value).startswith(problem)


def test_the_version_names_front_matter_and_prose() -> None:
    """Any change of either gives another; 12 hex digits."""
    versions = {
        document(spec).charter_version
        for spec in (
            one(),
            one(prose="Be exact!"),
            one(tier=2),
            one(constraints=["x"]),
            one(safety={"escalate": ["x"]}),
        )
    }
    assert len(versions) == 5
    assert {len(version) for version in versions} == {12}
