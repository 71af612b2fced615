"""The daemon's WebSocket (`/ws/daemon`): JSON text frames, one message each.

The daemon asks (a message with an `id` gets an answer with the same `id`) and the control plane pushes
(`Cancel`). Authentication is the WebSocket's own `Authorization: Bearer` header with the daemon's key.

    daemon                          control plane
    Hello  ───────────────────────▶
           ◀─────────────────────── Welcome          (released: what an older epoch left behind)
    Claim (waits up to wait_s) ───▶
           ◀─────────────────────── Claimed          (empty when the wait is over)
    Beat each beat_s ─────────────▶
           ◀─────────────────────── Beaten           (lost: stop these sessions, drop their output)
    Log, no answer ───────────────▶
    Finish ───────────────────────▶
           ◀─────────────────────── Finished | Problem(code=lease_lost)
           ◀─────────────────────── Cancel
           ◀─────────────────────── Notice           (what others ask, tell or decided; again until Noticed)
    Noticed, no answer ───────────▶
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec

PATH = "/ws/daemon"
MAX_FRAME_BYTES = 4 << 20
MAX_LOG_CHUNK_BYTES = 64 << 10
MAX_RESULT_BYTES = 1 << 20
MAX_USED = 10**12  # of any kind of token, or dollars, in one attempt

Instant = Annotated[datetime, msgspec.Meta(tz=True)]


class _Message(msgspec.Struct, kw_only=True, frozen=True, tag_field="type", omit_defaults=True):
    id: int = 0


class Held(msgspec.Struct, kw_only=True, frozen=True):
    """An attempt that this daemon runs: the task and its fencing token."""

    task: str
    token: str


class Hello(_Message, frozen=True, tag="hello"):
    """Who is calling. `boot` and `epoch` make the identity: a host name is not one."""

    orchestrator: str
    machine: str
    boot: str
    epoch: str
    pid: int
    generation: str
    charter_version: str
    sessions_max: int
    held: tuple[Held, ...] = ()


class Welcome(_Message, frozen=True, tag="welcome"):
    """You are in. Beat each `beat_s`; `lost` are held attempts that are no longer yours."""

    beat_s: float
    lease_s: float
    lost: tuple[str, ...] = ()


class Claim(_Message, frozen=True, tag="claim"):
    """Give me up to `limit` tasks; wait up to `wait_s` for the first."""

    limit: int
    wait_s: float
    generation: str
    charter_version: str


class Claimed(_Message, frozen=True, tag="claimed"):
    """Tasks that are yours now: `{task, token, attempt}` each, or none with a reason."""

    grants: tuple[Grant, ...] = ()
    reason: str = ""


class Grant(msgspec.Struct, kw_only=True, frozen=True):
    """One claimed task: its JSON as the API shows it, the attempt's number and fencing token."""

    task: dict[str, Any]
    attempt: int
    token: str


class Beat(_Message, frozen=True, tag="beat"):
    """I live, and so do these sessions. Also tells a new generation after a reload."""

    held: tuple[Held, ...]
    generation: str
    charter_version: str
    sessions_max: int


class Beaten(_Message, frozen=True, tag="beaten"):
    """Leases are lengthened, but for the tasks in `lost`."""

    lost: tuple[str, ...] = ()


class Log(_Message, frozen=True, tag="log"):
    """A piece of a session's output; `stream` is stdout or stderr, `offset` its first byte."""

    task: str
    token: str
    stream: str
    offset: int
    text: str


class Usage(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What an attempt used."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    usd: float = 0.0


class Finish(_Message, frozen=True, tag="finish"):
    """An attempt ended.

    `outcome`: done; failed (retried until the attempts are spent); failed_for_good; timeout; crashed (the session is
    gone without an exit code); cancelled; released (given back untouched); quota (the provider wants a pause `until`
    then, or for a while when it does not say: no try is spent, and the orchestrator claims nothing meanwhile).
    """

    task: str
    token: str
    outcome: str
    exit_code: int | None = None
    result: Any = None
    error: str = ""
    usage: Usage | None = None
    until: Instant | None = None


class Finished(_Message, frozen=True, tag="finished"):
    """It is written down, durably."""

    status: str


class Problem(_Message, frozen=True, tag="problem"):
    """The message with this `id` was refused; `code` as in the HTTP API."""

    code: str
    detail: str


class Cancel(_Message, frozen=True, tag="cancel"):
    """End this attempt's session."""

    task: str
    token: str
    reason: str = ""


class Notice(_Message, frozen=True, tag="notice"):
    """Something for this orchestrator: what another asks of it, answers it or says. `notice` tells it apart.

    It comes again, also on a later connection, until it is noticed; so it may come twice.
    """

    notice: str
    kind: str
    at: Instant
    data: dict[str, Any]


class Noticed(_Message, frozen=True, tag="noticed"):
    """These notices are kept here from now on."""

    notices: tuple[str, ...]


FromDaemon = Hello | Claim | Beat | Log | Finish | Noticed
ToDaemon = Welcome | Claimed | Beaten | Finished | Problem | Cancel | Notice
