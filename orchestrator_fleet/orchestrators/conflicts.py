"""What stands against what: each kind of conflict, found in what was read of one moment. Pure; `conflict_board` reads.

    double_ownership      somebody may still work on a task that is another's now
    dependency_deadlock   tasks wait for one that can't end by itself, or for each other
    delegation_loop       who was asked asked back, about one task and those above and below it
    same_branch           two sessions work on the same branch of the same repository
    over_capacity         more runs than sessions.max, or than the machine's sessions
    deadline_collision    a task is due sooner than the line before it lets it be done

A conflict is computed, never stored, so it is gone when what made it is gone. Its id is made of what makes it this one
and no other: it stays while the situation stands, and when the like comes again of other tasks or tries it is another.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import msgspec

from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.tasks import why
from orchestrator_fleet.tasks.why import Pace
from orchestrator_fleet.wire.vps import ConflictType as Type

Action = Literal["stop_session", "cancel", "unblock", "retry", "assign", "reject", "wait", "raise_limit", "edit"]
TYPES: tuple[Type, ...] = get_args(Type)

NAMED = 20
ID_CHARS = 16
# A daemon that was told to stop a session has stopped it by then: two beats, and the time between TERM and KILL.
STOPS_IN_US = 15 * SECOND_US

Node = TypeVar("Node", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """What may end it: the action as the API has it, and a sentence for people."""

    action: Action
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """One conflict. `identity` is what its id is made of; `tasks` are at most NAMED, `evidence` says of how many."""

    type: Type
    identity: tuple[str, ...]
    orchestrators: tuple[str, ...]
    tasks: tuple[str, ...]
    evidence: Mapping[str, Any]
    suggestion: Suggestion
    since_us: int | None = None

    @property
    def id(self) -> str:
        """`<type>-<16 hex digits>`."""
        digest = hashlib.sha256(msgspec.json.encode([self.type, *self.identity])).hexdigest()
        return f"{self.type}-{digest[:ID_CHARS]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A running attempt. `metadata` is the task's."""

    task: str
    attempt: int
    orchestrator: str
    machine: str
    started_at_us: int
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """As sessions are named everywhere."""
        return f"{self.task}.{self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What runs in one place: of an orchestrator, or on a machine. `newest` of `running` many, the newest first."""

    kind: Literal["orchestrator", "machine"]
    name: str
    running: int
    most: int
    newest: Sequence[Session]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Somebody who may work on a task that is not its own: an attempt that is over, as far as the store knows.

    `since_us`: when it stopped being its own. `reason`: how we know that it may go on.
    """

    orchestrator: str
    machine: str
    attempt: int
    since_us: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Contested:
    """An open task and those who may work on it beside its owner. `runs`: its running attempt, if one runs."""

    task: str
    owner: str | None
    runs: Session | None
    holders: Sequence[Holder]


@dataclass(frozen=True, slots=True, kw_only=True)
class Awaited:
    """A task that others wait for, as far as it is not DONE."""

    task: str
    status: str
    blocked_reason: str | None
    orchestrator: str | None
    attempt: int
    changed_at_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """One task waits for another. `owner`: who has the one that waits."""

    task: str
    owner: str | None
    awaited: Awaited


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A task in line with a due date. `ahead`: how many come before it, at least."""

    task: str
    due_at_us: int
    ahead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What is due of an orchestrator's line, and how fast it works."""

    orchestrator: str
    due: Sequence[Due]
    pace: Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An open coordination: `source` asked `target`. `family`: the topmost of the tasks above its own."""

    id: str
    kind: str
    task: str
    family: str
    source: str
    target: str
    created_at_us: int


def double_ownership(found: Iterable[Contested]) -> Iterator[Conflict]:
    """Tasks on which somebody may still work beside their owner."""
    for one in found:
        holders = sorted(one.holders, key=lambda holder: holder.attempt)
        if not holders:
            continue
        names = (*([one.owner] if one.owner else []), *(holder.orchestrator for holder in holders))
        where = ", ".join(f"attempt {holder.attempt} on {holder.machine}" for holder in holders)
        text = f"see that {where} has ended; it can report nothing any more, but what it does beside that it does twice"
        yield Conflict(
            type="double_ownership",
            identity=(one.task, str(one.runs.attempt if one.runs else 0), *(str(holder.attempt) for holder in holders)),
            orchestrators=tuple(dict.fromkeys(names)),
            tasks=(one.task,),
            evidence={
                "owner": one.owner,
                "runs": None if one.runs is None else _session(one.runs),
                "also_held_by": [
                    {
                        "orchestrator": holder.orchestrator,
                        "machine": holder.machine,
                        "attempt": holder.attempt,
                        "lost_at": to_rfc3339(holder.since_us),
                        "reason": holder.reason,
                    }
                    for holder in holders
                ],
            },
            since_us=min(holder.since_us for holder in holders),
            suggestion=Suggestion(action="stop_session", text=text),
        )


def dependency_deadlock(waits: Sequence[Wait], *, declared: Iterable[str]) -> Iterator[Conflict]:
    """Tasks that wait for one that can't end by itself, a conflict for each such one; and rings of tasks."""
    known = frozenset(declared)
    waiting: dict[str, list[Wait]] = defaultdict(list)
    for wait in waits:
        waiting[wait.awaited.task].append(wait)
    for found in waiting.values():
        cure = _stuck(found[0].awaited, known)
        if cure is not None:
            yield _stuck_on(found, cure)
    owners = {wait.task: wait.owner for wait in waits}
    leads_to: dict[str, list[str]] = defaultdict(list)
    for wait in waits:
        leads_to[wait.task].append(wait.awaited.task)
    for ring in rings(leads_to):
        names = sorted({owner for task in ring if (owner := owners.get(task)) is not None})
        text = "take one of their dependencies out, or cancel one of them"
        yield Conflict(
            type="dependency_deadlock",
            identity=("ring", *sorted(ring)),
            orchestrators=tuple(names),
            tasks=tuple(ring[:NAMED]),
            evidence={"ring": ring[:NAMED], "waiting": len(ring)},
            suggestion=Suggestion(action="edit", text=text),
        )


