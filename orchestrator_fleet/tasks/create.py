"""Making tasks: checked, routed, and in line (or waiting for others) in one transaction."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection

from orchestrator_fleet import ids
from orchestrator_fleet.errors import Invalid
from orchestrator_fleet.store import outbox
from orchestrator_fleet.store.schema import task_tags
from orchestrator_fleet.store.statement import Statement
from orchestrator_fleet.tasks import dependencies, rows, transitions, view
from orchestrator_fleet.tasks.dispatch import Dispatch
from orchestrator_fleet.tasks.routing import Decision
from orchestrator_fleet.tasks.task import NewTask, TaskRow

_INSERT_TAGS = Statement(task_tags.insert(), sets=("tag", "task"))
_DELETE_TAGS = task_tags.delete().where(task_tags.c.task == sa.bindparam("of_task"))


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A task to be made, and by which rules. `by`: see outbox.CALLER."""

    new: NewTask
    dispatch: Dispatch
    actor: str
    now_us: int
    by: dict[str, str | None] | None = None


def create_task(conn: Connection, *, new: NewTask, dispatch: Dispatch, actor: str, now_us: int) -> TaskRow:
    """One Order; answers the new task."""
    (answer,) = create_all(conn, [Order(new=new, dispatch=dispatch, actor=actor, now_us=now_us)])
    if isinstance(answer, Exception):
        raise answer
    return answer


def create_all(conn: Connection, orders: Sequence[Order]) -> list[TaskRow | Exception]:
    """Write new tasks; for each the task, or Invalid on an unknown orchestrator or dependency.

    `max_attempts` comes from the task, else from the retry policy of the orchestrator that it goes to. A task that no
    rule routes is kept as TODO.
    """
    answers: list[TaskRow | Exception] = []
    told: list[outbox.Event] = []
    waits_for = dependencies.unmet_all(conn, [tuple(dict.fromkeys(order.new.depends_on)) for order in orders])
    for order, waits in zip(orders, waits_for, strict=True):
        if wrong := _wrong(order, waits):
            answers.append(Invalid(wrong))
            continue
        assert not isinstance(waits, Invalid)  # noqa: S101 (it is wrong, else)
        task, decision = _made(conn, order, waits)
        answers.append(task)
        told.append(
            rows.event(
                "task_created",
                task,
                actor=order.actor,
                now_us=order.now_us,
                routed_because=decision.reason,
                by=order.by,
            )
        )
    made = [answer for answer in answers if isinstance(answer, TaskRow)]
    if made:
        rows.insert_all(conn, made)
        dependencies.write_all(conn, [(task.id, task.depends_on) for task in made])
        write_tags(conn, made)
        outbox.append(conn, *told)
    return answers


def _wrong(order: Order, waits: str | Invalid | None) -> list[tuple[str, str]]:
    """All that is wrong with an order: (field, what)."""
    named = order.new.orchestrator
    wrong = [("orchestrator", f"there is no orchestrator {named}")] if named and not order.dispatch.knows(named) else []
    return [*wrong, *waits.errors] if isinstance(waits, Invalid) else wrong


def _made(conn: Connection, order: Order, waits_for: str | None) -> tuple[TaskRow, Decision]:
    new, dispatch, now_us = order.new, order.dispatch, order.now_us
    draft = transitions.created(
        new,
        task_id=ids.new_id("task", now_us),
        actor=order.actor,
        condition=waits_for,
        waits_for_others=waits_for is not None,
        max_attempts=new.max_attempts or 1,
        now_us=now_us,
    )
    # Rules look at the whole task; where it names its orchestrator, nobody looks.
    fields = {"orchestrator": new.orchestrator} if new.orchestrator else view.to_json(draft)
    decision = dispatch.decide(conn, fields, now_us=now_us)
    task = msgspec.structs.replace(
        draft,
        orchestrator=decision.orchestrator,
        route=decision.rule,
        condition=waits_for or decision.condition,
        max_attempts=new.max_attempts or dispatch.retry(decision.orchestrator).max_attempts,
    )
    return task, decision


def write_tags(conn: Connection, new: Sequence[TaskRow]) -> None:
    """Write tasks' tags where they can be searched."""
    tags = [{"tag": tag, "task": task.id} for task in new for tag in task.tags]
    if tags:
        _INSERT_TAGS.many(conn, tags)


def rewrite_tags(conn: Connection, task: TaskRow) -> None:
    """Replace a task's tags where they can be searched."""
    conn.execute(_DELETE_TAGS, {"of_task": task.id})
    write_tags(conn, [task])
