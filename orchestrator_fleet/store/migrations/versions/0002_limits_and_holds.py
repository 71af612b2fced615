"""Limits, holds, spending and schedules; a task may be parked, and a spent quota is an outcome of its own. Frozen."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

CLAIMABLE = "status = 'TODO' AND wakes_at_us IS NULL AND parked_by IS NULL"
RUNNING = "status = 'IN_PROGRESS'"
ONLY_TODO_WAITS = (
    "(status = 'TODO' OR (wakes_at_us IS NULL AND parked_by IS NULL))"
    " AND (status = 'TODO' OR ripens_at_us IS NULL OR (status = 'BLOCKED' AND blocked_reason IN ('quota', 'budget')))"
)
ONLY_RUNNING_COUNTS = "status = 'IN_PROGRESS' OR counts_on IS NULL"
OUTCOMES = (
    "outcome IS NULL OR outcome IN"
    " ('done', 'failed', 'failed_for_good', 'timeout', 'crashed', 'cancelled', 'released', 'lease_lost', 'quota')"
)
TASKS_0001 = (
    "id",
    "title",
    "description",
    "priority",
    "status",
    "blocked_reason",
    "condition",
    "orchestrator",
    "discipline",
    "tags",
    "due_at_us",
    "available_at_us",
    "estimate_s",
    "depends_on",
    "parent",
    "metadata",
    "route",
    "attempt",
    "failures",
    "max_attempts",
    "created_by",
    "created_at_us",
    "updated_at_us",
    "started_at_us",
    "completed_at_us",
    "result",
    "error",
    "version",
    "generation",
    "charter_version",
    "token",
    "lease_until_us",
    "machine",
    "rank",
    "due_key_us",
    "waiting_since_us",
    "wakes_at_us",
    "ripens_at_us",
)
ATTEMPTS_0001 = (
    "task",
    "attempt",
    "token",
    "orchestrator",
    "machine",
    "holder",
    "generation",
    "charter_version",
    "started_at_us",
    "ended_at_us",
    "outcome",
    "answer",
    "exit_code",
    "error",
    "usage",
    "stdout_bytes",
    "stderr_bytes",
    "log_bytes",
)


def upgrade() -> None:
    """To this revision."""
    if op.get_context().dialect.name == "sqlite":
        _rebuild_tasks()
        _rebuild_attempts()
    else:
        _alter_tasks()
        _alter_attempts()
    _index(
        "ix_tasks_parked",
        ["parked_by", "orchestrator", "rank", "due_key_us", "created_at_us", "id"],
        where="parked_by IS NOT NULL",
    )
    _index("ix_tasks_claim", ["orchestrator", "rank", "due_key_us", "created_at_us", "id"], where=CLAIMABLE)
    _index("ix_attempts_done", ["orchestrator", "ended_at_us"], table="attempts", where="outcome = 'done'")
    _make_limit_uses()
    _make_holds()
    _make_spending()
    _make_schedules()


def _alter_tasks() -> None:
    op.add_column("tasks", sa.Column("parked_by", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("counts_on", sa.Text(), nullable=True))
    op.add_column("tasks", sa.Column("over_budget", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.drop_constraint(op.f("ck_tasks_only_todo_waits"), "tasks")
    op.create_check_constraint(op.f("ck_tasks_only_todo_waits"), "tasks", ONLY_TODO_WAITS)
    op.create_check_constraint(op.f("ck_tasks_only_running_counts"), "tasks", ONLY_RUNNING_COUNTS)
    op.drop_index("ix_tasks_claim", "tasks")
    op.drop_index("ix_tasks_lease", "tasks")


def _alter_attempts() -> None:
    op.drop_constraint(op.f("ck_attempts_outcome"), "attempts")
    op.create_check_constraint(op.f("ck_attempts_outcome"), "attempts", OUTCOMES)


def _put_in_place(name: str, columns: tuple[str, ...]) -> None:
    """Move the rows of table `name` to `name_new`, which takes its name.

    SQLite changes no CHECK of a table that stands. Foreign keys are off meanwhile: dropping the old table would delete
    what refers to it; what refers to it by name refers to the new one afterwards.
    """
    listed = ", ".join(f'"{column}"' for column in columns)
    op.execute(f"INSERT INTO {name}_new ({listed}) SELECT {listed} FROM {name}")  # noqa: S608 (made of the constants here)
    op.drop_table(name)
    op.rename_table(f"{name}_new", name)


def _rebuild_tasks() -> None:
    op.create_table(
        "tasks_new",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("blocked_reason", sa.Text(), nullable=True),
        sa.Column("condition", sa.Text(), nullable=True),
        sa.Column("orchestrator", sa.Text(), nullable=True),
        sa.Column("discipline", sa.Text(), nullable=True),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("due_at_us", sa.BigInteger(), nullable=True),
        sa.Column("available_at_us", sa.BigInteger(), nullable=True),
        sa.Column("estimate_s", sa.Float(), nullable=True),
        sa.Column("depends_on", sa.Text(), nullable=False),
        sa.Column("parent", sa.Text(), nullable=True),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("route", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
        sa.Column("started_at_us", sa.BigInteger(), nullable=True),
        sa.Column("completed_at_us", sa.BigInteger(), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Text(), nullable=True),
        sa.Column("charter_version", sa.Text(), nullable=True),
        sa.Column("token", sa.Text(), nullable=True),
        sa.Column("lease_until_us", sa.BigInteger(), nullable=True),
        sa.Column("machine", sa.Text(), nullable=True),
        sa.Column("rank", sa.SmallInteger(), nullable=False),
        sa.Column("due_key_us", sa.BigInteger(), nullable=False),
        sa.Column("waiting_since_us", sa.BigInteger(), nullable=False),
        sa.Column("wakes_at_us", sa.BigInteger(), nullable=True),
        sa.Column("ripens_at_us", sa.BigInteger(), nullable=True),
        sa.Column("parked_by", sa.Text(), nullable=True),
        sa.Column("counts_on", sa.Text(), nullable=True),
        sa.Column("over_budget", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.CheckConstraint(
            "(status = 'BLOCKED') = (blocked_reason IS NOT NULL)"
            " AND (blocked_reason IS NULL OR blocked_reason IN"
            " ('dependency', 'approval', 'escalation', 'quota', 'budget', 'attempts_exhausted', 'manual'))",
            name=op.f("ck_tasks_blocked_has_a_reason"),
        ),
        sa.CheckConstraint(
            "(status = 'IN_PROGRESS' AND token IS NOT NULL AND lease_until_us IS NOT NULL AND orchestrator IS NOT NULL"
            " AND started_at_us IS NOT NULL AND attempt >= 1)"
            " OR (status <> 'IN_PROGRESS' AND token IS NULL AND lease_until_us IS NULL)",
            name=op.f("ck_tasks_in_progress_has_a_lease"),
        ),
        sa.CheckConstraint(
            "(status IN ('DONE', 'CANCELLED')) = (completed_at_us IS NOT NULL)",
            name=op.f("ck_tasks_final_has_completed_at"),
        ),
        sa.CheckConstraint("priority IN ('CRITICAL', 'HIGH', 'MEDIUM', 'LOW')", name=op.f("ck_tasks_priority")),
        sa.CheckConstraint(ONLY_TODO_WAITS, name=op.f("ck_tasks_only_todo_waits")),
        sa.CheckConstraint(ONLY_RUNNING_COUNTS, name=op.f("ck_tasks_only_running_counts")),
        sa.CheckConstraint(
            "status IN ('TODO', 'IN_PROGRESS', 'BLOCKED', 'DONE', 'CANCELLED')", name=op.f("ck_tasks_status")
        ),
        sa.CheckConstraint(
            "attempt >= 0 AND failures >= 0 AND failures <= attempt AND max_attempts >= 1",
            name=op.f("ck_tasks_attempts"),
        ),
        sa.CheckConstraint("rank BETWEEN 0 AND 3", name=op.f("ck_tasks_rank")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
    )
    _put_in_place("tasks", TASKS_0001)
    _index("ix_tasks_created", ["created_at_us", "id"])
    _index("ix_tasks_line", ["rank", "due_key_us", "created_at_us", "id"])
    _index("ix_tasks_ripens", ["ripens_at_us"], where="ripens_at_us IS NOT NULL")
    _index("ix_tasks_running", ["orchestrator", "machine"], where=RUNNING)
    _index("ix_tasks_status", ["status", "orchestrator"])
    _index("ix_tasks_wakes", ["orchestrator", "wakes_at_us"], where="wakes_at_us IS NOT NULL")


def _rebuild_attempts() -> None:
    op.create_table(
        "attempts_new",
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("token", sa.Text(), nullable=False),
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("generation", sa.Text(), nullable=True),
        sa.Column("charter_version", sa.Text(), nullable=True),
        sa.Column("started_at_us", sa.BigInteger(), nullable=False),
        sa.Column("ended_at_us", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("answer", sa.Text(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("usage", sa.Text(), nullable=True),
        sa.Column("stdout_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("stderr_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("log_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(OUTCOMES, name=op.f("ck_attempts_outcome")),
        sa.CheckConstraint("(ended_at_us IS NULL) = (outcome IS NULL)", name=op.f("ck_attempts_ended_has_an_outcome")),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_attempts_task"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task", "attempt", name=op.f("pk_attempts")),
        sqlite_with_rowid=False,
    )
    _put_in_place("attempts", ATTEMPTS_0001)


def _make_limit_uses() -> None:
    op.create_table(
        "limit_uses",
        sa.Column("limit_name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("started_at_us", sa.BigInteger(), nullable=False),
        sa.Column("ended_at_us", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_limit_uses_task"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task", "attempt", "limit_name", name=op.f("pk_limit_uses")),
    )
    _index("ix_limit_uses_running", ["limit_name", "value"], table="limit_uses", where="ended_at_us IS NULL")
    _index("ix_limit_uses_started", ["limit_name", "value", "started_at_us"], table="limit_uses")
    _index("ix_limit_uses_ended", ["ended_at_us"], table="limit_uses", where="ended_at_us IS NOT NULL")


def _make_holds() -> None:
    op.create_table(
        "holds",
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("until_us", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("kind IN ('pause', 'quota')", name=op.f("ck_holds_kind")),
        sa.PrimaryKeyConstraint("orchestrator", "kind", name=op.f("pk_holds")),
    )


def _make_spending() -> None:
    op.create_table(
        "spending",
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("minute_us", sa.BigInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("usd", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("orchestrator", "minute_us", name=op.f("pk_spending")),
    )


def _make_schedules() -> None:
    op.create_table(
        "schedules",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("until_us", sa.BigInteger(), nullable=False),
        sa.Column("last_task", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_schedules")),
    )


def _index(name: str, columns: list[str], *, table: str = "tasks", where: str | None = None) -> None:
    only: dict[str, Any] = {} if where is None else {"sqlite_where": sa.text(where), "postgresql_where": sa.text(where)}
    op.create_index(name, table, columns, **only)