def _stuck(task: Awaited, declared: frozenset[str]) -> Suggestion | None:
    """What somebody has to do so that the task can end; None when it may end by itself, or somebody is asked."""
    if task.status == "CANCELLED":
        return Suggestion(
            action="unblock", text=f"unblock what waits for {task.task}, which was cancelled; or cancel that too"
        )
    if task.blocked_reason == "attempts_exhausted":
        return Suggestion(action="retry", text=f"retry {task.task}, whose tries are spent; or cancel it")
    if task.blocked_reason == "manual":
        return Suggestion(action="unblock", text=f"unblock {task.task}, which somebody blocked; or cancel it")
    if task.status == "TODO" and task.orchestrator not in declared:
        whose = "which no routing rule takes" if task.orchestrator is None else f"whose {task.orchestrator} is gone"
        return Suggestion(action="assign", text=f"assign {task.task}, {whose}, to an orchestrator; or cancel it")
    return None


def _stuck_on(waits: Sequence[Wait], cure: Suggestion) -> Conflict:
    at = waits[0].awaited
    owners = dict.fromkeys(owner for owner in (at.orchestrator, *(wait.owner for wait in waits)) if owner is not None)
    tasks = sorted(wait.task for wait in waits)
    return Conflict(
        type="dependency_deadlock",
        identity=(at.task, at.status, at.blocked_reason or "", str(at.attempt)),
        orchestrators=tuple(owners),
        tasks=(at.task, *tasks[: NAMED - 1]),
        evidence={
            "waits_for": {
                "id": at.task,
                "status": at.status,
                "blocked_reason": at.blocked_reason,
                "orchestrator": at.orchestrator,
            },
            "waiting": len(tasks),
        },
        since_us=at.changed_at_us,
        suggestion=cure,
    )


