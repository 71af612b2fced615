"""The bodies of the HTTP API: what a client may send, with every limit.

Each struct is the whole truth about one body: unknown fields are refused, the limits stand in the OpenAPI
document. A field left out and a field set to null differ only where editing needs it (`UNSET`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from orchestrator_fleet.ids import NAME_PATTERN
from orchestrator_fleet.wire.link import MAX_USED, Usage

MAX_BODY_BYTES = 1 << 20
MAX_TITLE_CHARS = 500
MAX_DESCRIPTION_CHARS = 100_000
MAX_REASON_CHARS = 4_000
MAX_TAGS = 50
MAX_DEPENDENCIES = 1_000
MAX_BATCH = 100
MAX_BULK = 500
MAX_WORDS = 100
MAX_QUERY_CHARS = 500
MAX_SQL_CHARS = 100_000
DEFAULT_SQL_ROWS, MAX_SQL_ROWS = 10_000, 100_000
MAX_PAGE = 100
DEFAULT_PAGE = 20
MAX_WAIT_S = 60
MAX_POLL = 50
MIN_LEASE_S, DEFAULT_LEASE_S, MAX_LEASE_S = 5, 60, 3600
MAX_IDEMPOTENCY_KEY_CHARS = 200

NO_NUL = r"^[^\x00]*$"  # PostgreSQL's text can't hold it

Priority = Literal["CRITICAL", "HIGH", "MEDIUM", "LOW"]
Status = Literal["TODO", "IN_PROGRESS", "BLOCKED", "DONE", "CANCELLED"]
BlockedReason = Literal["dependency", "approval", "escalation", "quota", "budget", "attempts_exhausted", "manual"]
Title = Annotated[str, Meta(min_length=1, max_length=MAX_TITLE_CHARS, pattern=NO_NUL)]
Description = Annotated[str, Meta(max_length=MAX_DESCRIPTION_CHARS, pattern=NO_NUL)]
Reason = Annotated[str, Meta(max_length=MAX_REASON_CHARS, pattern=NO_NUL)]
Name = Annotated[str, Meta(pattern=f"^{NAME_PATTERN}$")]
Tag = Annotated[str, Meta(min_length=1, max_length=100, pattern=NO_NUL)]
Tags = Annotated[list[Tag], Meta(max_length=MAX_TAGS)]
TaskId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-z0-9-]+$")]
Token = Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)]
Instant = Annotated[datetime, Meta(tz=True)]
Seconds = Annotated[int, Meta(ge=0, le=31_536_000)]
Attempts = Annotated[int, Meta(ge=1, le=100)]
Query = Annotated[str, Meta(max_length=MAX_QUERY_CHARS, pattern=NO_NUL)]
# No pattern here: msgspec 0.22 frees what it does not own when a text with one is in a union with a list.
Word = Annotated[str, Meta(max_length=MAX_QUERY_CHARS)]
Words = Word | Annotated[list[Word], Meta(max_length=MAX_WORDS)]


class Body(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Any request body."""


class CreateTask(Body, frozen=True):
    """A new task. Without `orchestrator`, the routing rules choose."""

    title: Title
    description: Description = ""
    priority: Priority = "MEDIUM"
    orchestrator: Name | None = None
    discipline: Name | None = None
    tags: Tags = []
    due_at: Instant | None = None
    available_at: Instant | None = None
    depends_on: Annotated[list[TaskId], Meta(max_length=MAX_DEPENDENCIES)] = []
    estimate_s: Seconds | None = None
    metadata: dict[str, Any] = {}
    max_attempts: Attempts | None = None


class EditTask(Body, frozen=True):
    """The fields to change; what is left out stays. `status` moves only along the table."""

    title: Title | UnsetType = UNSET
    description: Description | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    status: Status | UnsetType = UNSET
    orchestrator: Name | UnsetType = UNSET
    discipline: Name | UnsetType | None = UNSET
    tags: Tags | UnsetType = UNSET
    due_at: Instant | UnsetType | None = UNSET
    available_at: Instant | UnsetType | None = UNSET
    estimate_s: Seconds | UnsetType | None = UNSET
    depends_on: Annotated[list[TaskId], Meta(max_length=MAX_DEPENDENCIES)] | UnsetType = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET
    max_attempts: Attempts | UnsetType = UNSET


class AssignTasks(Body, frozen=True):
    """Give tasks to an orchestrator; those in progress are taken from their owner first."""

    task_ids: Annotated[list[TaskId], Meta(min_length=1, max_length=MAX_BATCH)]
    orchestrator: Name
    reason: Reason = ""


