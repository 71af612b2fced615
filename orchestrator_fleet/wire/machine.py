"""What a controller asks of a machine, and what it answers: one request, one answer, one round trip.

The same requests go to a machine in this process, over SSH, and to a fake one in memory. Every request
that changes something carries the lease's fencing token; the machine refuses an older one.
"""

from __future__ import annotations

import msgspec


class _Request(msgspec.Struct, kw_only=True, frozen=True, tag_field="op"):
    pass


class Observe(_Request, frozen=True, tag="observe"):
    """Look. `documents` also asks for the content of the current generation's files."""

    documents: bool = False


class Acquire(_Request, frozen=True, tag="acquire"):
    """Take the machine's lease for `ttl_s` seconds; refused while another holder's is not expired.

    The same holder asking again lengthens its lease and keeps its token. `process` names the holder's own process
    (boot, pid namespace, pid, start time); a machine of the same kernel frees the lease when that process is gone.
    """

    holder: str
    ttl_s: float
    process: str = ""


class Release(_Request, frozen=True, tag="release"):
    """Give the lease back."""

    token: int


class Stage(_Request, frozen=True, tag="stage"):
    """Put a generation beside the current one. `blobs` has the files whose SHA-256 the machine lacks."""

    token: int
    digest: str
    manifest: bytes
    blobs: dict[str, bytes]


class Switch(_Request, frozen=True, tag="switch"):
    """Make a staged generation current and bring the programs in line.

    `restart` is stopped and started anew, `start` (again) started, `stop` ended and taken out together with
    its sessions; every other program is told to read its files again.
    """

    token: int
    digest: str
    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()


class Restart(_Request, frozen=True, tag="restart"):
    """Restart these programs through supervisord, under the generation that is current.

    Their sessions go on, for the next process to adopt. Refused as `not_running`, with nothing done, where there is no
    supervisord or it lacks one of them.
    """

    token: int
    programs: tuple[str, ...]


class Confirm(_Request, frozen=True, tag="confirm"):
    """The generation is healthy: it is the last good one from now on."""

    token: int
    digest: str


class Reject(_Request, frozen=True, tag="reject"):
    """The generation did not become healthy: note it in the journal, with why."""

    token: int
    digest: str
    reason: str


class Prune(_Request, frozen=True, tag="prune"):
    """Remove old generations, keeping `keep` of them, the current, the last good and those in use."""

    token: int
    keep: int


class Destroy(_Request, frozen=True, tag="destroy"):
    """End supervisord, daemons and sessions, and remove what we made."""

    token: int


Request = Observe | Acquire | Release | Stage | Switch | Restart | Confirm | Reject | Prune | Destroy


class DaemonKey(msgspec.Struct, kw_only=True, frozen=True):
    """A daemon's own key, made on its machine: the hash leaves it, the secret never."""

    id: str
    sha256: str


class ProgramSeen(msgspec.Struct, kw_only=True, frozen=True):
    """One program as supervisord and the daemon itself tell it.

    `state` is supervisord's word. `program` is the digest the running process was started with.
    `generation`, `charter_version`, `link` come from the daemon's own status file, if it is this process's.
    `key` is the daemon's key, made when it is first programmed.
    """

    state: str
    pid: int = 0
    since_us: int = 0
    detail: str = ""
    program: str | None = None
    generation: str | None = None
    charter_version: str | None = None
    link: str = "unknown"
    sessions: int = 0
    key: DaemonKey | None = None


class LeaseSeen(msgspec.Struct, kw_only=True, frozen=True):
    """Who holds the machine, until when."""

    holder: str
    token: int
    expires_us: int


class JournalEntry(msgspec.Struct, kw_only=True, frozen=True):
    """One step of an apply on this machine: staged, switched, confirmed, rejected, pruned."""

    step: str
    digest: str
    at_us: int
    token: int
    reason: str = ""


class Observed(msgspec.Struct, kw_only=True, frozen=True, tag="observed"):
    """A machine as it is.

    `current`: digest of the generation the link names, None when there is none.
    `manifest`: raw manifest.json of the current generation (empty when none).
    `drifted`, `missing`, `foreign`: paths in the current generation whose content changed, that are gone, or
    that the manifest doesn't name. `supervisord`: RUNNING or DOWN. `last_good`: last confirmed digest.
    `documents`: path -> content of the current generation's files, if asked for.
    """

    current: str | None = None
    manifest: bytes = b""
    drifted: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    supervisord: str = "DOWN"
    supervisord_pid: int = 0
    programs: dict[str, ProgramSeen] = {}
    generations: tuple[str, ...] = ()
    last_good: str | None = None
    rejected: dict[str, str] = {}
    lease: LeaseSeen | None = None
    journal: tuple[JournalEntry, ...] = ()
    documents: dict[str, bytes] = {}


class Leased(msgspec.Struct, kw_only=True, frozen=True, tag="leased"):
    """The lease is yours; `token` goes with every change."""

    token: int


class Done(msgspec.Struct, kw_only=True, frozen=True, tag="done"):
    """It is done; `notes` says what, a line each. None after a `Destroy`: there was nothing to take down."""

    notes: tuple[str, ...] = ()


class Refusal(msgspec.Struct, kw_only=True, frozen=True, tag="refusal"):
    """It is not done: `code` is lease_held, fenced, not_staged, not_running or failed."""

    code: str
    problem: str


Answer = Observed | Leased | Done | Refusal
