"""The inbox on a machine: what was told is on its disk before anybody hears so, once, over kills and full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from living_daemon import NAME, SH, LivingMachine, until
from scripted_plane import ScriptedPlane

from orchestrator_fleet.daemon import inbox
from orchestrator_fleet.daemon.inbox import KEPT, Inbox
from orchestrator_fleet.wire import link as wire

AT = datetime(2026, 1, 1, tzinfo=UTC)


def notice(name: str, **data: Any) -> wire.Notice:
    return wire.Notice(notice=name, kind="message", at=AT, data=data)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(path: Path) -> list[str]:
    return [line["id"] for line in lines(path)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vp.inbox.jsonl"


def test_a_line_is_a_notice(path: Path) -> None:
    """Whatever is in it, it is one line; nobody else may read it."""
    data = {"content": "two\nlines \u2028 \u2029 \x85 \x00", "deep": {"a": [1, None]}}
    assert Inbox(path).keep([notice("n1", **data)]) == 1
    assert lines(path) == [{"id": "n1", "kind": "message", "at": "2026-01-01T00:00:00Z", "data": data}]
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_comes_twice_is_kept_once(path: Path) -> None:
    """In one call, in two, and in another life."""
    here = Inbox(path)
    assert here.keep([notice("n1"), notice("n1"), notice("n2")]) == 2
    assert here.keep([notice("n2"), notice("n3")]) == 1
    assert Inbox(path).keep([notice("n3"), notice("n1")]) == 0
    assert names(path) == ["n1", "n2", "n3"]


def test_a_line_that_was_cut_off_goes(path: Path) -> None:
    """Nobody was told of it, so it comes again; lines that are none of ours stay."""
    Inbox(path).keep([notice("n1")])
    with path.open("a") as file:
        file.write('not ours\n[1]\n{"id": 7}\n{"id": "n2", "ki')
    here = Inbox(path)
    assert here.keep([notice("n2"), notice("n1")]) == 1
    assert path.read_text().splitlines()[1:4] == ["not ours", "[1]", '{"id": 7}']
    assert json.loads(path.read_text().splitlines()[4])["id"] == "n2"


def test_the_newest_stay(path: Path) -> None:
    """A thousand at least; whoever has the old file open reads it to its end."""
    here = Inbox(path)
    for start in range(0, 2 * KEPT, 100):
        here.keep([notice(f"n{number}") for number in range(start, start + 100)])
    assert len(names(path)) == 2 * KEPT
    with path.open() as before:
        here.keep([notice("last")])
        assert len(before.read().splitlines()) == 2 * KEPT + 1
    kept = names(path)
    assert (len(kept), kept[0], kept[-1]) == (KEPT, f"n{KEPT + 1}", "last")
    assert here.keep([notice("last"), notice(f"n{KEPT + 1}")]) == 0
    assert Inbox(path).keep([notice("last"), notice("n0")]) == 1
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_it_stays_small_in_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large ones push the oldest out as well; the newest stays, however large."""
    monkeypatch.setattr(inbox, "MAX_BYTES", 10_000)
    here = Inbox(path)
    for number in range(30):
        here.keep([notice(f"n{number}", text="x" * 900)])
        assert path.stat().st_size <= 11_000
    assert names(path)[-1] == "n29"
    here.keep([notice("huge", text="x" * 50_000)])
    assert names(path) == ["huge"]
    here.keep([notice("next")])
    assert names(path) == ["next"]


def test_what_others_do_to_the_file_does_no_harm(path: Path) -> None:
    """Emptied, removed, or replaced: it goes on with what is there."""
    here = Inbox(path)
    here.keep([notice("n1")])
    path.write_text("")
    assert here.keep([notice("n1"), notice("n2")]) == 2
    path.unlink()
    assert here.keep([notice("n3")]) == 1
    assert names(path) == ["n3"]
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/etc/passwd")):
        make()
        with pytest.raises(OSError, match=str(path)):
            here.keep([notice("n4")])
        path.rmdir() if path.is_dir() else path.unlink()
    assert here.keep([notice("n4")]) == 1