class TaskFilter(Body, frozen=True):
    """Which tasks: the fields of `GET /tasks`, each a word or a list of which any may be."""

    status: Status | Annotated[list[Status], Meta(max_length=MAX_WORDS)] = []
    blocked_reason: BlockedReason | Annotated[list[BlockedReason], Meta(max_length=MAX_WORDS)] = []
    priority: Priority | Annotated[list[Priority], Meta(max_length=MAX_WORDS)] = []
    orchestrator: Words = []
    discipline: Words = []
    tag: Words = []
    q: Query = ""
    due_before: Instant | None = None
    due_after: Instant | None = None
    created_after: Instant | None = None


class BulkTasks(Body, frozen=True):
    """The same done to many tasks: those named, or those that match a filter, at most MAX_BULK a call.

    `cursor` is the `next_cursor` of the call before. `dry_run` says what would happen and changes nothing.
    """

    action: Literal["cancel", "retry", "assign", "priority"]
    filter: TaskFilter | None = None
    task_ids: Annotated[list[TaskId], Meta(min_length=1, max_length=MAX_BULK)] | None = None
    orchestrator: Name | None = None
    priority: Priority | None = None
    reason: Reason = ""
    dry_run: bool = False
    cursor: TaskId | None = None


class Deactivate(Body, frozen=True):
    """Let an orchestrator claim nothing, until a time or until it is activated.

    `drain: false` also takes from it what it runs: those tasks go back in line.
    """

    reason: Reason = ""
    until: Instant | None = None
    drain: bool = True


class Poll(Body, frozen=True):
    """Claim tasks: wait up to `wait` seconds for the first, take up to `limit`, hold them for `lease_s`."""

    wait: Annotated[float, Meta(ge=0, le=MAX_WAIT_S)] = 0
    limit: Annotated[int, Meta(ge=1, le=MAX_POLL)] = 1
    orchestrator: Name | None = None
    lease_s: Annotated[float, Meta(ge=MIN_LEASE_S, le=MAX_LEASE_S)] = DEFAULT_LEASE_S


class Heartbeat(Body, frozen=True):
    """The attempt lives; hold its task for `lease_s` more."""

    token: Token
    lease_s: Annotated[float, Meta(ge=MIN_LEASE_S, le=MAX_LEASE_S)] = DEFAULT_LEASE_S


class Spent(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What an attempt used."""

    input_tokens: Annotated[int, Meta(ge=0, le=MAX_USED)] = 0
    output_tokens: Annotated[int, Meta(ge=0, le=MAX_USED)] = 0
    cache_read_tokens: Annotated[int, Meta(ge=0, le=MAX_USED)] = 0
    cache_write_tokens: Annotated[int, Meta(ge=0, le=MAX_USED)] = 0
    usd: Annotated[float, Meta(ge=0, le=MAX_USED)] = 0.0

    def usage(self) -> Usage:
        """The same, as the link says it."""
        return msgspec.convert(self, Usage, from_attributes=True)


class CompleteTask(Body, frozen=True):
    """The attempt is done."""

    token: Token
    result: Any = None
    usage: Spent | None = None


class Failure(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Why an attempt failed; `retryable: false` spends the remaining attempts.

    With `quota_until` it has not failed: the provider's quota is spent until then. No attempt is spent, the task waits,
    and so does all else that its orchestrator would claim.
    """

    message: Annotated[str, Meta(max_length=MAX_REASON_CHARS, pattern=NO_NUL)]
    retryable: bool = True
    quota_until: Instant | None = None


class FailTask(Body, frozen=True):
    """The attempt failed."""

    token: Token
    error: Failure
    usage: Spent | None = None


class ReleaseTask(Body, frozen=True):
    """Give the task back untouched; the attempt doesn't count."""

    token: Token
    reason: Reason = ""


class Progress(Body, frozen=True):
    """A line about how it goes."""

    token: Token
    message: Annotated[str, Meta(min_length=1, max_length=MAX_REASON_CHARS, pattern=NO_NUL)]


class Why(Body, frozen=True):
    """An optional reason, kept with the event."""

    reason: Reason = ""


class ValidateKey(Body, frozen=True):
    """A key to check, and scopes it must have."""

    api_key: Annotated[str, Meta(max_length=500)]
    required_scopes: Annotated[list[Annotated[str, Meta(max_length=100)]], Meta(max_length=20)] = []


class Sql(Body, frozen=True):
    """A read-only query over history; `params` fill its `?` or `$name` places. At most `limit` rows."""

    query: Annotated[str, Meta(min_length=1, max_length=MAX_SQL_CHARS)]
    params: list[Any] | dict[str, Any] = []
    limit: Annotated[int, Meta(ge=1, le=MAX_SQL_ROWS)] = DEFAULT_SQL_ROWS


class FieldError(msgspec.Struct, kw_only=True, frozen=True):
    """One field that is wrong."""

    field: str
    message: str


class ProblemDetails(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """RFC 9457 `application/problem+json`; `code` is the word programs go by."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: tuple[FieldError, ...] = ()
    request_id: str = ""
