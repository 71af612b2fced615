"""The parts that decide without a link: backoff, what a folder knows, how processes end, pieces of a log."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from living_daemon import until

from orchestrator_fleet import pids
from orchestrator_fleet.daemon import processes, workspace
from orchestrator_fleet.daemon.folder import SessionFolder, is_safe_task_id
from orchestrator_fleet.daemon.link import LONGEST_DELAY_S, pause_s
from orchestrator_fleet.daemon.output import HEAD_BYTES, PIECES_A_TURN, TAIL_BYTES, Output, last_text
from orchestrator_fleet.daemon.runners.command import SCRIPT
from orchestrator_fleet.daemon.status import CONNECTING, REFUSED, UNAUTHORIZED
from orchestrator_fleet.wire.documents import WorkspaceDoc
from orchestrator_fleet.wire.link import MAX_LOG_CHUNK_BYTES


def test_reconnecting_waits_longer_each_time_up_to_a_bound() -> None:
    """0.2 s doubled to 15 s, half of it random."""
    waits = [pause_s(failures, CONNECTING, 1.0) for failures in range(1, 2000)]
    assert waits[:4] == [0.2, 0.4, 0.8, 1.6]
    assert waits == sorted(waits)
    assert max(waits) == LONGEST_DELAY_S
    assert pause_s(1, CONNECTING, 0.0) == pytest.approx(0.1)


@pytest.mark.parametrize("state", [UNAUTHORIZED, REFUSED])
def test_a_refusal_is_asked_again_within_5_to_15_seconds(state: str) -> None:
    """However often it came."""
    waits = [pause_s(failures, state, chance) for failures in (1, 2, 100) for chance in (0.0, 0.5, 1.0)]
    assert 5 <= min(waits) <= max(waits) <= 15


@pytest.fixture
def folder(tmp_path: Path) -> SessionFolder:
    made = SessionFolder(tmp_path / "task-1.1")
    made.create()
    return made


def run_script(folder: SessionFolder, *argv: str) -> int:
    script = ("/bin/sh", "-c", SCRIPT, "fleet-session", "", "", "", "", *argv)
    return subprocess.run(script, cwd=folder.path, start_new_session=True, check=False).returncode


def test_a_session_that_was_given_up_never_runs(folder: SessionFolder) -> None:
    """A restarted daemon declared it crashed before it came to run at all."""
    assert folder.abandon()
    assert run_script(folder, "touch", "ran") == 1
    assert not (folder.path / "ran").exists()
    assert folder.exit_code() is None


def test_a_session_that_has_begun_cant_be_given_up(folder: SessionFolder) -> None:
    """Its own word of who it is was there first."""
    run_script(folder, "touch", "ran")
    assert not folder.abandon()
    word = folder.own_word()
    assert word is not None
    assert not pids.is_alive(word)
    assert folder.exit_code() == 0


def test_the_exit_code_stands_before_anybody_can_see_the_end(folder: SessionFolder) -> None:
    """Each code is kept as it was."""
    for code in (0, 1, 75, 78, 255):
        (folder.path / "pid").unlink(missing_ok=True)
        run_script(folder, "sh", "-c", f"exit {code}")
        assert folder.exit_code() == code


@pytest.mark.parametrize("task", ["task-01", "t", "A_b-9"])
def test_a_task_id_may_stand_in_a_path(task: str) -> None:
    """Letters, digits, dashes, underscores."""
    assert is_safe_task_id(task)


@pytest.mark.parametrize("task", ["", ".", "..", "a/b", "../x", "-x", "a.b", "a\n", "a" * 101, None, 7, ["a"]])
def test_a_task_id_may_not_stand_in_a_path(task: object) -> None:
    """Nothing that leads elsewhere, and nothing endless."""
    assert not is_safe_task_id(task)


@pytest.mark.parametrize("text", ["", "1", "1 (sh) S", "1 (sh) S " + "x " * 30, "1 (a) b) Z " + "1 " * 30])
def test_a_line_that_names_no_living_process_is_nobody(text: str) -> None:
    """Garbage, cut short, or a zombie."""
    assert pids.parse_stat(text) is None


def test_a_name_with_brackets_is_read_over() -> None:
    """A command may be called anything."""
    assert pids.parse_stat("7 (a) b) S " + " ".join(map(str, range(1, 30)))) == pids.Process(pid=7, start_ticks=19)


@pytest.mark.parametrize("pidfd", [True, False])
def test_the_end_of_a_process_is_learned(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001 - a case
    """From the kernel's word, or by looking where it gives none."""
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")

    child = subprocess.Popen(["sleep", "600"])

    async def scenario() -> None:
        identity = pids.identify(child.pid)
        assert identity is not None
        end = asyncio.ensure_future(processes.ended(identity))
        await asyncio.sleep(0)
        assert not end.done()
        child.kill()
        await asyncio.wait_for(end, 5)
        child.wait(5)
        await asyncio.wait_for(processes.ended(identity), 5)

    asyncio.run(scenario())


