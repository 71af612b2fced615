"""The machine's lease: who may change it, until when, and the fencing token that shuts late writers out.

`lease.json` says who; the flock on `lease.lock` keeps two requests from changing the machine at the same moment. The
token only rises: it is at least the time in microseconds, so that not even losing the file brings an old one back.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from orchestrator_fleet.clock import SECOND_US, to_rfc3339
from orchestrator_fleet.machines import durable, processes
from orchestrator_fleet.machines.declined import FENCED, LEASE_HELD, Declined
from orchestrator_fleet.machines.layout import FILE_MODE, Layout
from orchestrator_fleet.wire.machine import LeaseSeen

MAX_TTL_S = 3600.0
MAX_HOLDER = 500
LOCK_WAIT_S = 30.0
LOCK_POLL_S = 0.02


class Lease(msgspec.Struct, kw_only=True, frozen=True):
    """`lease.json`. An empty `holder` has given it back.

    `process` is the holder's own process where it is on a kernel we may ask: it frees the lease by ending.
    """

    holder: str
    token: int
    expires_us: int
    ttl_s: float
    process: str = ""


_decoder = msgspec.json.Decoder(Lease)


def read(path: Path) -> Lease | None:
    """The lease as written; None when there is none, or nothing readable."""
    try:
        return _decoder.decode(path.read_bytes())
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None


def in_force(lease: Lease | None, *, now_us: int) -> bool:
    """Whether somebody holds it now. An expiry further ahead than any lease may be is not believed."""
    if lease is None or not lease.holder:
        return False
    left_us = lease.expires_us - now_us
    return 0 < left_us <= MAX_TTL_S * SECOND_US and not processes.is_known_dead(lease.process)


def seen(lease: Lease | None, *, now_us: int) -> LeaseSeen | None:
    """What an observer is told."""
    if lease is None or not in_force(lease, now_us=now_us):
        return None
    return LeaseSeen(holder=lease.holder, token=lease.token, expires_us=lease.expires_us)


def taken(lease: Lease | None, *, holder: str, ttl_s: float, process: str, floor: int, now_us: int) -> Lease:
    """The lease after `holder` asked for it; raises Declined while another holds it.

    `floor`: the highest token known from elsewhere.
    """
    if not holder or len(holder) > MAX_HOLDER or not 0 < ttl_s <= MAX_TTL_S:
        raise Declined(
            LEASE_HELD,
            f"lease: got holder {holder[:40]!r} for {ttl_s:g} s, wanted a name and at most {MAX_TTL_S:g} s",
        )
    held = in_force(lease, now_us=now_us)
    if lease is not None and held and lease.holder != holder:
        until = to_rfc3339(lease.expires_us)
        raise Declined(LEASE_HELD, f"held by {lease.holder} until {until}; wait for that apply to end")
    if lease is not None and held:
        token = lease.token
    else:
        token = max(now_us, floor + 1, lease.token + 1 if lease is not None else 0)
    return Lease(holder=holder, token=token, expires_us=now_us + int(ttl_s * SECOND_US), ttl_s=ttl_s, process=process)


def checked(lease: Lease | None, *, token: int) -> Lease:
    """The lease that `token` belongs to; raises Declined when it is another's, given back, or none."""
    if lease is None or not lease.holder:
        raise Declined(FENCED, f"token {token} is of no lease in force; take the lease first")
    if lease.token != token:
        raise Declined(
            FENCED,
            f"token {token} is not the lease's; {lease.holder} holds it until {to_rfc3339(lease.expires_us)}",
        )
    return lease


def lengthened(lease: Lease, *, now_us: int) -> Lease:
    """The same lease from now on: work done under it proves that its holder lives."""
    return msgspec.structs.replace(lease, expires_us=now_us + int(lease.ttl_s * SECOND_US))


def given_back(lease: Lease) -> Lease:
    """Nobody's, with its token kept."""
    return msgspec.structs.replace(lease, holder="", expires_us=0, process="")


def write(path: Path, lease: Lease) -> None:
    """Write it down, durably."""
    durable.replace(path, msgspec.json.encode(lease) + b"\n")


@contextmanager
def locked(layout: Layout, *, wait_s: float = LOCK_WAIT_S) -> Iterator[None]:
    """Be the only one that changes this machine; raises Declined when another is still at it after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        layout.create()
        descriptor = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, FILE_MODE)
        try:
            _flock(descriptor, layout, deadline=deadline, wait_s=wait_s)
            if _is_still(descriptor, layout.lock):
                yield
                return
        finally:
            os.close(descriptor)  # which also unlocks


def _flock(descriptor: int, layout: Layout, *, deadline: float, wait_s: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lease = read(layout.lease)
                who = lease.holder if lease is not None and lease.holder else "another process"
                raise Declined(
                    LEASE_HELD, f"{who} is changing {layout.root} since {wait_s:g} s or more; try again later"
                ) from None
            time.sleep(LOCK_POLL_S)
        else:
            return


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the locked file is the one at `path`: a destroyed root takes its lock file along."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
