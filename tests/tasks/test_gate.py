"""Whether an orchestrator may begin anything: every thing that binds, alone and beside the others."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from asker import Asker, line, spec_of
from desk import Desk
from hypothesis import given

from orchestrator_fleet.spec.hours import parse_hours
from orchestrator_fleet.tasks import holds, life
from orchestrator_fleet.tasks.gate import PLENTY, Gate, Seen, decide
from orchestrator_fleet.tasks.holds import Hold
from orchestrator_fleet.tasks.queries import Filters
from orchestrator_fleet.tasks.rules import Budget, Hours, OrchestratorRules, Rules
from orchestrator_fleet.tasks.spending import Spent
from orchestrator_fleet.tasks.task import Grant
from orchestrator_fleet.wire.documents import InForce
from orchestrator_fleet.wire.link import Usage

MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
NOW = 1_767_225_600_000_000  # 2026-01-01T00:00:00Z, a Thursday
OFFICE = Hours(timezone="UTC", windows=parse_hours("Mon-Fri 08:00-18:00"), text="Mon-Fri 08:00-18:00")
PAUSE = Hold(orchestrator="vp-a", kind="pause", by="person:me", reason="on leave", at_us=NOW, until_us=None)
QUOTA = Hold(orchestrator="vp-a", kind="quota", by="vp-a", reason=None, at_us=NOW, until_us=NOW + HOUR_US)
USD = Budget(usd_per_day=10.0)
TOKENS = Budget(tokens_per_hour=1_000)


def decided(rules: OrchestratorRules | None = None, **fields: Any) -> Gate:
    """What is let through at NOW."""
    seen = {name: fields.pop(name) for name in list(fields) if name in Seen.__dataclass_fields__}
    return decide(rules=rules or OrchestratorRules(), seen=Seen(**seen), now_us=fields.pop("now_us", NOW), **fields)


def test_nothing_binds_where_nothing_is_declared() -> None:
    """Whatever runs."""
    assert decided(running=500, running_there=900) == Gate(most=PLENTY)


@pytest.mark.parametrize(
    ("declared", "claimants", "running", "most"),
    [(3, None, 1, 2), (3, None, 3, 0), (3, None, 5, 0), (None, 2, 1, 1), (3, 2, 1, 1), (2, 9, 1, 1), (None, 0, 0, 0)],
)
def test_sessions_are_the_fewer_of_what_is_declared_and_what_the_claimant_has(
    declared: int | None, claimants: int | None, running: int, most: int
) -> None:
    """And no time alone frees one."""
    through = decided(OrchestratorRules(sessions_max=declared), running=running, sessions_max=claimants)
    assert (through.most, through.again_at_us) == (most, None)
    assert through.reason == (
        "" if most else f"{running} of {min(x for x in (declared, claimants) if x is not None)} sessions are taken"
    )


def test_a_machine_binds_all_that_claim_on_it() -> None:
    """Whoever runs what is there."""
    assert decided(machine="m1", machine_max=4, running_there=3).most == 1
    full = decided(machine="m1", machine_max=4, running_there=4)
    assert (full.most, full.reason) == (0, "4 of 4 sessions on machine m1 are taken")
    assert decided(OrchestratorRules(sessions_max=2), machine="m1", machine_max=4, running_there=1).most == 2


def test_a_pause_lets_nothing_through_until_it_is_over() -> None:
    """Without an end it says none; one that is over binds no more, though nobody took it away yet."""
    through = decided(holds=[PAUSE])
    assert (through.most, through.again_at_us) == (0, None)
    assert through.reason == "paused by person:me: on leave"
    assert decided(holds=[QUOTA]).again_at_us == NOW + HOUR_US
    assert decided(holds=[QUOTA], now_us=NOW + HOUR_US - 1).most == 0
    assert decided(holds=[QUOTA], now_us=NOW + HOUR_US).most == PLENTY


def test_outside_its_hours_only_critical_tasks_begin() -> None:
    """As many as ever, and it says when it opens."""
    closed = decided(OrchestratorRules(hours=OFFICE))
    assert (closed.most, closed.only_critical, closed.again_at_us) == (PLENTY, True, NOW + 8 * HOUR_US)
    assert "only CRITICAL" in closed.reason
    opened = decided(OrchestratorRules(hours=OFFICE), now_us=NOW + 8 * HOUR_US)
    assert opened == Gate(most=PLENTY)


@pytest.mark.parametrize(
    ("budget", "spent", "running", "most"),
    [
        (USD, Spent(), 50, PLENTY),
        (USD, Spent(usd_24h=4.0, mean_usd=2.0), 0, 3),
        (USD, Spent(usd_24h=4.0, mean_usd=2.0), 2, 1),
        (USD, Spent(usd_24h=4.0, mean_usd=2.0), 3, 0),
        (USD, Spent(usd_24h=5.0, mean_usd=2.0), 0, 3),
        (USD, Spent(usd_24h=9.99, mean_usd=5.0), 0, 1),
        (USD, Spent(usd_24h=10.0, mean_usd=2.0), 0, 0),
        (USD, Spent(usd_24h=99.0, mean_usd=2.0), 0, 0),
        (USD, Spent(tokens_1h=9_999, mean_tokens=9.0), 0, PLENTY),
        (TOKENS, Spent(tokens_1h=500, mean_tokens=100.0), 3, 2),
        (TOKENS, Spent(tokens_1h=500, mean_tokens=100.0), 5, 0),
        (
            Budget(usd_per_day=10, tokens_per_hour=1_000),
            Spent(usd_24h=1, mean_usd=1, tokens_1h=900, mean_tokens=50),
            0,
            2,
        ),
    ],
)
def test_as_many_begin_as_the_budget_has_room_for_at_the_mean(
    budget: Budget, spent: Spent, running: int, most: int
) -> None:
    """What runs is counted by it; a first task of which nothing is known yet is free."""
    assert decided(OrchestratorRules(budget=budget), spent=spent, running=running).most == most


def test_a_spent_budget_pauses_or_escalates_as_declared() -> None:
    """pause: nothing begins until the window has room. escalate: what would begin is blocked, and seen."""
    spent = {"spent": Spent(usd_24h=12.0, mean_usd=3.0), "budget_again_at_us": NOW + HOUR_US}
    pause = decided(OrchestratorRules(budget=USD), **spent)
    assert (pause.most, pause.blocks_budget, pause.again_at_us) == (0, False, NOW + HOUR_US)
    assert pause.reason == "its budget is spent: 12.00 of 10 dollars in 24 hours"
    escalate = OrchestratorRules(budget=Budget(usd_per_day=10.0, on_breach="escalate"), sessions_max=3)
    through = decided(escalate, running=1, **spent)
    assert (through.most, through.blocks_budget, through.again_at_us) == (2, True, NOW + HOUR_US)
    assert through.reason.startswith("its budget is spent")
    paused = decided(escalate, holds=[PAUSE], **spent)
    assert (paused.most, paused.blocks_budget) == (0, False)


def test_all_that_binds_is_told_and_the_last_to_end_counts() -> None:
    """A pause without an end goes before any moment."""
    both = decided(OrchestratorRules(hours=OFFICE, sessions_max=1), holds=[QUOTA, PAUSE], running=1)
    assert [one.kind for one in both.bindings] == ["pause", "quota", "sessions", "schedule"]
    assert both.again_at_us is None
    later = Hold(orchestrator="vp-a", kind="pause", by="x", reason=None, at_us=NOW, until_us=NOW + 3 * HOUR_US)
    assert decided(holds=[QUOTA, later]).again_at_us == NOW + 3 * HOUR_US


@given(
    sessions=st.none() | st.integers(0, 5),
    claimants=st.none() | st.integers(0, 5),
    machine=st.none() | st.integers(0, 5),
    running=st.integers(0, 6),
    there=st.integers(0, 6),
    spent=st.builds(Spent, usd_24h=st.floats(0, 20), mean_usd=st.floats(0, 5)),
    held=st.lists(st.sampled_from([PAUSE, QUOTA]), unique=True),
    on_breach=st.sampled_from(["pause", "escalate"]),
)
def test_no_count_is_ever_passed_and_whatever_lets_nothing_through_says_why(
    *,
    sessions: int | None,
    claimants: int | None,
    machine: int | None,
    running: int,
    there: int,
    spent: Spent,
    held: list[Hold],
    on_breach: Any,
) -> None:
    """Whatever else binds."""
    through = decided(
        OrchestratorRules(sessions_max=sessions, budget=Budget(usd_per_day=10.0, on_breach=on_breach)),
        machine="m1",
        machine_max=machine,
        sessions_max=claimants,
        running=running,
        running_there=there,
        spent=spent,
        holds=held,
    )
    assert through.most >= 0
    for most, runs in ((sessions, running), (claimants, running), (machine, there)):
        assert most is None or through.most == 0 or runs + through.most <= most
    if not through.blocks_budget and 0 < through.most < PLENTY:
        begun_before_the_last = running + through.most - 1
        assert spent.usd_24h + begun_before_the_last * spent.mean_usd < 10.0
    assert (through.most > 0 and not through.blocks_budget) or through.reason
    assert not held or through.most == 0


SPEC: dict[str, Any] = {
    "machines": {"m1": {"sessions": 3}, "m2": None, "m3": {"slots": 8, "sessions": None}},
    "orchestrators": {
        "vp-a": {
            "discipline": "eng",
            "sessions": {"max": 2, "timeout": "30m"},
            "schedule": {"timezone": "UTC", "hours": "00:00-12:00"},
            "budget": {"usd_per_day": 10, "tokens_per_hour": None, "on_breach": "escalate"},
        },
        "vp-b": {"discipline": "eng", "sessions": {"max": 9}, "budget": {"usd_per_day": None, "tokens_per_hour": 500}},
        "vp-c": {"discipline": "eng"},
    },
    "limits": [{"name": "per-repo", "key": "task.metadata.repo", "max_running": 1, "max_per_minute": None}],
}


def test_rules_are_read_from_the_spec_and_narrowed_by_charters() -> None:
    """As render wrote them: what the charter leaves of fleet.yaml counts."""
    rules = Rules.of_spec(SPEC, within={"vp-b": InForce(sessions=4, tokens_per_hour=100)})
    a, b = rules.of("vp-a"), rules.of("vp-b")
    assert (a.sessions_max, a.budget) == (2, Budget(usd_per_day=10, on_breach="escalate"))
    assert a.hours == Hours(timezone="UTC", windows=parse_hours("00:00-12:00"), text="00:00-12:00")
    assert (b.sessions_max, b.budget) == (4, Budget(tokens_per_hour=100))
    assert rules.of("vp-c") == rules.of("nobody") == OrchestratorRules()
    assert rules.sessions_on == {"m1": 3}
    (limit,) = rules.limits
    assert (limit.name, limit.max_running, limit.max_per_minute) == ("per-repo", 1, None)
    assert limit.key.execute({"task": {"metadata": {"repo": "x"}}}) == "x"


def test_a_claim_takes_no_more_than_the_declared_sessions(desk: Desk) -> None:
    """Also for a poller that says nothing of its own; and the end of one lets the next begin."""
    asker = Asker(desk, spec_of({"sessions": {"max": 2}}))
    line(desk, "t0", "t1", "t2", "t3")
    first = asker.ask(limit=5, machine="")
    assert [grant.task.title for grant in first.grants] == ["t0", "t1"]
    full = asker.ask(limit=5, machine="")
    assert (full.grants, full.reason) == ((), "2 of 2 sessions are taken")
    desk.finish(first.grants[0])
    assert asker.titles(limit=5) == ["t2"]


def test_a_machine_is_shared_by_all_who_claim_on_it(desk: Desk) -> None:
    """Another machine, and a poller without one, are not bound by it."""
    asker = Asker(desk, {"orchestrators": {"vp-a": {}, "vp-b": {}}, "machines": {"m1": {"sessions": 2}}})
    line(desk, "a0", "a1", "a2")
    line(desk, "b0", "b1", "b2", orchestrator="vp-b")
    assert asker.titles("vp-a") == ["a0"]
    assert asker.titles("vp-b", limit=5) == ["b0"]
    assert asker.ask("vp-a").reason == "2 of 2 sessions on machine m1 are taken"
    assert asker.titles("vp-a", machine="m2") == ["a1"]
    assert asker.titles("vp-b", machine="", limit=5) == ["b1", "b2"]


def test_outside_its_hours_a_claim_takes_the_critical_alone(desk: Desk) -> None:
    """Not even one that has waited so long that it stands beside them; and it says when to ask again."""
    asker = Asker(desk, spec_of({"schedule": {"timezone": "UTC", "hours": "08:00-18:00"}}))
    desk.make("old", priority="LOW")
    desk.clock.advance(4 * 86_400)
    desk.make("urgent", priority="CRITICAL")
    assert asker.titles(limit=5) == ["urgent"]
    nothing = asker.ask()
    assert nothing.again_at_us == desk.now + 8 * HOUR_US
    assert "outside its working hours until 2026-01-05T08:00:00" in nothing.reason
    desk.clock.advance(8 * 3600)
    assert asker.titles(limit=5) == ["old"]


def spend(desk: Desk, grant: Grant, usd: float, tokens: int = 0) -> None:
    """Finish an attempt that used so much."""
    desk.finish(grant, usage=Usage(usd=usd, input_tokens=tokens))


def test_a_spent_budget_pauses_until_the_window_has_room(desk: Desk) -> None:
    """The first minute's spending leaves after a day, and a minute for its own length."""
    asker = Asker(desk, spec_of({"budget": {"usd_per_day": 10, "on_breach": "pause"}}))
    line(desk, "t0", "t1", "t2")
    began_us = desk.now // MINUTE_US * MINUTE_US
    spend(desk, asker.ask().grants[0], usd=6.0)
    desk.clock.advance(600)
    spend(desk, asker.ask().grants[0], usd=5.0)
    nothing = asker.ask()
    assert nothing.reason == "its budget is spent: 11.00 of 10 dollars in 24 hours"
    assert nothing.again_at_us == began_us + 24 * HOUR_US + MINUTE_US
    desk.clock.advance((nothing.again_at_us - desk.now) / 1e6 - 1)
    assert asker.titles() == []
    desk.clock.advance(1)
    assert asker.titles() == ["t2"]


