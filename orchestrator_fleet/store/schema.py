"""The tables, as SQLAlchemy Core, with their invariants as CHECK constraints.

Times are integer microseconds since 1970 UTC (`*_us`). JSON is text, the same on SQLite and PostgreSQL. A partial
index's predicate stands word for word in the query it serves: SQLite proves no implication beyond `IS NOT NULL`.

    tasks ──< attempts ──< attempt_log            one row a try; its output
      ├──< task_dependencies, task_tags           edges; words
      └──< limit_uses                             which attempts count on which value of which limit
    holds, spending                               why an orchestrator claims nothing now; what it has used
    schedules                                     how far the clock of each recurring task was followed
    events                                        the outbox: every change, in the transaction that made it
    daemon_keys, presence, idempotency, counters  who may connect; who is there; repeated requests; small numbers
    coordinations, notices                        what orchestrators ask of each other; what they are told
    conversations ──< messages; status_updates    what they say
    vp_actions, conflict_resolutions              what people did to orchestrators, and decided between them
    key_revocations, key_uses                     which keys are good no more, before git says so; when each was used
    memories                                      what an orchestrator is to remember
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import sqlalchemy as sa

REVISION = "0003"
TASK_STATUSES = ("TODO", "IN_PROGRESS", "BLOCKED", "DONE", "CANCELLED")
PRIORITIES = ("CRITICAL", "HIGH", "MEDIUM", "LOW")
BLOCKED_REASONS = ("dependency", "approval", "escalation", "quota", "budget", "attempts_exhausted", "manual")
OUTCOMES = (
    "done",
    "failed",
    "failed_for_good",
    "timeout",
    "crashed",
    "cancelled",
    "released",
    "lease_lost",
    "quota",
)
HOLDS = ("pause", "quota")
STREAMS = ("stdout", "stderr", "fleet")
COORDINATIONS = ("delegation", "escalation", "handoff", "collaboration")
COORDINATION_STATES = ("pending", "accepted", "rejected", "done", "expired")
STATUS_KINDS = ("progress", "blocked", "completed", "info")
VP_ACTIONS = ("activate", "deactivate", "pause", "resume", "restart", "drain", "stop_sessions")
MEMORY_TIERS = ("scratchpad", "episodic", "semantic")

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
}
metadata = sa.MetaData(naming_convention=NAMING)

_decode = msgspec.json.decode
_encode = msgspec.json.encode


class Json(sa.types.TypeDecorator[Any]):
    """Any JSON value as text; SQL NULL is None."""

    impl = sa.Text
    cache_ok = True

    def bind_processor(self, dialect: sa.Dialect) -> Callable[[Any], str | None]:  # noqa: ARG002 (the signature is SQLAlchemy's)
        """To text."""
        return _to_text

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Callable[[str | None], Any]:  # noqa: ARG002 (as above)
        """From text."""
        return _from_text


def _to_text(value: Any) -> str | None:
    return None if value is None else _encode(value).decode()


def _from_text(text: str | None) -> Any:
    return None if text is None else _decode(text)


def one_of(column: str, words: tuple[str, ...]) -> str:
    """`column IN ('a', 'b')`, for a CHECK."""
    return f"{column} IN ({', '.join(repr(word) for word in words)})"


def _index(name: str, *columns: sa.Column[Any], where: str | None = None) -> sa.Index:
    if where is None:
        return sa.Index(name, *columns)
    return sa.Index(name, *columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


tasks = sa.Table(
    "tasks",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("priority", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("blocked_reason", sa.Text),
    sa.Column("condition", sa.Text),
    sa.Column("orchestrator", sa.Text),
    sa.Column("discipline", sa.Text),
    sa.Column("tags", Json, nullable=False),
    sa.Column("due_at_us", sa.BigInteger),
    sa.Column("available_at_us", sa.BigInteger),
    sa.Column("estimate_s", sa.Float),
    sa.Column("depends_on", Json, nullable=False),
    sa.Column("parent", sa.Text),
    sa.Column("metadata", Json, nullable=False),
    sa.Column("route", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("created_by", sa.Text, nullable=False),
    sa.Column("created_at_us", sa.BigInteger, nullable=False),
    sa.Column("updated_at_us", sa.BigInteger, nullable=False),
    sa.Column("started_at_us", sa.BigInteger),
    sa.Column("completed_at_us", sa.BigInteger),
    sa.Column("result", Json),
    sa.Column("error", Json),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("generation", sa.Text),
    sa.Column("charter_version", sa.Text),
    # The lease: who holds it now. The token fences every write of the attempt.
    sa.Column("token", sa.Text),
    sa.Column("lease_until_us", sa.BigInteger),
    sa.Column("machine", sa.Text),
    # The place in line: see tasks.line.
    sa.Column("rank", sa.SmallInteger, nullable=False),
    sa.Column("due_key_us", sa.BigInteger, nullable=False),
    sa.Column("waiting_since_us", sa.BigInteger, nullable=False),
    sa.Column("wakes_at_us", sa.BigInteger),
    sa.Column("ripens_at_us", sa.BigInteger),
    # `limit=value`, the full limit at which a claim found it and took it out of line; see tasks.limits.
    sa.Column("parked_by", sa.Text),
    # `[[limit, value], ...]` that the running attempt counts on.
    sa.Column("counts_on", Json),
    # Somebody approved it past a spent budget.
    sa.Column("over_budget", sa.Boolean, nullable=False, server_default=sa.false()),
    # There are coordinations of it: its sessions are told what stands in them, see orchestrators.carried.
    sa.Column("coordinated", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.CheckConstraint(one_of("status", TASK_STATUSES), name="status"),
    sa.CheckConstraint(one_of("priority", PRIORITIES), name="priority"),
    sa.CheckConstraint(
        "(status = 'BLOCKED') = (blocked_reason IS NOT NULL)"
        f" AND (blocked_reason IS NULL OR {one_of('blocked_reason', BLOCKED_REASONS)})",
        name="blocked_has_a_reason",
    ),
    sa.CheckConstraint(
        "(status = 'IN_PROGRESS' AND token IS NOT NULL AND lease_until_us IS NOT NULL AND orchestrator IS NOT NULL"
        " AND started_at_us IS NOT NULL AND attempt >= 1)"
        " OR (status <> 'IN_PROGRESS' AND token IS NULL AND lease_until_us IS NULL)",
        name="in_progress_has_a_lease",
    ),
    sa.CheckConstraint(
        "(status IN ('DONE', 'CANCELLED')) = (completed_at_us IS NOT NULL)", name="final_has_completed_at"
    ),
    sa.CheckConstraint(
        "(status = 'TODO' OR (wakes_at_us IS NULL AND parked_by IS NULL))"
        " AND (status = 'TODO' OR ripens_at_us IS NULL"
        " OR (status = 'BLOCKED' AND blocked_reason IN ('quota', 'budget')))",
        name="only_todo_waits",
    ),
    sa.CheckConstraint("status = 'IN_PROGRESS' OR counts_on IS NULL", name="only_running_counts"),
    sa.CheckConstraint("rank BETWEEN 0 AND 3", name="rank"),
    sa.CheckConstraint("attempt >= 0 AND failures >= 0 AND failures <= attempt AND max_attempts >= 1", name="attempts"),
)

CLAIMABLE = "status = 'TODO' AND wakes_at_us IS NULL AND parked_by IS NULL"
RUNNING = "status = 'IN_PROGRESS'"

_index(
    "ix_tasks_claim",
    tasks.c.orchestrator,
    tasks.c.rank,
    tasks.c.due_key_us,
    tasks.c.created_at_us,
    tasks.c.id,
    where=CLAIMABLE,
)
_index("ix_tasks_ripens", tasks.c.ripens_at_us, where="ripens_at_us IS NOT NULL")
_index("ix_tasks_wakes", tasks.c.orchestrator, tasks.c.wakes_at_us, where="wakes_at_us IS NOT NULL")
# Few tasks run at once, so this one serves the sweep of leases and the counts by machine as well: each index more is a
# page more in every claim's commit.
_index("ix_tasks_running", tasks.c.orchestrator, tasks.c.machine, where=RUNNING)
_index(
    "ix_tasks_parked",
    tasks.c.parked_by,
    tasks.c.orchestrator,
    tasks.c.rank,
    tasks.c.due_key_us,
    tasks.c.created_at_us,
    tasks.c.id,
    where="parked_by IS NOT NULL",
)
_index("ix_tasks_line", tasks.c.rank, tasks.c.due_key_us, tasks.c.created_at_us, tasks.c.id)
_index("ix_tasks_created", tasks.c.created_at_us, tasks.c.id)
_index("ix_tasks_status", tasks.c.status, tasks.c.orchestrator)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("task", sa.Text, sa.ForeignKey("tasks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("machine", sa.Text, nullable=False),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("generation", sa.Text),
    sa.Column("charter_version", sa.Text),
    sa.Column("started_at_us", sa.BigInteger, nullable=False),
    sa.Column("ended_at_us", sa.BigInteger),
    sa.Column("outcome", sa.Text),
    sa.Column("answer", sa.Text),
    sa.Column("exit_code", sa.Integer),
    sa.Column("error", sa.Text),
    sa.Column("usage", Json),
    sa.Column("stdout_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("stderr_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("log_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.PrimaryKeyConstraint("task", "attempt"),
    sa.CheckConstraint("(ended_at_us IS NULL) = (outcome IS NULL)", name="ended_has_an_outcome"),
    sa.CheckConstraint(f"outcome IS NULL OR {one_of('outcome', OUTCOMES)}", name="outcome"),
    sqlite_with_rowid=False,
)

# How long the newest took: what an estimate is made of.
_index("ix_attempts_done", attempts.c.orchestrator, attempts.c.ended_at_us, where="outcome = 'done'")

task_dependencies = sa.Table(
    "task_dependencies",
    metadata,
    sa.Column("task", sa.Text, sa.ForeignKey("tasks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("depends_on", sa.Text, sa.ForeignKey("tasks.id", ondelete="CASCADE"), nullable=False),
    sa.PrimaryKeyConstraint("task", "depends_on"),
    sa.CheckConstraint("task <> depends_on", name="not_itself"),
)
_index("ix_task_dependencies_depends_on", task_dependencies.c.depends_on)

task_tags = sa.Table(
    "task_tags",
    metadata,
    sa.Column("tag", sa.Text, nullable=False),
    sa.Column("task", sa.Text, sa.ForeignKey("tasks.id", ondelete="CASCADE"), nullable=False),
    sa.PrimaryKeyConstraint("tag", "task"),
)
_index("ix_task_tags_task", task_tags.c.task)

limit_uses = sa.Table(
    "limit_uses",
    metadata,
    sa.Column("limit_name", sa.Text, nullable=False),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("task", sa.Text, sa.ForeignKey("tasks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("started_at_us", sa.BigInteger, nullable=False),
    sa.Column("ended_at_us", sa.BigInteger),
    sa.PrimaryKeyConstraint("task", "attempt", "limit_name"),
)
_index("ix_limit_uses_running", limit_uses.c.limit_name, limit_uses.c.value, where="ended_at_us IS NULL")
_index("ix_limit_uses_started", limit_uses.c.limit_name, limit_uses.c.value, limit_uses.c.started_at_us)
_index("ix_limit_uses_ended", limit_uses.c.ended_at_us, where="ended_at_us IS NOT NULL")

holds = sa.Table(
    "holds",
    metadata,
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("until_us", sa.BigInteger),
    sa.PrimaryKeyConstraint("orchestrator", "kind"),
    sa.CheckConstraint(one_of("kind", HOLDS), name="kind"),
)

# What finished attempts used, a row for each orchestrator and minute.
spending = sa.Table(
    "spending",
    metadata,
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("minute_us", sa.BigInteger, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.Column("usd", sa.Float, nullable=False),
    sa.PrimaryKeyConstraint("orchestrator", "minute_us"),
)

# Every moment up to `until_us` was considered: fired, skipped or caught up with.
schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("until_us", sa.BigInteger, nullable=False),
    sa.Column("last_task", sa.Text),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("task", sa.Text),
    sa.Column("attempt", sa.Integer),
    sa.Column("orchestrator", sa.Text),
    sa.Column("machine", sa.Text),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("generation", sa.Text),
    sa.Column("charter_version", sa.Text),
    sa.Column("route", sa.Text),
    sa.Column("data", Json, nullable=False),
    sqlite_autoincrement=True,
)
_index("ix_events_task", events.c.task, events.c.seq, where="task IS NOT NULL")

attempt_log = sa.Table(
    "attempt_log",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("stream", sa.Text, nullable=False),
    sa.Column("byte_offset", sa.BigInteger, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.ForeignKeyConstraint(["task", "attempt"], ["attempts.task", "attempts.attempt"], ondelete="CASCADE"),
    sa.CheckConstraint(one_of("stream", STREAMS), name="stream"),
    sqlite_autoincrement=True,
)
_index("ix_attempt_log_task", attempt_log.c.task, attempt_log.c.seq)

daemon_keys = sa.Table(
    "daemon_keys",
    metadata,
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("machine", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False, unique=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.PrimaryKeyConstraint("orchestrator", "machine"),
    sa.CheckConstraint("length(sha256) = 64", name="sha256"),
)

presence = sa.Table(
    "presence",
    metadata,
    sa.Column("orchestrator", sa.Text, primary_key=True),
    sa.Column("machine", sa.Text, nullable=False),
    sa.Column("boot", sa.Text, nullable=False),
    sa.Column("epoch", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("generation", sa.Text, nullable=False),
    sa.Column("charter_version", sa.Text, nullable=False),
    sa.Column("sessions_max", sa.Integer, nullable=False),
    sa.Column("sessions", Json, nullable=False),
    sa.Column("connected_at_us", sa.BigInteger, nullable=False),
    sa.Column("last_seen_us", sa.BigInteger, nullable=False),
    sa.Column("gone_at_us", sa.BigInteger),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("headers", Json, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.PrimaryKeyConstraint("actor", "key"),
)
_index("ix_idempotency_at_us", idempotency.c.at_us)

counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

# What one orchestrator asks of another, or of a person, about a task; see orchestrators.coordination. A collaboration
# is a row for each collaborator; those of one request share `batch`.
coordinations = sa.Table(
    "coordinations",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("batch", sa.Text, nullable=False),
    sa.Column("task", sa.Text, sa.ForeignKey("tasks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    # An orchestrator, or `human:<name>`; NULL is any person.
    sa.Column("target", sa.Text),
    sa.Column("child", sa.Text, sa.ForeignKey("tasks.id", ondelete="CASCADE")),
    # Which step of the chain it is, from 1: delegations and handoffs of one task, levels of one escalation.
    sa.Column("hop", sa.Integer, nullable=False),
    # The task's number of tries when it was asked: a claim after that is the target's.
    sa.Column("since_attempt", sa.Integer, nullable=False),
    sa.Column("note", sa.Text),
    sa.Column("data", Json, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("created_at_us", sa.BigInteger, nullable=False),
    sa.Column("updated_at_us", sa.BigInteger, nullable=False),
    sa.Column("expires_at_us", sa.BigInteger),
    sa.Column("reason", sa.Text),
    sa.CheckConstraint(one_of("kind", COORDINATIONS), name="kind"),
    sa.CheckConstraint(one_of("state", COORDINATION_STATES), name="state"),
    sa.CheckConstraint("hop >= 1", name="hop"),
)
COORDINATION_OPEN = "state IN ('pending', 'accepted')"
_index("ix_coordinations_task", coordinations.c.task, coordinations.c.created_at_us, coordinations.c.id)
_index("ix_coordinations_source", coordinations.c.source, coordinations.c.created_at_us, coordinations.c.id)
_index("ix_coordinations_target", coordinations.c.target, coordinations.c.created_at_us, coordinations.c.id)
_index("ix_coordinations_child", coordinations.c.child, where="child IS NOT NULL")
_index("ix_coordinations_open", coordinations.c.kind, coordinations.c.id, where=COORDINATION_OPEN)

# What an orchestrator is told, kept until its daemon says that it has it.
notices = sa.Table(
    "notices",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("data", Json, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("expires_at_us", sa.BigInteger, nullable=False),
    sa.Column("delivered_at_us", sa.BigInteger),
    sqlite_autoincrement=True,
)
_index("ix_notices_waiting", notices.c.orchestrator, notices.c.seq, where="delivered_at_us IS NULL")
_index("ix_notices_delivered", notices.c.delivered_at_us, where="delivered_at_us IS NOT NULL")
_index("ix_notices_expires", notices.c.expires_at_us)

conversations = sa.Table(
    "conversations",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("task", sa.Text, sa.ForeignKey("tasks.id", ondelete="SET NULL")),
    sa.Column("created_at_us", sa.BigInteger, nullable=False),
    sa.Column("updated_at_us", sa.BigInteger, nullable=False),
)
_index("ix_conversations_source", conversations.c.source, conversations.c.id)
_index("ix_conversations_target", conversations.c.target, conversations.c.id)

# A message to an orchestrator is delivered by the notice of the same id, which goes sooner than the message does.
messages = sa.Table(
    "messages",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("conversation", sa.Text, sa.ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False),
    sa.Column("sender", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("content", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("delivered_at_us", sa.BigInteger),
    sqlite_autoincrement=True,
)
_index("ix_messages_conversation", messages.c.conversation, messages.c.seq)
_index("ix_messages_pair", messages.c.sender, messages.c.target, messages.c.at_us)

status_updates = sa.Table(
    "status_updates",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("task", sa.Text),
    sa.Column("channel", sa.Text),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.CheckConstraint(one_of("kind", STATUS_KINDS), name="kind"),
    sqlite_autoincrement=True,
)
_index("ix_status_updates_orchestrator", status_updates.c.orchestrator, status_updates.c.seq)

# What people did to an orchestrator; `outcome` NULL: it is still being done.
vp_actions = sa.Table(
    "vp_actions",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("ended_at_us", sa.BigInteger),
    sa.Column("outcome", sa.Text),
    sa.Column("detail", sa.Text),
    sa.CheckConstraint(one_of("action", VP_ACTIONS), name="action"),
    sa.CheckConstraint("(ended_at_us IS NULL) = (outcome IS NULL)", name="ended_has_an_outcome"),
    sa.CheckConstraint("outcome IS NULL OR outcome IN ('done', 'failed')", name="outcome"),
    sqlite_autoincrement=True,
)
_index("ix_vp_actions_orchestrator", vp_actions.c.orchestrator, vp_actions.c.seq)
VP_ACTION_OPEN = "outcome IS NULL"
_index("ix_vp_actions_open", vp_actions.c.orchestrator, vp_actions.c.seq, where=VP_ACTION_OPEN)

# A conflict is computed; that somebody has decided it is kept under its id, which is made of its evidence.
conflict_resolutions = sa.Table(
    "conflict_resolutions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("evidence", Json, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("note", sa.Text),
    sa.Column("at_us", sa.BigInteger, nullable=False),
)

key_revocations = sa.Table(
    "key_revocations",
    metadata,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("revoked_at_us", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),
)

key_uses = sa.Table(
    "key_uses",
    metadata,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("last_used_us", sa.BigInteger, nullable=False),
    sa.Column("address", sa.Text),
)

memories = sa.Table(
    "memories",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("orchestrator", sa.Text, nullable=False),
    sa.Column("tier", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
    sa.Column("importance", sa.Float, nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("room", sa.Text),
    sa.Column("task", sa.Text),
    sa.Column("attempt", sa.Integer),
    sa.Column("metadata", Json, nullable=False),
    sa.Column("supersedes", sa.Text),
    sa.Column("valid_from_us", sa.BigInteger),
    sa.Column("valid_to_us", sa.BigInteger),
    sa.Column("source", sa.Text, nullable=False),
    sa.CheckConstraint(one_of("tier", MEMORY_TIERS), name="tier"),
    sa.CheckConstraint("importance BETWEEN 0 AND 1", name="importance"),
)
_index("ix_memories_orchestrator", memories.c.orchestrator, memories.c.tier, memories.c.at_us, memories.c.id)

# The same table that Alembic keeps; here so that a new file can be stamped without importing it.
alembic_version = sa.Table(
    "alembic_version",
    metadata,
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
