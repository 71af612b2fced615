"""Somebody who claims under the rules of a spec, and sees all that a claim answers."""

from __future__ import annotations

from typing import Any

from desk import Desk

from orchestrator_fleet.tasks import gate, life
from orchestrator_fleet.tasks.gate import Gate
from orchestrator_fleet.tasks.rules import Rules
from orchestrator_fleet.tasks.task import Ask, Claimed


def line(desk: Desk, *titles: str, **fields: Any) -> None:
    """Tasks that stand in line in this order."""
    for title in titles:
        desk.make(title, **fields)
        desk.clock.advance(0.001)


class Asker:
    """Claims under rules, and says all that a claim answers."""

    def __init__(self, desk: Desk, spec: dict[str, Any], *, lease_s: float = 30.0) -> None:
        self.desk, self.rules, self.lease_s = desk, Rules.of_spec(spec), lease_s

    def ask(self, orchestrator: str = "vp-a", *, limit: int = 1, machine: str = "m1", **fields: Any) -> Claimed:
        """One claim."""
        ask = Ask(
            orchestrator=orchestrator,
            machine=machine,
            limit=limit,
            lease_s=self.lease_s,
            actor="k-test",
            rules=self.rules,
            now_us=self.desk.now,
            **fields,
        )
        (answer,) = self.desk.store.write_sync(lambda c: life.claim_all(c, [ask]))
        return answer

    def titles(self, orchestrator: str = "vp-a", **fields: Any) -> list[str]:
        """What one claim gets."""
        return [grant.task.title for grant in self.ask(orchestrator, **fields).grants]

    def look(self, orchestrator: str = "vp-a", **fields: Any) -> Gate:
        """The gate as it stands."""
        return self.desk.store.write_sync(
            lambda c: gate.look(c, orchestrator=orchestrator, rules=self.rules, now_us=self.desk.now, **fields)
        )


def spec_of(vp_a: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A fleet in which vp-a has these fields."""
    return {"orchestrators": {"vp-a": vp_a, "vp-b": {}}, **more}