def test_what_runs_is_reserved_at_the_mean(desk: Desk) -> None:
    """Three at once would spend 12 of 10: two begin, and no third before one of them has told what it used."""
    asker = Asker(desk, spec_of({"budget": {"usd_per_day": 10}}))
    line(desk, "t0", "t1", "t2", "t3", "t4", "t5")
    spend(desk, asker.ask().grants[0], usd=4.0)
    running = asker.ask(limit=5).grants
    assert [grant.task.title for grant in running] == ["t1", "t2"]
    assert asker.titles(limit=5) == []
    spend(desk, running[0], usd=0.0)
    assert asker.titles(limit=5) == ["t3", "t4"]


def test_an_escalating_budget_blocks_what_would_begin_until_somebody_approves(desk: Desk) -> None:
    """Visible as BLOCKED/budget; approved ones pass, others come back by themselves when the window has room."""
    asker = Asker(desk, spec_of({"budget": {"tokens_per_hour": 100, "on_breach": "escalate"}}))
    spend(desk, _ran(desk, asker, "first"), usd=0.0, tokens=150)
    line(desk, "waiting", "approved")
    waiting, approved = desk.page(filters=Filters(status=("TODO",))).rows
    assert asker.titles(limit=2) == []
    held = desk.get(waiting)
    assert (held.status, held.blocked_reason) == ("BLOCKED", "budget")
    assert held.condition == "its budget is spent: 150 of 100 tokens in an hour"
    desk._write(life.approve, task_id=approved.id, reason="go")
    assert asker.titles(limit=2) == ["approved"]
    assert desk.get(waiting).status == "BLOCKED"
    desk.clock.advance(3_661)
    assert asker.titles(limit=2) == ["waiting"]
    assert desk.kinds(waiting) == ["task_created", "task_blocked", "task_unblocked", "task_claimed"]


