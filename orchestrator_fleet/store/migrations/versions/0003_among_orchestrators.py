"""What orchestrators ask, tell and say; actions and conflicts; revoked and used keys; memories. Frozen."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """To this revision."""
    op.add_column("tasks", sa.Column("coordinated", sa.Boolean(), server_default=sa.false(), nullable=False))
    _make_coordinations()
    _make_notices()
    _make_conversations()
    _make_messages()
    _make_status_updates()
    _make_vp_actions()
    _make_conflict_resolutions()
    _make_key_revocations()
    _make_key_uses()
    _make_memories()


def _make_coordinations() -> None:
    op.create_table(
        "coordinations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("batch", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=True),
        sa.Column("child", sa.Text(), nullable=True),
        sa.Column("hop", sa.Integer(), nullable=False),
        sa.Column("since_attempt", sa.Integer(), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_us", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.CheckConstraint("hop >= 1", name=op.f("ck_coordinations_hop")),
        sa.CheckConstraint(
            "kind IN ('delegation', 'escalation', 'handoff', 'collaboration')", name=op.f("ck_coordinations_kind")
        ),
        sa.CheckConstraint(
            "state IN ('pending', 'accepted', 'rejected', 'done', 'expired')", name=op.f("ck_coordinations_state")
        ),
        sa.ForeignKeyConstraint(["child"], ["tasks.id"], name=op.f("fk_coordinations_child"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_coordinations_task"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_coordinations")),
    )
    _index("ix_coordinations_child", "coordinations", ["child"], where="child IS NOT NULL")
    _index("ix_coordinations_open", "coordinations", ["kind", "id"], where="state IN ('pending', 'accepted')")
    _index("ix_coordinations_source", "coordinations", ["source", "created_at_us", "id"])
    _index("ix_coordinations_target", "coordinations", ["target", "created_at_us", "id"])
    _index("ix_coordinations_task", "coordinations", ["task", "created_at_us", "id"])


def _make_notices() -> None:
    op.create_table(
        "notices",
        sa.Column("seq", _SEQ, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_us", sa.BigInteger(), nullable=False),
        sa.Column("delivered_at_us", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_notices")),
        sa.UniqueConstraint("id", name=op.f("uq_notices_id")),
        sqlite_autoincrement=True,
    )
    _index("ix_notices_delivered", "notices", ["delivered_at_us"], where="delivered_at_us IS NOT NULL")
    _index("ix_notices_expires", "notices", ["expires_at_us"])
    _index("ix_notices_waiting", "notices", ["orchestrator", "seq"], where="delivered_at_us IS NULL")


def _make_conversations() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("created_at_us", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_us", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.id"], name=op.f("fk_conversations_task"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conversations")),
    )
    _index("ix_conversations_source", "conversations", ["source", "id"])
    _index("ix_conversations_target", "conversations", ["target", "id"])


def _make_messages() -> None:
    op.create_table(
        "messages",
        sa.Column("seq", _SEQ, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("conversation", sa.Text(), nullable=False),
        sa.Column("sender", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("delivered_at_us", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["conversation"], ["conversations.id"], name=op.f("fk_messages_conversation"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_messages")),
        sa.UniqueConstraint("id", name=op.f("uq_messages_id")),
        sqlite_autoincrement=True,
    )
    _index("ix_messages_conversation", "messages", ["conversation", "seq"])
    _index("ix_messages_pair", "messages", ["sender", "target", "at_us"])


def _make_status_updates() -> None:
    op.create_table(
        "status_updates",
        sa.Column("seq", _SEQ, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("channel", sa.Text(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("kind IN ('progress', 'blocked', 'completed', 'info')", name=op.f("ck_status_updates_kind")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_status_updates")),
        sa.UniqueConstraint("id", name=op.f("uq_status_updates_id")),
        sqlite_autoincrement=True,
    )
    _index("ix_status_updates_orchestrator", "status_updates", ["orchestrator", "seq"])


def _make_vp_actions() -> None:
    op.create_table(
        "vp_actions",
        sa.Column("seq", _SEQ, autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("ended_at_us", sa.BigInteger(), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "action IN ('activate', 'deactivate', 'pause', 'resume', 'restart', 'drain', 'stop_sessions')",
            name=op.f("ck_vp_actions_action"),
        ),
        sa.CheckConstraint(
            "(ended_at_us IS NULL) = (outcome IS NULL)", name=op.f("ck_vp_actions_ended_has_an_outcome")
        ),
        sa.CheckConstraint("outcome IS NULL OR outcome IN ('done', 'failed')", name=op.f("ck_vp_actions_outcome")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_vp_actions")),
        sa.UniqueConstraint("id", name=op.f("uq_vp_actions_id")),
        sqlite_autoincrement=True,
    )
    _index("ix_vp_actions_orchestrator", "vp_actions", ["orchestrator", "seq"])
    _index("ix_vp_actions_open", "vp_actions", ["orchestrator", "seq"], where="outcome IS NULL")


def _make_conflict_resolutions() -> None:
    op.create_table(
        "conflict_resolutions",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("evidence", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_conflict_resolutions")),
    )


def _make_key_revocations() -> None:
    op.create_table(
        "key_revocations",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("revoked_at_us", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_key_revocations")),
    )


def _make_key_uses() -> None:
    op.create_table(
        "key_uses",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("last_used_us", sa.BigInteger(), nullable=False),
        sa.Column("address", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_key_uses")),
    )


def _make_memories() -> None:
    op.create_table(
        "memories",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("orchestrator", sa.Text(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("importance", sa.Float(), nullable=False),
        sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("room", sa.Text(), nullable=True),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("supersedes", sa.Text(), nullable=True),
        sa.Column("valid_from_us", sa.BigInteger(), nullable=True),
        sa.Column("valid_to_us", sa.BigInteger(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.CheckConstraint("importance BETWEEN 0 AND 1", name=op.f("ck_memories_importance")),
        sa.CheckConstraint("tier IN ('scratchpad', 'episodic', 'semantic')", name=op.f("ck_memories_tier")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memories")),
    )
    _index("ix_memories_orchestrator", "memories", ["orchestrator", "tier", "at_us", "id"])


def _index(name: str, table: str, columns: list[str], *, where: str | None = None) -> None:
    only: dict[str, Any] = {} if where is None else {"sqlite_where": sa.text(where), "postgresql_where": sa.text(where)}
    op.create_index(name, table, columns, **only)
