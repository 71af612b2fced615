"""After a restart: what became of the sessions that an earlier life of this daemon started.

A session is known by its pid and start time, in the same boot. One that still runs is watched on; one that ended
meanwhile is judged by what it left; one that is gone without an exit code has crashed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from orchestrator_fleet import log, pids
from orchestrator_fleet.clock import SECOND_US, Clock
from orchestrator_fleet.daemon import processes
from orchestrator_fleet.daemon.folder import Record, SessionFolder, session_folders
from orchestrator_fleet.daemon.sessions import Session

_log = log.get(__name__)


def adopt(work: Path, *, clock: Clock) -> list[Session]:
    """Every session under `work` whose end the control plane has not answered to.

    Some run, some are over (their record names no process), some are even judged (`record.finished`).
    """
    return [session for folder in session_folders(work) if (session := _adopt_one(folder, clock)) is not None]


def _adopt_one(folder: SessionFolder, clock: Clock) -> Session | None:
    record = folder.record()
    if record is None:
        _log.warning("no readable record; the folder is removed and its task comes back", folder=str(folder.path))
        folder.abandon()
        processes.sweep(folder.mark)
        shutil.rmtree(folder.path, ignore_errors=True)
        return None
    if record.told:
        return None
    process = None if record.finished else _still_runs(folder, record)
    pid, start_ticks = (process.pid, process.start_ticks) if process is not None else (0, 0)
    _log.info("found session", task=record.task, attempt=record.attempt, pid=pid, judged=record.finished is not None)
    return Session(
        folder=folder,
        record=msgspec.structs.replace(record, pid=pid, start_ticks=start_ticks),
        timeout_s=(record.deadline_us - record.started_us) / SECOND_US,
        clock=clock,
    )


def _still_runs(folder: SessionFolder, record: Record) -> pids.Process | None:
    """The session's process, None when it is gone (or never came to be, and never will)."""
    if record.boot != pids.boot_id():
        return None
    process = pids.Process(pid=record.pid, start_ticks=record.start_ticks) if record.start_ticks else None
    if process is None:
        folder.abandon()
        process = folder.own_word()
    return process if process is not None and pids.is_alive(process) else None