def _ran(desk: Desk, asker: Asker, title: str) -> Grant:
    desk.make(title)
    return asker.ask().grants[0]


def test_a_quota_that_is_spent_holds_the_task_and_its_orchestrator_and_no_try(desk: Desk) -> None:
    """Until the moment that the report named; another orchestrator goes on."""
    asker = Asker(desk, spec_of({}))
    desk.make("limited", max_attempts=1)
    (grant,) = asker.ask().grants
    desk.clock.advance(0.001)
    desk.make("next")
    desk.make("other", orchestrator="vp-b")
    after = desk.finish(grant, "quota", until_us=desk.now + HOUR_US, error="429 from the provider")
    assert (after.status, after.blocked_reason, after.failures) == ("BLOCKED", "quota", 0)
    nothing = asker.ask()
    assert (nothing.grants, nothing.again_at_us) == ((), desk.now + HOUR_US)
    assert nothing.reason.startswith("its quota is spent until 2026-01-01T01:00:00")
    assert asker.titles("vp-b") == ["other"]
    desk.clock.advance(3_599)
    assert asker.titles(limit=5) == []
    desk.clock.advance(1)
    assert asker.titles(limit=5) == ["limited", "next"]
    assert desk.get(after).condition is None


def test_a_paused_orchestrator_is_told_who_paused_it(desk: Desk) -> None:
    """And claims again when that is lifted, or over."""
    asker = Asker(desk, spec_of({}))
    desk.make("t0")
    put = {"orchestrator": "vp-a", "kind": "pause", "by": "person:me", "reason": "on leave"}
    desk.store.write_sync(lambda c: holds.put(c, **put, until_us=desk.now + HOUR_US, now_us=desk.now))
    nothing = asker.ask()
    assert nothing.reason == "paused by person:me until 2026-01-01T01:00:00.000000Z: on leave"
    assert nothing.again_at_us == desk.now + HOUR_US
    desk.clock.advance(3_600)
    assert asker.titles() == ["t0"]