def delegation_loop(asked: Iterable[Asked]) -> Iterator[Conflict]:
    """Coordinations of one family of tasks by which somebody asks themself in the end, over others."""
    families: dict[str, dict[str, list[Asked]]] = defaultdict(lambda: defaultdict(list))
    for one in asked:
        families[one.family][one.source].append(one)
    for family, by_source in families.items():
        for ring in rings({source: [one.target for one in ones] for source, ones in by_source.items()}):
            following = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
            steps = [
                min((one for one in by_source[name] if one.target == following[name]), key=_asked) for name in ring
            ]
            text = f"reject one of these, so that the task stays with somebody: {' -> '.join([*ring, ring[0]])}"
            yield Conflict(
                type="delegation_loop",
                identity=(family, *sorted(one.id for one in steps)),
                orchestrators=tuple(ring[:NAMED]),
                tasks=tuple(dict.fromkeys(one.task for one in steps))[:NAMED],
                evidence={
                    "family": family,
                    "coordinations": [
                        {"id": one.id, "kind": one.kind, "task": one.task, "from": one.source, "to": one.target}
                        for one in steps[:NAMED]
                    ],
                },
                since_us=max(one.created_at_us for one in steps),
                suggestion=Suggestion(action="reject", text=text),
            )


def _asked(one: Asked) -> tuple[int, str]:
    return one.created_at_us, one.id


def same_branch(sessions: Iterable[Session], *, workspaces: Mapping[str, Mapping[str, Any]]) -> Iterator[Conflict]:
    """Running sessions of the same branch of the same repository. `workspaces`: as declared, by orchestrator.

    A task's metadata may name `repo` and `branch`. Where it does not, a declared workspace says them; its branch only
    where sessions have no tree of their own (`isolate: none`).
    """
    together: dict[tuple[str, str], list[Session]] = defaultdict(list)
    for one in sessions:
        if (key := _branch(one.metadata, workspaces.get(one.orchestrator) or {})) is not None:
            together[key].append(one)
    for (repo, branch), found in together.items():
        if len(found) < 2:  # noqa: PLR2004 - it takes two
            continue
        ones = sorted(found, key=lambda one: (one.started_at_us, one.task))
        later = ones[-1]
        text = (
            f"let {later.task} wait until {ones[0].task} has ended; a limit with the key task.metadata.branch does that"
        )
        yield Conflict(
            type="same_branch",
            identity=(repo, branch, *sorted(one.id for one in ones)),
            orchestrators=tuple(dict.fromkeys(one.orchestrator for one in ones)),
            tasks=tuple(one.task for one in ones[:NAMED]),
            evidence={
                "repo": repo,
                "branch": branch,
                "running": len(ones),
                "sessions": [_session(one) for one in ones[:NAMED]],
            },
            since_us=ones[1].started_at_us,
            suggestion=Suggestion(action="wait", text=text),
        )


def _branch(metadata: Mapping[str, Any], workspace: Mapping[str, Any]) -> tuple[str, str] | None:
    shared = workspace.get("ref") or "HEAD" if workspace.get("isolate") == "none" else None
    repo, branch = metadata.get("repo", workspace.get("repo")), metadata.get("branch", shared)
    return (repo, branch) if isinstance(repo, str) and isinstance(branch, str) and repo and branch else None


def over_capacity(crowds: Iterable[Crowd]) -> Iterator[Conflict]:
    """Places where more runs than may. Nothing begins there meanwhile, so what runs newest marks the situation."""
    for one in crowds:
        if one.running <= one.most:
            continue
        setting = "sessions.max" if one.kind == "orchestrator" else f"machines.{one.name}.sessions"
        owners = [one.name] if one.kind == "orchestrator" else sorted({session.orchestrator for session in one.newest})
        text = (
            f"wait until {one.running - one.most} of {one.name}'s sessions have ended, end some, or raise {setting};"
            " nothing more begins there meanwhile"
        )
        yield Conflict(
            type="over_capacity",
            identity=(one.kind, one.name, str(one.most), *(session.id for session in one.newest[:1])),
            orchestrators=tuple(owners),
            tasks=tuple(session.task for session in one.newest[:NAMED]),
            evidence={one.kind: one.name, "running": one.running, "max": one.most, "setting": setting},
            since_us=None,
            suggestion=Suggestion(action="wait", text=text),
        )


