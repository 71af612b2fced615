"""What is done to which programs, and what the journal remembers: decided by values."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator_fleet.machines import journal
from orchestrator_fleet.machines.programs import Steps, steps
from orchestrator_fleet.wire.machine import JournalEntry, ProgramSeen, Switch

RUNNING = ProgramSeen(state="RUNNING", pid=7, program="1")
ASKED = Switch(token=1, digest="d")


def test_a_program_that_runs_as_wanted_only_reads_again() -> None:
    """Nothing else is done to it."""
    assert steps(wanted={"a": "1"}, seen={"a": RUNNING}, changed=(), asked=ASKED) == Steps(
        take_out=(), renew=(), put_in=(), reread=("a",)
    )


def test_each_reason_to_start_anew_counts() -> None:
    """Another digest, another configuration, an ended process, or a request."""
    seen = {
        "digest": RUNNING,
        "changed": RUNNING,
        "ended": ProgramSeen(state="FATAL"),
        "asked": RUNNING,
        "gone": RUNNING,
        "same": RUNNING,
    }
    wanted = {name: "2" if name == "digest" else "1" for name in (*seen, "new") if name != "gone"}
    done = steps(
        wanted=wanted, seen=seen, changed=("changed", "gone"), asked=Switch(token=1, digest="d", restart=("asked",))
    )
    assert done == Steps(
        take_out=("gone",), renew=("asked", "changed", "digest", "ended"), put_in=("new",), reread=("same",)
    )


def test_a_name_nobody_knows_is_left_out() -> None:
    """A plan may be older than the machine."""
    asked = Switch(token=1, digest="d", start=("x",), stop=("y",), restart=("z",))
    assert steps(wanted={}, seen={}, changed=(), asked=asked) == Steps(take_out=(), renew=(), put_in=(), reread=())


def entry(step: str, digest: str, token: int = 1, reason: str = "") -> JournalEntry:
    return JournalEntry(step=step, digest=digest, at_us=1, token=token, reason=reason)


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    """What comes after it is on a line of its own."""
    path = tmp_path / "journal.jsonl"
    journal.append(path, entry("staged", "a"))
    with path.open("ab") as file:
        file.write(b'{"step":"swi')
    journal.append(path, entry("confirmed", "a"))
    assert [e.step for e in journal.read(path)] == ["staged", "confirmed"]


def test_a_long_journal_is_cut_and_keeps_the_last_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bounded, and what it is for survives."""
    path = tmp_path / "journal.jsonl"
    journal.append(path, entry("confirmed", "good"))
    reason, sizes = "x" * 50_000, [0]
    while sizes[-1] <= journal.MAX_BYTES:
        journal.append(path, entry("rejected", "bad", reason=reason))
        sizes.append(path.stat().st_size)
    monkeypatch.setattr(journal, "KEEP_ENTRIES", 3)
    journal.append(path, entry("staged", "b", token=9))
    entries = journal.read(path)
    assert path.stat().st_size < journal.MAX_BYTES
    assert [e.step for e in entries] == ["confirmed", "rejected", "rejected", "rejected", "staged"]
    assert journal.highest_token(entries) == 9
    assert journal.last_good(entries, present={"good"}) == "good"


def test_the_last_good_is_the_last_confirmed_that_is_still_there() -> None:
    """A generation that was removed can't be gone back to."""
    entries = [entry("confirmed", "a"), entry("confirmed", "b"), entry("rejected", "c", reason="why")]
    assert journal.last_good(entries, present={"a", "b", "c"}) == "b"
    assert journal.last_good(entries, present={"a"}) == "a"
    assert journal.last_good(entries, present={"c"}) is None