def test_a_look_says_what_a_claim_does(desk: Desk) -> None:
    """`why` and the claim have one answer."""
    asker = Asker(desk, spec_of({"sessions": {"max": 1}}, machines={"m1": {"sessions": 1}}))
    assert asker.look(machine="m1") == Gate(most=1)
    desk.make("t0")
    asker.ask()
    full = asker.look(machine="m1")
    assert (full.most, [one.kind for one in full.bindings]) == (0, ["sessions", "machine"])
    assert asker.ask().reason == full.reason


def test_what_runs_may_use_less_than_the_average_and_blocks_nothing_before_it_has(desk: Desk) -> None:
    """A budget that would be passed by it lets nothing begin; only one that is spent asks for an approval."""
    asker = Asker(desk, spec_of({"budget": {"usd_per_day": 10, "on_breach": "escalate"}}))
    line(desk, "t0", "t1", "t2", "t3", "t4")
    (first,) = asker.ask().grants
    desk.finish(first, usage=Usage(usd=3.0))
    running = asker.ask(limit=5).grants
    assert [grant.task.title for grant in running] == ["t1", "t2", "t3"]
    assert "budget" in asker.ask().reason
    desk.finish(running[0], usage=Usage(usd=0.01))
    assert asker.titles() == ["t4"]
