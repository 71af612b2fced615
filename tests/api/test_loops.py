"""What goes on beside the requests, loop by loop, on a real store and a clock that is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator_fleet.api import govern, loops, vp_routes
from orchestrator_fleet.api.plane import Plane
from orchestrator_fleet.clock import SECOND_US, FrozenClock
from orchestrator_fleet.errors import StoreError
from orchestrator_fleet.store import idempotency
from orchestrator_fleet.store.database import Store, open_store
from orchestrator_fleet.store.idempotency import KEEP_S, MAX_FORGOTTEN, Answered
from orchestrator_fleet.store.outbox import Event
from orchestrator_fleet.store.schema import idempotency as answers
from orchestrator_fleet.store.schema import tasks
from orchestrator_fleet.tasks import life, reroute, schedules
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.rules import Rules
from orchestrator_fleet.tasks.task import Grant, NewTask

SPEC: dict[str, Any] = {
    "orchestrators": {"vp-a": {}, "vp-b": {}},
    "machines": {"m1": {"sessions": 1}},
    "routing": [{"name": "rest", "to": {"orchestrator": "vp-b"}}],
}
DEADLINE_S = 20.0


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    """A control plane of which no loop runs yet."""
    store = open_store(f"sqlite:///{tmp_path}/store.sqlite")
    yield Plane(
        store=store,
        control=under(SPEC),
        control_root=tmp_path,
        fleet_file=tmp_path / "fleet.yaml",
        clock=FrozenClock(),
        history=SimpleNamespace(),  # type: ignore[arg-type] # nobody asks it
        machines=lambda _: tmp_path,
    )
    store.close()


def under(spec: dict[str, Any]) -> Any:
    return SimpleNamespace(
        generation="g",
        orchestrators=spec["orchestrators"],
        dispatch=Dispatch.of_spec(spec),
        rules=Rules.of_spec(spec),
        doc=SimpleNamespace(spec=spec, placements={}, charters={}),
    )


def running(loop: Callable[[], Awaitable[None]], until: Callable[[], bool], *, and_then: float = 0.0) -> None:
    """Run a loop until something is so."""

    async def story() -> None:
        going = asyncio.ensure_future(loop())
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not until():
                    assert not going.done(), going.result()
                    await asyncio.sleep(0.01)
                await asyncio.sleep(and_then)
        finally:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)

    asyncio.run(story())


def claimed(plane: Plane, orchestrator: str = "vp-a") -> Grant:
    """An attempt that began just now."""
    now_us, dispatch = plane.clock.now_us(), Dispatch.of_spec(SPEC)
    new = NewTask(title="t", orchestrator=orchestrator)
    plane.store.write_sync(lambda c: life.create_task(c, new=new, dispatch=dispatch, actor="k", now_us=now_us))
    (grant,) = plane.store.write_sync(
        lambda c: life.claim(
            c,
            orchestrator=orchestrator,
            machine="m1",
            holder="h",
            limit=1,
            lease_s=30.0,
            sessions_max=None,
            generation=None,
            charter_version=None,
            actor="k",
            now_us=now_us,
        )
    )
    return grant


def claimed_and_released(plane: Plane, orchestrator: str = "vp-a") -> Grant:
    """A task in line."""
    grant = claimed(plane, orchestrator)
    known = {"task_id": grant.task.id, "reason": None, "actor": "k", "now_us": plane.clock.now_us()}
    plane.store.write_sync(lambda c: life.release(c, **known))
    return grant


def is_routed(plane: Plane) -> bool:
    """Whether all tasks were looked at under the rules in force."""
    return plane.store.read_sync(lambda c: reroute.are_settled(c, plane.control.dispatch))


def of(plane: Plane, grant: Grant) -> Any:
    return plane.store.read_sync(lambda c: life.get_task(c, grant.task.id))


def test_old_answers_are_all_forgotten_at_once(plane: Plane) -> None:
    """However many requests came with a key: else the table grows by whatever is over a fixed pace."""
    old_us = plane.clock.now_us() - (KEEP_S + 1) * SECOND_US
    plane.store.write_sync(
        lambda c: [
            idempotency.remember(
                c,
                Answered(actor="k", key=f"{n}", fingerprint="", status=200, headers={}, body="", at_us=old_us),
            )
            for n in range(MAX_FORGOTTEN + 5)
        ]
    )
    running(
        lambda: loops.forget(plane),
        lambda: plane.store.read_sync(lambda c: c.execute(answers.select()).first()) is None,
    )


def test_a_task_parked_under_the_limits_before_is_called_up_without_any(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that began before the rules changed may park it after what was parked has been put back."""
    monkeypatch.setattr(govern, "GOVERN_S", 0.01)
    begun: list[None] = []
    wake_all = plane.workers.wake_all
    monkeypatch.setattr(plane.workers, "wake_all", lambda: (begun.append(None), wake_all()))
    grant = claimed_and_released(plane)

    def is_done() -> bool:
        if len(begun) == 1:
            begun.append(None)
            plane.store.write_sync(lambda c: c.execute(tasks.update().values(parked_by="per-repo=x")))
        return len(begun) > 1 and of(plane, grant).parked_by is None

    running(lambda: govern.govern(plane), is_done)


