"""The bodies of `/api/vps`: what a client may send about orchestrators, with every limit. See `http`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from orchestrator_fleet.ids import NAME_PATTERN
from orchestrator_fleet.keys import Scope
from orchestrator_fleet.wire.http import MAX_BATCH, NO_NUL, Body, Instant, Name, Priority, Reason, TaskId, Word

MAX_CHARTER_CHARS = 200_000
MAX_NOTE_CHARS = 10_000
MAX_MESSAGE_CHARS = 20_000
MAX_COLLABORATORS = 10
MAX_OVERLAP_S = 604_800
MAX_EXPIRY_DAYS = 3_650

Note = Annotated[str, Meta(max_length=MAX_NOTE_CHARS, pattern=NO_NUL)]
Content = Annotated[str, Meta(min_length=1, max_length=MAX_MESSAGE_CHARS, pattern=NO_NUL)]
Path = Annotated[str, Meta(min_length=1, max_length=500, pattern=NO_NUL)]
Words = Annotated[str, Meta(min_length=1, max_length=200, pattern=NO_NUL)]
# `$` alone is also before a line's end, and who is none of the declared is taken as it stands.
_END = r"$(?!\n)"
# An orchestrator, or a person.
Target = Annotated[str, Meta(pattern=f"^(human:)?{NAME_PATTERN}{_END}")]
# An orchestrator, a person or a channel.
Recipient = Annotated[str, Meta(pattern=f"^((human:|person:)?{NAME_PATTERN}|#[a-z0-9][a-z0-9_-]{{0,79}}){_END}")]
Scopes = Annotated[list[Scope], Meta(min_length=1, max_length=20)]
Context = dict[str, Any]
Roles = dict[str, Words]
Labels = dict[str, Annotated[str, Meta(max_length=200)]]
Action = Literal["activate", "deactivate", "pause", "resume", "restart", "drain", "stop_sessions"]
# The order of a list: what may do harm now comes first.
ConflictType = Literal[
    "double_ownership",
    "dependency_deadlock",
    "delegation_loop",
    "same_branch",
    "over_capacity",
    "deadline_collision",
]
Range = Literal["24h", "7d", "30d", "90d", "all"]
Bucket = Literal["hour", "day", "week", "month"]


class CreateKey(Body, frozen=True):
    """A key of an orchestrator. `name` is for people and stands in the commit's message."""

    name: Words | None = None
    scopes: Scopes = field(default_factory=lambda: ["tasks:read", "tasks:work"])
    expires_in_days: Annotated[int, Meta(ge=1, le=MAX_EXPIRY_DAYS)] | None = None
    reason: Reason = ""


class RotateKey(Body, frozen=True):
    """Another key in the place of an orchestrator's active one, which works for `overlap_s` more."""

    overlap_s: Annotated[int, Meta(ge=0, le=MAX_OVERLAP_S)] = 0
    reason: Reason = ""


class Delegate(Body, frozen=True):
    """Give a task to another orchestrator."""

    task: TaskId
    to: Name
    note: Note = ""
    priority: Priority | None = None
    due_at: Instant | None = None


class Escalate(Body, frozen=True):
    """Ask above: the task waits until somebody approves, rejects or unblocks it. `to` begins elsewhere."""

    task: TaskId
    reason: Annotated[str, Meta(min_length=1, max_length=4_000, pattern=NO_NUL)]
    severity: Priority | None = None
    to: Target | None = None


class HandOff(Body, frozen=True):
    """Give a task to another orchestrator with what is known of it."""

    task: TaskId
    to: Name
    context: Context = {}
    notes: Note = ""
    completion: Annotated[int, Meta(ge=0, le=100)] | None = None


class Collaborate(Body, frozen=True, rename={"with_": "with"}):
    """Ask others for a part of a task; each gets a child task.

    `advise`: the task goes on meanwhile. `split`: it waits for their results.
    """

    task: TaskId
    with_: Annotated[list[Name], Meta(min_length=1, max_length=MAX_COLLABORATORS)]
    roles: Roles = {}
    note: Note = ""
    mode: Literal["advise", "split"] = "advise"


class Decide(Body, frozen=True):
    """Accept or reject what was asked, with a reason."""

    reason: Reason = ""


class Converse(Body, frozen=True):
    """Say something to an orchestrator, a person (`human:<name>`) or a channel (`#name`); `thread` goes on with one."""

    to: Recipient
    content: Content
    task: TaskId | None = None
    thread: TaskId | None = None


class Seen(Body, frozen=True):
    """These notices were read from the inbox."""

    ids: Annotated[list[TaskId], Meta(min_length=1, max_length=MAX_BATCH)]


class PostStatus(Body, frozen=True):
    """A status update: kept, streamed, and for `channel` sent there."""

    message: Content
    kind: Literal["progress", "blocked", "completed", "info"] = "info"
    task: TaskId | None = None
    channel: Annotated[str, Meta(min_length=1, max_length=80, pattern=NO_NUL)] | None = None


class Act(Body, frozen=True):
    """Do something to an orchestrator; `until` is for `deactivate`, `pause` and `drain`."""

    action: Action
    reason: Reason = ""
    until: Instant | None = None


class Selector(Body, frozen=True):
    """Which orchestrators: all of these labels, and of one of these disciplines."""

    labels: Labels = {}
    discipline: Annotated[list[Word], Meta(max_length=MAX_BATCH)] | Word | None = None


class BulkVps(Body, frozen=True):
    """The same action for many: those named, or those that a selector means."""

    action: Action
    ids: Annotated[list[Name], Meta(min_length=1, max_length=MAX_BATCH)] | None = None
    selector: Selector | None = None
    reason: Reason = ""
    dry_run: bool = False


class ApplyFleet(Body, frozen=True):
    """Make the machines match the fleet's files: all, or `only` these and the control plane."""

    only: Annotated[list[Name], Meta(min_length=1, max_length=MAX_BATCH)] | None = None
    dry_run: bool = False
    allow_deletes: bool = False


class ResolveConflict(Body, frozen=True):
    """Somebody has looked at it."""

    note: Note = ""
