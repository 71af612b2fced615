"""How an attempt ended: what the session left behind, turned into the message that ends it. No process, no link.

| exit code | outcome |
|---|---|
| 0 | done, with the result; failed if the result is not what it must be |
| 75 | failed, for now: tried again after the backoff |
| 78 | failed for good |
| any other | failed: tried again until the attempts are spent |
| none left | crashed |

A session that the daemon ended (time limit, cancel, too much output) has that outcome whatever its exit code is.
One that wrote `{"quota": {"until": "2026-01-05T09:00:00Z"}}` to $FLEET_RESULT and ended by itself has met the end of
its provider's quota, whatever its exit code is: no try is spent, and neither this task nor any other of the
orchestrator begins before that moment. Without `until` it is a few minutes.
"""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import Any

import msgspec

from orchestrator_fleet.daemon.folder import SessionFolder
from orchestrator_fleet.daemon.output import MAX_OUTPUT_BYTES, last_text
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.wire.link import MAX_RESULT_BYTES, MAX_USED, Finish, Instant, Usage
from orchestrator_fleet.wire.nesting import MAX_DEPTH, is_too_deep

DONE, FAILED, FAILED_FOR_GOOD = "done", "failed", "failed_for_good"
TIMEOUT, CRASHED, CANCELLED, QUOTA = "timeout", "crashed", "cancelled", "quota"
FLOOD = "flood"
EXIT_TRY_AGAIN, EXIT_FOR_GOOD = 75, 78
RESULT_TEXT_BYTES = 4_000
ERROR_TEXT_BYTES = 2_000
_SIGNAL_BASE = 128


class ResultInvalid(FleetError):
    """The result file is not what a result must be."""


class _Quota(msgspec.Struct, kw_only=True, frozen=True):
    until: Instant | None = None


class _ResultFile(msgspec.Struct, kw_only=True, frozen=True):
    result: Any = msgspec.UNSET
    usage: Usage | None = None
    quota: _Quota | None = None


_result_decoder = msgspec.json.Decoder(_ResultFile)


def read_result(path: Path) -> _ResultFile | None:
    """What `$FLEET_RESULT` holds, None if it wasn't written; raises ResultInvalid."""
    data = _read_regular(path)
    if data is None:
        return None
    if len(data) > MAX_RESULT_BYTES:
        raise ResultInvalid(
            f"$FLEET_RESULT: more than {MAX_RESULT_BYTES} bytes; keep large output in a file and name it in the result"
        )
    try:
        found = _result_decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ResultInvalid(
            f'$FLEET_RESULT: {error}, got {data[:80]!r}; write JSON: {{"result": ..., "usage": {{...}}}}'
        ) from error
    if found.result is msgspec.UNSET and found.quota is None:
        raise ResultInvalid(
            f"$FLEET_RESULT: missing required field `result`, got {data[:80]!r};"
            ' write JSON: {"result": ..., "usage": {...}}'
        )
    _check_usage(found.usage)
    if found.result is not msgspec.UNSET and is_too_deep(found.result):
        raise ResultInvalid(f"$FLEET_RESULT: nested deeper than {MAX_DEPTH}; make it flatter")
    return found


def _read_regular(path: Path) -> bytes | None:
    """A file's bytes, one more than a result may have; a pipe or a device would never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ResultInvalid(f"$FLEET_RESULT: can't be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ResultInvalid("$FLEET_RESULT: is no regular file; write the JSON into a plain file")
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_RESULT_BYTES + 1)


def _check_usage(usage: Usage | None) -> None:
    for name, value in msgspec.structs.asdict(usage).items() if usage is not None else ():
        if not 0 <= value <= MAX_USED:
            raise ResultInvalid(f"$FLEET_RESULT: usage.{name}: got {value}, wanted 0 to {MAX_USED}")


def conclude(*, task: str, token: str, folder: SessionFolder, cause: str, timeout_s: float) -> Finish:
    """The end of a session that was started. `cause` is why the daemon ended it, empty when it ended by itself."""
    exit_code = folder.exit_code()
    try:
        found, invalid = read_result(folder.result), ""
    except ResultInvalid as error:
        found, invalid = None, str(error)
    outcome, error_text = _judge(cause=cause, exit_code=exit_code, invalid=invalid, timeout_s=timeout_s)
    quota = None if found is None or cause or exit_code is None else found.quota
    if quota is not None:
        outcome, error_text = QUOTA, "the provider's quota is spent"
    if folder.is_cloning() and outcome != CANCELLED:
        outcome = TIMEOUT if cause == TIMEOUT else CRASHED if exit_code is None else FAILED
        error_text = f"workspace: git could not clone: {error_text}"
    if outcome in {FAILED, FAILED_FOR_GOOD, CRASHED, QUOTA} and not cause:
        error_text = _with_last_words(error_text, folder)
    result = None
    if outcome == DONE:
        result = found.result if found is not None else last_text(folder.stdout, size=RESULT_TEXT_BYTES)
    return Finish(
        task=task,
        token=token,
        outcome=outcome,
        exit_code=exit_code,
        result=result,
        error=error_text,
        usage=found.usage if found is not None else None,
        until=quota.until if quota is not None else None,
    )


def failed(*, task: str, token: str, error: str, for_good: bool = False) -> Finish:
    """The end of an attempt whose session could not be started."""
    return Finish(task=task, token=token, outcome=FAILED_FOR_GOOD if for_good else FAILED, error=error)


def _judge(*, cause: str, exit_code: int | None, invalid: str, timeout_s: float) -> tuple[str, str]:
    """(outcome, error)."""
    ended_by_us = {
        TIMEOUT: (TIMEOUT, f"ran longer than {timeout_s:g} s, the limit of a session; it was ended"),
        CANCELLED: (CANCELLED, ""),
        FLOOD: (
            FAILED,
            f"wrote more than {MAX_OUTPUT_BYTES} bytes to stdout and stderr; it was ended: write bulk into a file",
        ),
    }
    if cause:
        return ended_by_us[cause]
    if exit_code is None:
        return CRASHED, "the session is gone without an exit code: it was killed, or the machine restarted"
    if exit_code == 0:
        return (FAILED, invalid) if invalid else (DONE, "")
    if exit_code == EXIT_FOR_GOOD:
        return FAILED_FOR_GOOD, f"exit code {EXIT_FOR_GOOD}: failed for good"
    if exit_code == EXIT_TRY_AGAIN:
        return FAILED, f"exit code {EXIT_TRY_AGAIN}: failed for now"
    return FAILED, _exit_text(exit_code)


def _exit_text(exit_code: int) -> str:
    try:
        return f"exit code {exit_code}: ended by {signal.Signals(exit_code - _SIGNAL_BASE).name}"
    except ValueError:
        return f"exit code {exit_code}"


def _with_last_words(error: str, folder: SessionFolder) -> str:
    words = last_text(folder.stderr, size=ERROR_TEXT_BYTES).strip()
    return f"{error}; stderr ends: {words}" if words else error
