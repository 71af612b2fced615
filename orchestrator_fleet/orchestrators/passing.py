"""Passing a task on to another orchestrator: what delegating it and handing it over have in common.

A task that is passed on several times makes a chain, each link asked by the one that the link before asked:

    vp-a ──delegation──▶ vp-b ──handoff──▶ vp-c         vp-c has the task; both links stand

A link stands while the task is where the links after it have taken it. What becomes of a link follows from the task
(`states_of`, which is pure): a claim by its target accepts it, the task's end ends it, and when somebody else takes the
task it is expired. Whoever reads sees that at once; `settle` writes it down, with its events and notices.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import Conflict, Invalid, NotFound
from orchestrator_fleet.orchestrators import coordination
from orchestrator_fleet.orchestrators.coordination import Coordination, Kind, State
from orchestrator_fleet.tasks import dependencies, holds, rows, transitions
from orchestrator_fleet.tasks.task import FINAL, TaskRow

KINDS: tuple[Kind, ...] = ("delegation", "handoff")
MAX_HOPS = 5
MAX_ANCESTORS = 20
CANCELLED = "the task was cancelled"

_Became = tuple[State, str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """A task that may be passed on: its row, held; the chain that it came by; and which step of that this one is."""

    task: TaskRow
    chain: Sequence[Coordination]
    hop: int


def check(
    conn: Connection,
    *,
    task_id: str,
    source: str,
    target: str,
    wrong: Sequence[tuple[str, str]],
    now_us: int,
) -> Passing:
    """Hold the task, write down what has become of its chain, and see that `source` may pass it on to `target`.

    `wrong` is what the caller found wrong with the request, told together with what is found here (Invalid). Conflict
    `not_owner`, `final`, `handing_over`, `delegation_cycle`, `hop_limit`, `target_paused`, `too_many`.
    """
    task = _held(conn, task_id, source=source, target=target, wrong=wrong)
    ones = coordination.of_task(conn, task.id)
    if task.status in FINAL:
        raise Conflict("final", f"{task.id}: it is {task.status}, which is final; retry it to get a new one")
    if task.orchestrator != source:
        raise Conflict("not_owner", f"{task.id}: it is not {source}'s, so {source} can't pass it on")
    if len(ones) >= coordination.MAX_OF_A_TASK:
        raise Conflict("too_many", f"{task.id}: it was passed around {len(ones)} times; that must be enough")
    task, ones = settle(conn, task, ones, now_us=now_us)
    if under_way := next((one for one in ones if is_under_way(one)), None):
        raise Conflict(
            "handing_over", f"{task.id}: it is just being handed over to {under_way.target} ({under_way.id}); wait"
        )
    chain = live_chain(task, ones)
    _refuse_circle(conn, task, chain, target)
    if len(chain) >= MAX_HOPS:
        path = " -> ".join(_names(chain, source))
        raise Conflict("hop_limit", f"{task.id}: it was passed on {len(chain)} times ({path}), which is the limit")
    _refuse_paused(conn, target, now_us=now_us)
    return Passing(task=task, chain=chain, hop=len(chain) + 1)


def pass_on(conn: Connection, passing: Passing, *, target: str, actor: str, now_us: int) -> None:
    """Who passes a task on has accepted it: the newest link says so from now on."""
    if passing.chain and passing.chain[-1].state == "pending":
        reason = f"passed on to {target}"
        coordination.move(conn, passing.chain[-1], "accepted", passing.task, reason=reason, actor=actor, now_us=now_us)


def is_under_way(one: Coordination) -> bool:
    """Whether it is a handoff that waits for its session to end: the task is still where it was, held."""
    return one.kind == "handoff" and one.state == "pending"


def holding(source: str, target: str | None) -> str:
    """The condition of a task that such a handoff holds."""
    return f"is being handed over to {target} by {source}; waits for its session to end"


def is_held(task: TaskRow, one: Coordination) -> bool:
    """Whether the handoff `one`, which is under way, still holds the task."""
    is_blocked = task.status == "BLOCKED" and task.blocked_reason == "manual"
    return is_blocked and task.condition == holding(one.source, one.target)


def live_chain(task: TaskRow, ones: Sequence[Coordination]) -> Sequence[Coordination]:
    """The links that brought the task to who has it now, oldest first."""
    chain: list[Coordination] = []
    for one in _in_order(ones):
        if _links(one.kind, one.state):
            chain = [*chain, one] if chain and chain[-1].target == one.source else [one]
    return chain if chain and chain[-1].target == task.orchestrator else []


def states_of(
    task: TaskRow, ones: Sequence[Coordination], *, cancelled_because: str | None = None
) -> Mapping[str, _Became]:
    """What has become of each of a task's coordinations, by id: (state, reason). Pure.

    `ones` are all of the task; those of other kinds are as they are.
    """
    became: dict[str, _Became] = {one.id: (one.state, one.reason) for one in ones}
    later: list[Coordination] = []  # the links that stand, the oldest first
    for one in reversed(_in_order(ones)):
        if one.is_open:
            holder = one.source if is_under_way(one) else one.target
            for link in later:
                holder = link.target if link.source == holder else holder
            became[one.id] = _became(task, one, holder, cancelled_because)
            if holder != task.orchestrator:
                continue
        if _links(one.kind, one.state):
            later.insert(0, one)
    return became


def _became(task: TaskRow, one: Coordination, holder: str | None, because: str | None) -> _Became:
    """`holder` is who has the task if this one and those after it stand."""
    if is_under_way(one) and is_held(task, one) and task.orchestrator == one.source:
        return one.state, one.reason
    if task.orchestrator != holder:
        return "expired", f"the task moved on to {task.orchestrator or 'nobody'}"
    if task.status == "CANCELLED":
        return "expired", f"{CANCELLED}: {because}" if because else CANCELLED
    if is_under_way(one):
        return "expired", "somebody put the task back in line first"
    if task.status == "DONE":
        return "done", None
    claimed = task.attempt > one.since_attempt or holder != one.target
    return ("accepted", None) if one.state == "pending" and claimed else (one.state, one.reason)


def look(conn: Connection, ones: Sequence[Coordination]) -> list[Coordination]:
    """The same coordinations as they are by now, whatever is written down yet."""
    concerned = {one.task for one in ones if one.kind in KINDS and one.is_open}
    became = {of: state for chain in _chains(conn, concerned) for of, state in _by_now(conn, *chain).items()}
    return [_as(one, became.get(one.id)) for one in ones]


def unsettled(conn: Connection, task_ids: Collection[str]) -> list[str]:
    """Those of the tasks of which something is not written down yet."""
    return [
        task.id
        for task, ones in _chains(conn, task_ids)
        if any(one.state != state for one, (state, _) in zip(ones, _by_now(conn, task, ones).values(), strict=True))
    ]


def _chains(conn: Connection, task_ids: Collection[str]) -> list[tuple[TaskRow, Sequence[Coordination]]]:
    if not task_ids:
        return []
    chains = coordination.of_tasks(conn, sorted(task_ids))
    return [(task, chains[task.id]) for task in rows.get_all(conn, task_ids).values()]


def _by_now(conn: Connection, task: TaskRow, ones: Sequence[Coordination]) -> Mapping[str, _Became]:
    return states_of(task, ones, cancelled_because=coordination.cancelled_because(conn, task))


def _as(one: Coordination, became: _Became | None) -> Coordination:
    return one if became is None else replace(one, state=became[0], reason=became[1])


def settle(
    conn: Connection, task: TaskRow, ones: Sequence[Coordination], *, now_us: int, actor: str = "system"
) -> tuple[TaskRow, Sequence[Coordination]]:
    """Write down what has become of a task's links; answers the task and the links as they are then.

    The task's row must be held, and `ones` read after that. What a handoff held that came to nothing is let go.
    """
    became = _by_now(conn, task, ones)
    after = list[Coordination]()
    for one in ones:
        state, reason = became[one.id]
        if state == one.state:
            after.append(one)
            continue
        if is_under_way(one) and is_held(task, one):
            task = rows.apply(conn, task, let_go(conn, task, now_us=now_us), now_us=now_us)
            rows.tell(conn, "task_unblocked", task, actor=actor, now_us=now_us, reason=reason)
        after.append(coordination.move(conn, one, state, task, reason=reason, actor=actor, now_us=now_us))
    return task, after


def let_go(conn: Connection, task: TaskRow, *, now_us: int) -> transitions.Change:
    """BLOCKED -> TODO, or BLOCKED/dependency where it waits for others by now."""
    condition = dependencies.unmet(conn, task.depends_on)
    if condition is None:
        return transitions.unblocked(task, now_us=now_us)
    return transitions.Change({"blocked_reason": "dependency", "condition": condition})


def _held(conn: Connection, task_id: str, *, source: str, target: str, wrong: Sequence[tuple[str, str]]) -> TaskRow:
    found = [*wrong]
    if target == source:
        found.append(("to", f"got {target} itself; name another"))
    try:
        task = rows.get_to_change(conn, task_id)
    except NotFound as problem:
        found.append(("task", str(problem)))
        raise Invalid(found) from None
    if found:
        raise Invalid(found)
    return task


def _refuse_circle(conn: Connection, task: TaskRow, chain: Sequence[Coordination], target: str) -> None:
    """Nobody gets what he passed on, nor a part of what he has, or had, himself."""
    owner = task.orchestrator or ""
    paths = [_names(chain, owner)]
    seen, parent = {task.id}, task.parent
    below: list[str] = paths[0]
    while parent is not None and parent not in seen and len(seen) <= MAX_ANCESTORS:
        seen.add(parent)
        try:
            above = rows.get(conn, parent)
        except NotFound:
            break
        if above.status in FINAL:
            break  # whatever it waited for, it does no more
        below = [*_names(live_chain(above, coordination.of_task(conn, above.id)), above.orchestrator or ""), *below]
        paths.append(below)
        parent = above.parent
    for path in paths:
        if target in path:
            told = " -> ".join([*path[path.index(target) :], target])
            raise Conflict(
                "delegation_cycle",
                f"{task.id}: {target} has passed it on itself, or asked for it: {told}; name another",
            )


def _names(chain: Sequence[Coordination], owner: str) -> list[str]:
    return [*(one.source for one in chain), owner]


def _refuse_paused(conn: Connection, target: str, *, now_us: int) -> None:
    pause = next((hold for hold in holds.in_force(holds.find(conn, target), now_us) if hold.kind == "pause"), None)
    if pause is None:
        return
    until = f" until {to_rfc3339(pause.until_us)}" if pause.until_us is not None else ""
    why = f": {pause.reason}" if pause.reason else ""
    raise Conflict("target_paused", f"{target}: it is paused by {pause.by}{until}{why}; activate it, or name another")


def _links(kind: Kind, state: State) -> bool:
    """Whether it has moved the task, and is not undone."""
    return state in ("accepted", "done") or (kind == "delegation" and state == "pending")


def _in_order(ones: Sequence[Coordination]) -> list[Coordination]:
    # Two of a moment: the earlier step of a chain is the earlier one.
    return sorted((one for one in ones if one.kind in KINDS), key=lambda one: (one.created_at_us, one.hop, one.id))
