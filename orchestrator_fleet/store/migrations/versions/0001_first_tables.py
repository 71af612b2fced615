"""The first tables. Frozen: a later schema comes by a later revision, never by an edit here."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """To this revision."""
    op.create_table(
        "counters",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    op.create_table(
        "daemon_keys",
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_daemon_keys_sha256")),
        sa.PrimaryKeyConstraint("orchestrator", "machine", name=op.f("pk_daemon_keys")),
        sa.UniqueConstraint("key_id", name=op.f("uq_daemon_keys_key_id")),
    )
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("orchestrator", sa.Text(), nullable=True),
        sa.Column("machine", sa.Text(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("generation", sa.Text(), nullable=True),
        sa.Column("charter_version", sa.Text(), nullable=True),
        sa.Column("route", sa.Text(), nullable=True),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_events_task",
        "events",
        ["task", "seq"],
        sqlite_where=sa.text("task IS NOT NULL"),
        postgresql_where=sa.text("task IS NOT NULL"),
    )
    op.create_table(
        "idempotency",
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("headers", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("actor", "key", name=op.f("pk_idempotency")),
    )
    op.create_index("ix_idempotency_at_us", "idempotency", ["at_us"])
    op.create_table(
        "presence",
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("boot", sa.Text(), nullable=False),
        sa.Column("epoch", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Text(), nullable=False),
        sa.Column("charter_version", sa.Text(), nullable=False),
        sa.Column("sessions_max", sa.Integer(), nullable=False),
        sa.Column("sessions", sa.Text(), nullable=False),
        sa.Column("connected_at_us", sa.BigInteger(), nullable=False),
        sa.Column("last_seen_us", sa.BigInteger(), nullable=False),
        sa.Column("gone_at_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("orchestrator", name=op.f("pk_presence")),
    )
    op.create_table(
        "tasks",
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
        sa.CheckConstraint(
            "status = 'TODO' OR (wakes_at_us IS NULL AND ripens_at_us IS NULL)", name=op.f("ck_tasks_only_todo_waits")
        ),
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
    op.create_index(
        "ix_tasks_claim",
        "tasks",
        ["orchestrator", "rank", "due_key_us", "created_at_us", "id"],
        sqlite_where=sa.text("status = 'TODO' AND wakes_at_us IS NULL"),
        postgresql_where=sa.text("status = 'TODO' AND wakes_at_us IS NULL"),
    )
    op.create_index("ix_tasks_created", "tasks", ["created_at_us", "id"])
    op.create_index(
        "ix_tasks_lease",
        "tasks",
        ["lease_until_us"],
        sqlite_where=sa.text("lease_until_us IS NOT NULL"),
        postgresql_where=sa.text("lease_until_us IS NOT NULL"),
    )
    op.create_index("ix_tasks_line", "tasks", ["rank", "due_key_us", "created_at_us", "id"])
    op.create_index(
        "ix_tasks_ripens",
        "tasks",
        ["ripens_at_us"],
        sqlite_where=sa.text("ripens_at_us IS NOT NULL"),
        postgresql_where=sa.text("ripens_at_us IS NOT NULL"),
    )
    op.create_index(
        "ix_tasks_running",
        "tasks",
        ["orchestrator", "machine"],
        sqlite_where=sa.text("status = 'IN_PROGRESS'"),
        postgresql_where=sa.text("status = 'IN_PROGRESS'"),
    )
    op.create_index("ix_tasks_status", "tasks", ["status", "orchestrator"])
    op.create_index(
        "ix_tasks_wakes",
        "tasks",
        ["orchestrator", "wakes_at_us"],
        sqlite_where=sa.text("wakes_at_us IS NOT NULL"),
        postgresql_where=sa.text("wakes_at_us IS NOT NULL"),
    )
    op.create_table(
        "attempts",
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
        sa.CheckConstraint(
            "outcome IS NULL OR outcome IN"
            " ('done', 'failed', 'failed_for_good', 'timeout', 'crashed', 'cancelled', 'released', 'lease_lost')",
            name=op.f("ck_attempts_outcome"),
        ),
        sa.CheckConstraint("(ended_at_us IS NULL) = (outcome IS NULL)", name=op.f("ck_attempts_ended_has_an_outcome")),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_attempts_task"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task", "attempt", name=op.f("pk_attempts")),
    )
    op.create_table(
        "task_dependencies",
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("depends_on", sa.Text(), nullable=False),
        sa.CheckConstraint("task <> depends_on", name=op.f("ck_task_dependencies_not_itself")),
        sa.ForeignKeyConstraint(
            ["depends_on"], ["tasks.id"], name=op.f("fk_task_dependencies_depends_on"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_task_dependencies_task"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("task", "depends_on", name=op.f("pk_task_dependencies")),
    )
    op.create_index("ix_task_dependencies_depends_on", "task_dependencies", ["depends_on"])
    op.create_table(
        "task_tags",
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_task_tags_task"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("tag", "task", name=op.f("pk_task_tags")),
    )
    op.create_index("ix_task_tags_task", "task_tags", ["task"])
    op.create_table(
        "attempt_log",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("byte_offset", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.CheckConstraint("stream IN ('stdout', 'stderr', 'fleet')", name=op.f("ck_attempt_log_stream")),
        sa.ForeignKeyConstraint(
            ["task", "attempt"],
            ["attempts.task", "attempts.attempt"],
            name=op.f("fk_attempt_log_task"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_attempt_log")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_attempt_log_task", "attempt_log", ["task", "seq"])