def test_a_file_that_others_made_too_big_is_put_aside(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill the memory."""
    monkeypatch.setattr(inbox, "MAX_BYTES", 1_000)
    path.write_text("x" * 3_000)
    assert Inbox(path).keep([notice("n1")]) == 1
    assert names(path) == ["n1"]
    assert (path.parent / f"{path.name}.aside").stat().st_size == 3_000


def test_a_full_disk_keeps_all_or_none(path: Path) -> None:
    """What did not fit leaves no trace, and fits once there is room."""
    here = Inbox(path)
    here.keep([notice("n1")])
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            here.keep([notice("n2", text="x" * 1_000)])
        assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert here.keep([notice("n2", text="x" * 1_000)]) == 1
    assert names(path) == ["n1", "n2"]


KEEPS_FOR_EVER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from orchestrator_fleet.daemon import inbox
from orchestrator_fleet.wire.link import Notice
inbox.KEPT = 5
here = inbox.Inbox(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 1_000_000):
    name = f"n{number}"
    here.keep([Notice(notice=name, kind="k", at=datetime.now(UTC), data={"text": "x" * 3_000})])
    print(number, flush=True)
"""


def test_nothing_that_was_said_to_be_kept_is_lost_by_a_kill(path: Path) -> None:
    """Whenever it comes, in the middle of a shorter file's making too; and every line is whole."""
    last = -1
    for life in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KEEPS_FOR_EVER, str(path), str(last + 1)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(7 + life):
            last = int(process.stdout.readline())
        process.kill()
        said = process.stdout.read().split()
        process.wait(10)
        last = int(said[-1]) if said else last
        Inbox(path).keep([])
        kept = [int(name.removeprefix("n")) for name in names(path)]
        assert kept == list(range(kept[0], kept[-1] + 1))
        assert kept[-1] >= last
        assert kept[0] <= max(0, last - 4)
        last = kept[-1]


# Of a living daemon.


def kept(machine: LivingMachine) -> list[str]:
    return names(machine.root / "run" / f"{NAME}.inbox.jsonl")


def noticed(plane: ScriptedPlane) -> list[str]:
    return [name for message in plane.of(wire.Noticed) for name in message.notices]


def test_a_daemon_keeps_what_it_is_told_and_says_so(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Twice told is twice answered and once kept; a killed daemon's successor knows it too."""
    machine.generation()
    daemon = machine.online()
    plane.push(notice("n1", content="hello"))
    plane.push(notice("n2"))
    until(lambda: noticed(plane) == ["n1", "n2"], "both are noticed")
    assert kept(machine) == ["n1", "n2"]
    daemon.kill()
    daemon.wait(10)
    machine.online()
    plane.push(notice("n2"))
    plane.push(notice("n3"))
    until(lambda: noticed(plane) == ["n1", "n2", "n2", "n3"], "the old and the new are noticed")
    assert kept(machine) == ["n1", "n2", "n3"]


def test_what_a_daemon_cannot_keep_it_does_not_notice(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """It comes again, and is kept when there is room; meanwhile the daemon works."""
    machine.generation()
    machine.online()
    in_the_way = machine.root / "run" / f"{NAME}.inbox.jsonl"
    in_the_way.mkdir()
    plane.push(notice("n1"))
    until(lambda: "the inbox can't be written" in machine.output.read_text(), "it says so")
    plane.grant("task-1")
    until(lambda: plane.finish_of("task-1"), "a task is done")
    assert noticed(plane) == []
    in_the_way.rmdir()
    plane.push(notice("n1"))
    until(lambda: noticed(plane) == ["n1"], "it is noticed")
    assert kept(machine) == ["n1"]


def test_a_flood_of_notices_stops_no_work(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """What is too much at once is left out, and comes again."""
    machine.generation()
    machine.online()
    flood = [notice(f"n{number}", text="x" * 1_000) for number in range(3_000)]
    for one in flood:
        plane.push(one)
    plane.grant("task-1")
    until(lambda: plane.finish_of("task-1"), "a task is done")
    missing = {one.notice for one in flood}
    while missing := missing - set(noticed(plane)):
        some = [one for one in flood if one.notice in missing][:50]
        for one in some:
            plane.push(one)
        until(lambda some=some: {one.notice for one in some} <= set(noticed(plane)), "some more are noticed")
    assert len(kept(machine)) <= 2 * KEPT
    assert len(set(kept(machine))) == len(kept(machine))


def test_a_session_finds_the_inbox(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """FLEET_INBOX names it, whether anything was told yet or not."""
    machine.generation(command=(*SH, 'cat "$FLEET_INBOX"'))
    machine.online()
    plane.grant("early")
    until(lambda: plane.finish_of("early"), "the early one is over")
    plane.push(notice("n1", content="read me"))
    until(lambda: noticed(plane) == ["n1"], "it is noticed")
    plane.grant("late")
    finish = until(lambda: plane.finish_of("late"), "the late one is over")
    assert finish.exit_code == 0
    assert json.loads(plane.log_of("late"))["data"] == {"content": "read me"}