def deadline_collision(lines: Iterable[Line], *, now_us: int) -> Iterator[Conflict]:
    """Tasks that are due before they will be done, as they have to wait for the line before them.

    By the pace of the orchestrator's last attempts; without such, nobody knows.
    """
    for line in lines:
        for one in line.due:
            waits_s = why.behind_line(one.ahead, line.pace)
            if line.pace.mean_run_s is None or not waits_s or one.due_at_us <= now_us:
                continue
            starts_us = now_us + round(waits_s * SECOND_US)
            done_us = starts_us + round(line.pace.mean_run_s * SECOND_US)
            if done_us <= one.due_at_us:
                continue
            text = (
                f"raise the priority of {one.task}, assign it to somebody with a shorter line, or move its due date;"
                f" it begins at about {to_rfc3339(starts_us)}"
            )
            yield Conflict(
                type="deadline_collision",
                identity=(one.task, str(one.due_at_us)),
                orchestrators=(line.orchestrator,),
                tasks=(one.task,),
                evidence={
                    "due_at": to_rfc3339(one.due_at_us),
                    "starts_at": to_rfc3339(starts_us),
                    "done_at": to_rfc3339(done_us),
                    "based_on": {
                        "ahead": one.ahead,
                        "slots": line.pace.slots,
                        "running": line.pace.running,
                        "mean_run_s": round(line.pace.mean_run_s, 3),
                        "attempts": line.pace.attempts,
                    },
                },
                since_us=None,
                suggestion=Suggestion(action="edit", text=text),
            )


def rings(leads_to: Mapping[Node, Sequence[Node]]) -> list[list[Node]]:
    """Rings of nodes that lead to each other, no node in two of them; each begins with the smallest of its nodes."""
    left = {node: sorted(set(after)) for node, after in sorted(leads_to.items())}
    found = []
    while left := _without_ends(left):
        # Every node leads on to one that does, so whoever walks comes by somewhere twice.
        node, seen = next(iter(left)), set[Node]()
        while node not in seen:
            seen.add(node)
            node = left[node][0]
        ring = _ring(left, node)
        smallest = ring.index(min(ring))
        found.append([*ring[smallest:], *ring[:smallest]])
        left = {node: after for node, after in left.items() if node not in ring}
    return found


def _without_ends(leads_to: Mapping[Node, Sequence[Node]]) -> dict[Node, list[Node]]:
    """The graph without what leads nowhere, and without what leads nowhere then."""
    left = {node: {after for after in afters if after in leads_to} for node, afters in leads_to.items()}
    led_from: dict[Node, list[Node]] = defaultdict(list)
    for node, afters in left.items():
        for after in afters:
            led_from[after].append(node)
    ends = [node for node, afters in left.items() if not afters]
    while ends:
        end = ends.pop()
        del left[end]
        for node in led_from[end]:
            left[node].discard(end)
            if not left[node]:
                ends.append(node)
    return {node: sorted(afters) for node, afters in left.items()}


def _ring(leads_to: Mapping[Node, Sequence[Node]], start: Node) -> list[Node]:
    """The shortest way from `start` back to it, without its end. There must be one."""
    came_from: dict[Node, Node] = {}
    frontier = [start]
    while start not in came_from:
        reached = [(after, node) for node in frontier for after in leads_to[node] if after not in came_from]
        came_from |= dict(reversed(reached))
        frontier = list(dict.fromkeys(after for after, _ in reached))
    path = [came_from[start]]
    while path[-1] != start:
        path.append(came_from[path[-1]])
    return path[::-1]


def _session(one: Session) -> dict[str, Any]:
    return {
        "id": one.id,
        "orchestrator": one.orchestrator,
        "machine": one.machine or None,
        "since": to_rfc3339(one.started_at_us),
    }