def test_a_free_place_on_a_machine_wakes_who_waits_for_it(plane: Plane) -> None:
    """Whoever's attempt it was that ended there; those on other machines sleep on."""

    def link(machine: str) -> Any:
        return SimpleNamespace(machine=machine, taken_away=lambda *_, **__: None)

    async def story() -> None:
        plane.links.update({"vp-a": link("m1"), "vp-b": link("m1"), "vp-c": link("m2")})
        ended = Event(
            at_us=1,
            kind="task_done",
            actor="k",
            task="t",
            attempt=1,
            orchestrator="vp-a",
            machine="m1",
            data={"task": {"status": "DONE", "orchestrator": "vp-a"}},
        )
        with plane.workers.waiting("vp-b") as beside, plane.workers.waiting("vp-c") as elsewhere:
            plane._pass_on(ended)
            assert (beside.is_set(), elsewhere.is_set()) == (True, False)

    asyncio.run(story())


def test_what_comes_back_to_an_orchestrator_that_is_gone_is_routed_again(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its attempt ends by its own report, and long after the rules changed."""
    monkeypatch.setattr(loops, "RELOAD_S", 0.01)
    grant = claimed(plane)
    plane.control = under({**SPEC, "orchestrators": {"vp-b": {}}})
    reported: list[None] = []
    looks: list[None] = []
    look = loops.route_astray

    async def counted(plane: Plane) -> None:
        await look(plane)
        looks.append(None)

    monkeypatch.setattr(loops, "route_astray", counted)

    async def both() -> None:
        pulse = asyncio.ensure_future(plane.pulse.run())
        try:
            await loops.route_again(plane)
        finally:
            pulse.cancel()

    def is_done() -> bool:
        if not reported and len(looks) >= 2 and is_routed(plane):
            reported.append(None)
            known = {
                "actor": "k",
                "now_us": plane.clock.now_us(),
                "retry": Dispatch.of_spec(SPEC).retry(None),
                "roll": 0.5,
            }
            plane.store.write_sync(
                lambda c: life.finish(c, task_id=grant.task.id, token=grant.token, outcome="failed", **known)
            )
            plane.pulse.nudge()
        return of(plane, grant).orchestrator == "vp-b"

    running(both, is_done)
    assert of(plane, grant).status == "TODO"


class _Away:
    """A store that can't be used for some reads."""

    def __init__(self, store: Store, *, reads: int, meanwhile: Callable[[], None]) -> None:
        self._store, self._reads, self._meanwhile = store, reads, meanwhile
        self.answered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def read(self, fn: Any) -> Any:
        """What the store reads, later."""
        if self._reads:
            self._reads -= 1
            self._meanwhile()
            raise StoreError("away")
        self.answered += 1
        return await self._store.read(fn)


def test_a_store_that_was_away_ends_nobodys_lease(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could beat meanwhile: who held a task gets time for it, and loses it after that."""
    monkeypatch.setattr(loops, "SWEEP_S", 0.01)
    grant = claimed(plane)
    clock: Any = plane.clock
    away = _Away(plane.store, reads=3, meanwhile=lambda: clock.advance(60))
    plane.store = away  # type: ignore[assignment] # as much of one as the loop needs

    def sweeping() -> Awaitable[None]:
        return loops.supervised("sweep", lambda: loops.sweep(plane))

    monkeypatch.setattr(loops, "AGAIN_S", 0.01)
    running(sweeping, lambda: away.answered > 3)
    assert of(plane, grant).status == "IN_PROGRESS"
    clock.advance(31)
    running(sweeping, lambda: of(plane, grant).status == "TODO")


def test_a_task_made_under_the_rules_before_is_found_by_the_second_look(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's writers do not wait for each other: it may appear when all has been looked at."""
    monkeypatch.setattr(loops, "RELOAD_S", 0.2)
    plane.control = under({**SPEC, "orchestrators": {"vp-b": {}}})
    made: list[str] = []

    def is_done() -> bool:
        if not made and is_routed(plane):
            made.append(claimed_and_released(plane).task.id)
        return bool(made) and plane.store.read_sync(lambda c: life.get_task(c, made[0])).orchestrator == "vp-b"

    running(lambda: loops.route_again(plane), is_done)


def test_a_schedule_whose_turn_failed_has_another(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that can't be read has none before it is declared anew."""
    (schedule,) = schedules.schedules_of({"schedules": {"nightly": {"cron": "0 * * * *", "task": {"title": "t"}}}})

    def turn(problem: Exception) -> int | None:
        def fails(*_: object, **__: object) -> None:
            raise problem

        monkeypatch.setattr(schedules, "fire", fails)
        return asyncio.run(loops._fire(plane, schedule))

    assert turn(RuntimeError("once")) == plane.clock.now_us() + round(loops.MAX_AGAIN_S * SECOND_US)
    assert turn(ValueError("wrong line")) is None


def test_who_gets_another_budget_is_not_held_by_the_one_before(plane: Plane) -> None:
    """What it held is in line at the next claim; an orchestrator whose budget is as it was waits on."""
    budget = {"usd_per_day": 1, "on_breach": "escalate"}
    before = Rules.of_spec({"orchestrators": {"vp-a": {"budget": budget}, "vp-b": {"budget": budget}}})
    after = Rules.of_spec(
        {"orchestrators": {"vp-a": {"budget": {**budget, "usd_per_day": 2}}, "vp-b": {"budget": budget}}}
    )
    now_us = plane.clock.now_us()
    until_us = now_us + 3600 * SECOND_US
    grants = [claimed_and_released(plane, name) for name in ("vp-a", "vp-b")]
    held = {"status": "BLOCKED", "blocked_reason": "budget", "ripens_at_us": until_us}
    plane.store.write_sync(lambda c: c.execute(tasks.update().values(**held)))
    asyncio.run(govern.begin_anew(plane, after, before=before))
    assert [of(plane, grant).ripens_at_us for grant in grants] == [now_us, until_us]


def test_an_orchestrator_that_goes_while_it_is_looked_at_is_shown_as_it_was(plane: Plane) -> None:
    """Another generation comes into force between the question and what the store says."""

    async def story() -> list[dict[str, Any]]:
        asked = asyncio.ensure_future(vp_routes.look(plane, ["vp-a", "vp-b"]))
        await asyncio.sleep(0)  # it has begun
        plane.control = under({**SPEC, "orchestrators": {"vp-a": {}}})
        return await asked

    assert [one["id"] for one in asyncio.run(story())] == ["vp-a", "vp-b"]
