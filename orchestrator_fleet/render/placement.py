"""Which orchestrator runs on which machine: pure, stable, and near linear in the size of the fleet.

Who names a `machine` goes there first. Then everybody stays where they are (`kept`), as long as that is still
allowed. The rest are placed one by one, those with the fewest machines to choose from first: over the values of
their `spread` label, then on the machine with the smallest share of its slots taken, then by name.

A cordoned machine keeps what it has, a drained one nothing; a `machine:` by name still reaches a cordoned one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from orchestrator_fleet.errors import Diagnostic, SpecInvalid
from orchestrator_fleet.spec.model import FleetFile, Machine, Placement

FLEET_YAML = "fleet.yaml"
MAX_ROUNDS = 4
MAX_EXPLAINED = 20
MAX_NAMED = 3
_ANYWHERE = Placement()

_Selector = tuple[tuple[str, str], ...]
_Heap = list[tuple[float, str]]


def place(file: FleetFile, kept: Mapping[str, str]) -> dict[str, str]:
    """Orchestrator -> machine, for all of them.

    `kept` says where each is now. Given an answer of this function as `kept`, the same spec gets the same answer.
    Raises `SpecInvalid`, one diagnostic for each orchestrator that fits nowhere, saying why each machine refused.
    """
    urgent: frozenset[str] = frozenset()
    for _ in range(MAX_ROUNDS):
        placing = _Placing(file)
        placing.place_all(kept, urgent)
        # One that stays may hold the only place that a choosier one could have: let that one choose before it.
        if not placing.unplaced or not kept or urgent.issuperset(placing.unplaced):
            break
        urgent = urgent.union(placing.unplaced)
    if placing.unplaced:
        raise SpecInvalid(placing.explain())
    return placing.places


class _Placing:
    """One try: who is placed where so far, and heaps that know the next best machine.

    Loads and counts only grow, so a heap's entry is at worst too optimistic: it is brought up to date when it
    comes to the top.
    """

    def __init__(self, file: FleetFile) -> None:
        self.places: dict[str, str] = {}
        self.unplaced: list[str] = []
        self._machines = {name: file.machines[name] for name in sorted(file.machines)}
        self._wants = {name: file.orchestrators[name] for name in sorted(file.orchestrators)}
        self._used = dict.fromkeys(self._machines, 0)
        self._rules = {name: spec.placement or _ANYWHERE for name, spec in self._wants.items()}
        self._spread_labels = {rule.spread for rule in self._rules.values() if rule.spread is not None}
        self._rivals: dict[str, set[str]] = defaultdict(set)
        for name, rule in self._rules.items():
            for other in rule.avoid:
                self._rivals[name].add(other)
                self._rivals[other].add(name)
        self._open_by_label: dict[tuple[str, str], list[str]] = defaultdict(list)
        self._open = [name for name, machine in self._machines.items() if not machine.cordoned and not machine.drained]
        for name in self._open:
            for label in self._machines[name].labels.items():
                self._open_by_label[label].append(name)
        self._candidates: dict[_Selector, list[str]] = {}
        self._by_load: dict[tuple[_Selector, str | None, str], _Heap] = {}
        self._by_count: dict[tuple[_Selector, str | None, str], _Heap] = {}
        self._spread_counts: dict[tuple[str | None, str, str], int] = defaultdict(int)

    def place_all(self, kept: Mapping[str, str], urgent: frozenset[str]) -> None:
        """Pinned ones, urgent ones, those that stay, then the rest."""
        pinned = [name for name, spec in self._wants.items() if spec.machine is not None]
        free = sorted(
            (name for name, spec in self._wants.items() if spec.machine is None),
            key=lambda name: (len(self._candidates_for(self._selector(name))), name),
        )
        for name in pinned:
            self._settle(name, self._pinned_to(name))
        for name in free:
            if name in urgent:
                self._settle(name, self._choose(name))
        for name in self._wants:
            if name in kept and name not in self.places and name not in urgent and self._may_stay(name, kept[name]):
                self._settle(name, kept[name])
        for name in free:
            if name not in self.places and name not in urgent:
                self._settle(name, self._choose(name))

    def explain(self) -> list[Diagnostic]:
        """Why each unplaced orchestrator fits nowhere."""
        diagnostics = [self._explain(name) for name in self.unplaced[:MAX_EXPLAINED]]
        more = len(self.unplaced) - len(diagnostics)
        if more:
            problem = f"{more} more orchestrators fit on no machine"
            diagnostics.append(Diagnostic(file=FLEET_YAML, path="orchestrators", problem=problem))
        return diagnostics

    def _settle(self, name: str, machine: str | None) -> None:
        if machine is None:
            self.unplaced.append(name)
            return
        self.places[name] = machine
        self._used[machine] += 1
        for label in self._spread_labels:
            value = self._machines[machine].labels.get(label, "")
            self._spread_counts[label, self._wants[name].discipline, value] += 1

    def _pinned_to(self, name: str) -> str | None:
        machine = self._wants[name].machine or ""
        declared = self._machines.get(machine)
        return machine if declared is not None and not declared.drained and self._has_room(machine) else None

    def _may_stay(self, name: str, machine: str) -> bool:
        declared = self._machines.get(machine)
        return (
            self._wants[name].machine is None
            and declared is not None
            and not declared.drained
            and _lacks(declared, self._selector(name)) is None
            and self._has_room(machine)
            and machine not in self._forbidden(name)
        )

    def _has_room(self, machine: str) -> bool:
        return self._used[machine] < self._machines[machine].slots

    def _selector(self, name: str) -> _Selector:
        return tuple(sorted(self._rules[name].labels.items()))

    def _forbidden(self, name: str) -> dict[str, str]:
        """Machine -> the orchestrator there that must not be met."""
        return {self.places[rival]: rival for rival in self._rivals.get(name, ()) if rival in self.places}

    def _candidates_for(self, selector: _Selector) -> list[str]:
        """Machines open for new ones that have the labels, by name."""
        found = self._candidates.get(selector)
        if found is None:
            rarest = min((self._open_by_label.get(label, []) for label in selector), key=len, default=self._open)
            found = [name for name in rarest if _lacks(self._machines[name], selector) is None]
            self._candidates[selector] = found
        return found

    def _choose(self, name: str) -> str | None:
        selector, spread, discipline = self._selector(name), self._rules[name].spread, self._wants[name].discipline
        forbidden, values, tried = self._forbidden(name), self._values(selector, spread, discipline), []
        chosen = None
        while values and chosen is None:
            count, value = heappop(values)
            if count != self._spread_counts[spread, discipline, value]:
                heappush(values, (self._spread_counts[spread, discipline, value], value))
                continue
            chosen = self._least_loaded(self._by_load[selector, spread, value], forbidden)
            tried.append((count, value))
        for entry in tried:
            heappush(values, entry)
        return chosen

    def _values(self, selector: _Selector, spread: str | None, discipline: str) -> _Heap:
        """The heap of (how many of the discipline, value of the spread label); one empty value without a label."""
        heap = self._by_count.get((selector, spread, discipline))
        if heap is None:
            members: dict[str, list[str]] = defaultdict(list)
            for machine in self._candidates_for(selector):
                members[self._machines[machine].labels.get(spread, "") if spread else ""].append(machine)
            for value, machines in members.items():
                if (selector, spread, value) not in self._by_load:
                    self._by_load[selector, spread, value] = [(self._load(machine), machine) for machine in machines]
                    heapify(self._by_load[selector, spread, value])
            heap = [(self._spread_counts[spread, discipline, value], value) for value in members]
            heapify(heap)
            self._by_count[selector, spread, discipline] = heap
        return heap

    def _least_loaded(self, heap: _Heap, forbidden: Mapping[str, str]) -> str | None:
        aside, chosen = [], None
        while heap and chosen is None:
            load, machine = heappop(heap)
            if not self._has_room(machine):
                continue
            if load != self._load(machine):
                heappush(heap, (self._load(machine), machine))
                continue
            aside.append((load, machine))
            if machine not in forbidden:
                chosen = machine
        for entry in aside:
            heappush(heap, entry)
        return chosen

    def _load(self, machine: str) -> float:
        """The share of its slots that are taken."""
        return self._used[machine] / self._machines[machine].slots

    def _explain(self, name: str) -> Diagnostic:
        pinned = self._wants[name].machine
        if pinned is not None:
            why = self._refusal(name, pinned) if pinned in self._machines else "is not declared"
            hint = "give it another machine, or leave the choice to placement"
            path = f"orchestrators.{name}.machine"
            return Diagnostic(file=FLEET_YAML, path=path, problem=f"cannot go to {pinned}: it {why}", hint=hint)
        refused: dict[str, list[str]] = defaultdict(list)
        for machine in self._machines:
            refused[self._refusal(name, machine)].append(machine)
        why = "; ".join(f"{_names(machines)}: {reason}" for reason, machines in refused.items())
        hint = "add a machine or slots, or ask for less in placement"
        path = f"orchestrators.{name}.placement"
        return Diagnostic(file=FLEET_YAML, path=path, problem=f"fits on no machine ({why})", hint=hint)

    def _refusal(self, name: str, machine: str) -> str:
        declared, rival = self._machines[machine], self._forbidden(name).get(machine)
        lacking = _lacks(declared, self._selector(name))
        if declared.drained:
            return "is drained"
        if lacking is not None:
            return f"lacks label {lacking[0]}={lacking[1]}"
        if not self._has_room(machine):
            return f"is full ({declared.slots} of {declared.slots} slots)"
        return "is cordoned" if declared.cordoned else f"has {rival}, which may not share a machine with it"


def _lacks(machine: Machine, selector: _Selector) -> tuple[str, str] | None:
    """The first label of the selector that the machine doesn't have."""
    return next(((key, value) for key, value in selector if machine.labels.get(key) != value), None)


def _names(machines: list[str]) -> str:
    more = len(machines) - MAX_NAMED
    return ", ".join(machines[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
