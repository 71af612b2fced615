"""What a plan looks like: spec and machines in, text and JSON out.

`FLEET_GOLDEN=write pytest tests/plan/test_plan_golden.py` writes the files anew; look at the difference before you
keep it. Digests are numbered in the order they appear, so that a golden file holds what a plan says and not how
documents happen to be written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import Living, charter, command, fleet, plan

from orchestrator_fleet.plan.model import Plan
from orchestrator_fleet.plan.show import markdown, text, to_json
from orchestrator_fleet.render import program

GOLDEN = Path(__file__).parent / "golden"
SAFETY = {
    "auto_approve": ["Read", "Bash(git diff:*)"],
    "escalate": ["Bash(git push:*)"],
    "always_reject": ["Bash(rm:*)"],
}
KEY = {"owner": "service:ci", "sha256": "1" * 64, "scopes": ["tasks:write"]}
ROUTES = [
    {"name": "urgent", "when": "task.priority == 'CRITICAL'", "to": {"orchestrator": "vp-1"}},
    {"name": "rest", "to": {"orchestrator": "vp-2"}},
]

Case = Callable[[], Plan]
CASES: dict[str, Case] = {}


def case(made: Case) -> Case:
    CASES[made.__name__] = made
    return made


def applied(**spec) -> Living:
    living = Living()
    living.apply(fleet(**spec))
    return living


def under(prose: str = "You do what the task says.", **front) -> dict:
    return {"charters/vp.md": charter(prose=prose, **front)}


@case
def first_apply() -> Plan:
    return Living().plan(fleet())


@case
def nothing_to_do() -> Plan:
    return applied().plan(fleet())


@case
def charter_wording() -> Plan:
    living = applied(charters=under("You run engineering.\nBe exact."))
    return living.plan(fleet(charters=under("You run engineering.\nBe exact, and say why.")))


@case
def authority_gained_and_lost() -> Plan:
    living = applied(charters=under(limits={"sessions": 1}, safety=SAFETY))
    wider = {"auto_approve": ["Read", "Bash(git push:*)"], "always_reject": ["Bash(rm:*)"]}
    return living.plan(fleet(charters=under(limits={"sessions": 2}, safety=wider)))


@case
def runner_changed_and_more_authority() -> Plan:
    living = applied(orchestrators={"vp-1": {"machine": "m1"}, "vp-2": {"machine": "m1"}})
    other = {"machine": "m1", "runner": command("python3", "-u", "work.py"), "sessions": {"max": 5}}
    return living.plan(fleet(orchestrators={"vp-1": other, "vp-2": {"machine": "m1"}}))


@case
def added_and_removed() -> Plan:
    living = applied(orchestrators={"vp-1": {"machine": "m1"}, "vp-2": {"machine": "m2"}})
    return living.plan(
        fleet(orchestrators={"vp-1": {"machine": "m1"}, "vp-3": {"machine": "m2", "discipline": "data"}})
    )


@case
def drained() -> Plan:
    living = applied(orchestrators={"vp-1": {}, "vp-2": {}})
    return living.plan(fleet(machines={"m1": {"drained": True}, "m2": {}}, orchestrators={"vp-1": {}, "vp-2": {}}))


@case
def machine_removed() -> Plan:
    living = applied(orchestrators={"vp-1": {}, "vp-2": {}})
    return living.plan(fleet(machines=1, orchestrators={"vp-1": {}, "vp-2": {}}))


@case
def programs_down() -> Plan:
    living = applied(machines=3)
    living["m1"].kill_program("vp-1", state="FATAL", detail="Exited too quickly (process log may have details)")
    living["m2"].stop_supervisord()
    living["m3"].run_program("vp-3", digest="0" * 16)
    living["m3"].run_program("left-over", digest="0" * 16)
    return living.plan(fleet(machines=3))


@case
def changed_by_hand() -> Plan:
    living = applied()
    living["m1"].edit("programs/vp-1.conf", b"[program:vp-1]\ncommand=true\n")
    living["m1"].edit("orchestrators/vp-1/charter.md", None)
    living["m1"].edit("notes.txt", b"mine")
    living["control-plane"].edit("control.json", b"{}")
    return living.plan(fleet())


@case
def changed_by_hand_and_left_so() -> Plan:
    living = applied()
    living["m1"].edit("notes.txt", b"mine")
    return living.plan(fleet(), drift="warn")


@case
def control_plane_only() -> Plan:
    limits = [{"name": "one-per-repo", "key": "task.metadata.repo", "max_running": 1}]
    keys = {"k-00000001": KEY, "k-00000002": {**KEY, "owner": "person:a"}, "k-00000003": {**KEY, "owner": "person:b"}}
    living = applied(keys=keys, routing=ROUTES, limits=limits)
    keys = {
        "k-00000001": {**KEY, "revoked": "2027-01-01T00:00:00Z"},
        "k-00000002": {**KEY, "owner": "person:a", "scopes": ["admin"]},
        "k-00000004": {**KEY, "sha256": "4" * 64, "expires": "2028-01-01T00:00:00Z"},
        "k-00000005": {**KEY, "owner": "person:c"},
    }
    rules = [ROUTES[1], {**ROUTES[0], "when": "task.priority in ['CRITICAL', 'HIGH']"}, {**ROUTES[1], "name": "other"}]
    return living.plan(fleet(keys=keys, routing=rules, limits=[{**limits[0], "max_running": 2}], rollout={"canary": 2}))


@case
def a_machine_out_of_reach() -> Plan:
    living = applied()
    desired, seen = living.desired(fleet(charters=under("Otherwise."))), living.observe()
    return plan(desired, {**seen, "m2": "connection refused"})


@case
def another_runtime() -> Plan:
    living = applied()
    before = program.__version__
    program.__version__ = "99.0.0"
    try:
        return living.plan(fleet())
    finally:
        program.__version__ = before


def masked(content: str) -> str:
    """Digests as `#1`, `#2`, ...; equal ones alike, also where they are cut short."""
    found: list[str] = []

    def number(match: re.Match[str]) -> str:
        known = next(
            (n for n, digest in enumerate(found) if digest.startswith(match[0]) or match[0].startswith(digest)), -1
        )
        if known < 0:
            found.append(match[0])
            known = len(found) - 1
        return f"#{known + 1}"

    pattern = r"(?<!k-)\b(?:[0-9a-f]{64}|[0-9a-f]{16}|[0-9a-f]{12}|[0-9a-f]{8})\b"
    return re.sub(pattern, number, content)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_reads_like_this(name: str) -> None:
    """Text for a terminal, Markdown for a pull request, JSON for a program."""
    made = CASES[name]()
    for suffix, content in (
        ("txt", text(made, color=False)),
        ("md", markdown(made)),
        ("json", to_json(made).decode()),
    ):
        golden = GOLDEN / f"{name}.{suffix}"
        if os.environ.get("FLEET_GOLDEN") == "write":
            golden.write_text(masked(content), encoding="utf-8")
        assert masked(content) == golden.read_text(encoding="utf-8"), f"{golden.name} differs; see this file's top"


def test_every_golden_file_has_its_case() -> None:
    """None is left over."""
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)