def test_another_process_with_the_same_number_is_another() -> None:
    """Its start time tells; it is not signalled."""
    me = pids.identify(os.getpid())
    assert me is not None
    other = pids.Process(pid=me.pid, start_ticks=me.start_ticks + 1)
    assert not pids.is_alive(other)
    asyncio.run(asyncio.wait_for(processes.ended(other), 5))


def test_a_sweep_finds_a_process_by_its_mark() -> None:
    """The whole entry of its environment, not a part."""
    child = subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"], "MARK": "abc"}, start_new_session=True)
    # until exec, the child still has our environment
    until(lambda: b"MARK=abc" in Path(f"/proc/{child.pid}/environ").read_bytes(), "it runs")
    assert processes.sweep("MARK=ab") == 0
    assert processes.sweep("MARK=abc") == 1
    assert child.wait(5) == -9


class Heard:
    """Keeps the pieces it is told."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, int, str]] = []

    async def __call__(self, stream: str, offset: int, text: str) -> None:
        """Hear a piece."""
        self.pieces.append((stream, offset, text))

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for _, _, text in self.pieces)


def test_a_character_cut_in_two_is_sent_whole(folder: SessionFolder) -> None:
    """Half of it waits for the other half."""
    output, heard = Output(folder), Heard()
    with folder.stdout.open("ab", buffering=0) as file:
        for byte in "a€b".encode():
            file.write(bytes([byte]))
            asyncio.run(output.send_new(heard))
    assert heard.pieces == [("stdout", 0, "a"), ("stdout", 1, "€"), ("stdout", 4, "b")]


def test_a_character_that_never_comes_whole_is_sent_at_the_end(folder: SessionFolder) -> None:
    """A mark for each of its bytes."""
    output, heard = Output(folder), Heard()
    folder.stdout.write_bytes(b"a\xe2\x82")
    asyncio.run(output.send_new(heard))
    asyncio.run(output.send_rest(heard))
    assert heard.text == "a??"


def test_a_turn_sends_a_bounded_piece_of_a_flood(folder: SessionFolder) -> None:
    """The rest of the head follows in later turns, the tail at the end, and nothing twice."""
    output, heard = Output(folder), Heard()
    folder.stdout.write_bytes(b"x" * (3 * HEAD_BYTES))
    asyncio.run(output.send_new(heard))
    assert len(heard.text) <= PIECES_A_TURN * MAX_LOG_CHUNK_BYTES
    for _ in range(100):
        asyncio.run(output.send_new(heard))
    assert len(heard.text) == HEAD_BYTES
    asyncio.run(Output(folder).send_rest(heard))
    assert len(heard.text) == HEAD_BYTES + TAIL_BYTES
    asyncio.run(Output(folder).send_rest(heard))
    assert len(heard.text) == HEAD_BYTES + TAIL_BYTES


def test_the_last_text_of_a_file_begins_with_a_whole_character(folder: SessionFolder) -> None:
    """The bytes of the one that was cut are left out."""
    folder.stdout.write_text("€€")
    assert [last_text(folder.stdout, size=size) for size in (6, 5, 4, 3, 2)] == ["€€", "€", "€", "€", ""]
    assert last_text(folder.stderr, size=10) == ""


@pytest.mark.parametrize("repo", ["git@host:a/b.git", "ssh://host/a", "https://host/a.git", "host:a"])
def test_a_remote_repository_is_cloned_as_it_is_named(repo: str, tmp_path: Path) -> None:
    """Objects are shared with a repository of this machine alone."""
    doc = WorkspaceDoc(repo=repo, ref="main", isolate="worktree")
    chosen = workspace.choose(doc, folder=tmp_path, fleet_home=tmp_path / "home")
    assert (chosen.source, chosen.local, chosen.path) == (repo, False, tmp_path / "repo")


@pytest.mark.parametrize("repo", [".", "apps/a", "./odd:name", "../other"])
def test_a_local_repository_is_relative_to_the_fleet(repo: str, tmp_path: Path) -> None:
    """Wherever the session's folder is."""
    doc = WorkspaceDoc(repo=repo, ref="main", isolate="worktree")
    chosen = workspace.choose(doc, folder=tmp_path, fleet_home=tmp_path / "home")
    assert (chosen.source, chosen.local) == (str(tmp_path / "home" / repo), True)
