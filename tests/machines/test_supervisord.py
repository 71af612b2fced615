"""Real supervisords that are killed, hang, are orphaned, or stand in roots that are half broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_fleet import Machine, end, is_alive, is_up, local_machine, tiny_bundle, until

from orchestrator_fleet import pids
from orchestrator_fleet.machines import processes, programs, supervisord
from orchestrator_fleet.machines.layout import Layout
from orchestrator_fleet.wire.documents import encode
from orchestrator_fleet.wire.machine import Destroy, Observe, Observed, Prune, Switch

pytestmark = pytest.mark.supervisord

SESSION = "import os, subprocess, sys, time; subprocess.Popen(['sleep', '300']); time.sleep(300)"


@pytest.fixture
def strangers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test starts itself."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait(10)


def test_a_killed_supervisord_is_replaced_and_no_program_runs_twice(machine: Machine) -> None:
    """Its orphans are ended by pid before the new one starts them."""
    what = tiny_bundle({"vp-a": "", "vp-b": ""})
    before = machine.bring(what)
    os.kill(before.supervisord_pid, signal.SIGKILL)
    until(lambda: machine.look().supervisord == "DOWN", "supervisord is down")
    orphans = [program.pid for program in before.programs.values()]
    assert all(is_alive(pid) for pid in orphans)
    machine.switch(what)
    after = machine.until_up(what)
    assert after.supervisord_pid != before.supervisord_pid
    assert not any(is_alive(pid) for pid in orphans)
    assert len(processes.daemons(machine.layout.root)) == 2


def test_a_stubborn_orphan_is_killed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ignores SIGTERM does not keep the machine from converging."""
    before = machine.bring(tiny_bundle({"vp-a": "stubborn"}))
    os.kill(before.supervisord_pid, signal.SIGKILL)
    until(lambda: machine.look().supervisord == "DOWN", "supervisord is down")
    monkeypatch.setattr(supervisord, "STOP_TIMEOUT_S", 0.3)
    machine.bring(tiny_bundle({"vp-a": ""}))
    assert not is_alive(before.programs["vp-a"].pid)


def test_a_supervisord_without_a_socket_is_replaced(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can talk to it any more, so it is ended, with its programs."""
    monkeypatch.setattr(supervisord, "CALL_TIMEOUT_S", 0.5)
    what = tiny_bundle({"vp-a": ""})
    before = machine.bring(what)
    machine.layout.socket.unlink()
    assert machine.look().supervisord == "DOWN"
    machine.switch(what)
    machine.until_up(what)
    assert not is_alive(before.supervisord_pid)
    assert len(processes.supervisords(machine.layout.root)) == 1


def test_a_hanging_supervisord_is_an_error_that_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alive and deaf is not down: starting a second one would run everything twice."""
    what = tiny_bundle({"vp-a": ""})
    before = machine.bring(what)
    monkeypatch.setattr(supervisord.Supervisord.__init__, "__kwdefaults__", {"timeout_s": 0.3})
    os.kill(before.supervisord_pid, signal.SIGSTOP)
    try:
        for request in (Observe(), Switch(token=machine.token, digest=what.digest)):
            refusal = machine.refused(request)
            assert "alive but did not answer" in refusal.problem
    finally:
        os.kill(before.supervisord_pid, signal.SIGCONT)
    assert is_up(machine.look(), what)


def test_destroy_ends_even_a_hanging_supervisord(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed, and its programs with it."""
    before = machine.bring(tiny_bundle({"vp-a": ""}))
    monkeypatch.setattr(supervisord.Supervisord.__init__, "__kwdefaults__", {"timeout_s": 0.3})
    os.kill(before.supervisord_pid, signal.SIGSTOP)
    machine.done(Destroy(token=machine.token))
    assert machine.processes() == []
    assert not machine.layout.root.exists()


def test_what_supervisord_says_when_it_cannot_start_is_in_the_refusal(machine: Machine) -> None:
    """The configuration's error, not only an exit code."""
    broken = tiny_bundle({}, files={"supervisord.conf": b"[supervisord]\nlogfile=%(ENV_NOBODY)s\n"})
    machine.lease()
    machine.stage(broken)
    refusal = machine.refused(Switch(token=machine.token, digest=broken.digest))
    assert "ENV_NOBODY" in refusal.problem


def test_a_broken_program_file_is_refused_and_what_runs_stays(machine: Machine) -> None:
    """Supervisord refuses to read it; going back is possible."""
    good = tiny_bundle({"vp-a": ""})
    machine.bring(good)
    pids = machine.pids()
    broken = tiny_bundle({"vp-a": ""}, files={"programs/broken.conf": b"[program:broken]\ncommand=%(nope)s\n"})
    machine.stage(broken)
    assert "nope" in machine.refused(Switch(token=machine.token, digest=broken.digest)).problem
    machine.switch(good)
    assert machine.until_up(good).current == good.digest
    assert machine.pids() == pids


def test_a_deep_root_has_its_socket_elsewhere_and_takes_it_along(tmp_path: Path) -> None:
    """A unix socket's path is short by the kernel's rule."""
    deep = local_machine(tmp_path / ("d" * 60) / ("e" * 60) / "m1")
    try:
        deep.bring(tiny_bundle({"vp-a": ""}))
        socket = deep.layout.socket
        assert not socket.is_relative_to(tmp_path)
        assert socket.is_socket()
        deep.done(Destroy(token=deep.token))
        assert not socket.exists()
    finally:
        end(deep)


def test_the_socket_elsewhere_is_the_same_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who applies under another TMPDIR must not find the machine down."""
    layout = Layout(tmp_path / ("d" * 100))
    before = layout.socket
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert layout.socket == before


def test_ending_a_killed_supervisord_removes_its_socket_elsewhere(tmp_path: Path) -> None:
    """It could not do that itself, and nobody else knows the path."""
    deep = local_machine(tmp_path / ("d" * 60) / ("e" * 60) / "m1")
    try:
        before = deep.bring(tiny_bundle({"vp-a": ""}))
        os.kill(before.supervisord_pid, signal.SIGKILL)
        until(lambda: not is_alive(before.supervisord_pid), "supervisord is gone")
        assert deep.layout.socket.is_socket()
        assert supervisord.end(deep.layout) == []
        assert not deep.layout.socket.exists()
    finally:
        end(deep)


def test_a_daemon_whose_status_got_lost_is_told_to_say_it_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is long up, so SIGHUP does not end it; its process stays."""
    monkeypatch.setattr(programs, "READY_WAIT_S", 0.0)
    what = tiny_bundle({"vp-a": ""})
    pids = {name: program.pid for name, program in machine.bring(what).programs.items()}
    until(lambda: machine.age_s("vp-a") >= 2, "it is older than the shortest wait")
    machine.layout.status_file("vp-a").write_text("garbage")
    assert machine.look().programs["vp-a"].generation is None
    machine.switch(what)
    machine.until_up(what)
    assert machine.pids() == pids


def test_the_environment_is_made_from_scratch(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret of whoever applies reaches a daemon."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    seen = machine.bring(tiny_bundle({"vp-a": ""}))
    variables = processes.environment(seen.programs["vp-a"].pid)
    assert "ANTHROPIC_API_KEY" not in variables
    assert variables["FLEET_MACHINE"] == "m1"
    assert variables["FLEET_ROOT"] == str(machine.root)
    assert (machine.layout.root.stat().st_mode & 0o777) == 0o700
    assert (machine.layout.key_file("vp-a").stat().st_mode & 0o777) == 0o600


def test_a_variable_that_a_runner_declares_reaches_its_daemon(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`env:NAME` is resolved on the machine; what is ours can't be declared away."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "secret")
    monkeypatch.setenv("FLEET_MACHINE", "somebody else")
    secrets = {"KEY": "env:ANTHROPIC_API_KEY", "M": "env:FLEET_MACHINE", "ABSENT": "env:NO_SUCH", "F": "file:key"}
    document = encode({"runner": {"type": "command", "command": ["x"], "secrets": secrets}})
    seen = machine.bring(tiny_bundle({"vp-a": ""}, files={"orchestrators/vp-a/orchestrator.json": document}))
    variables = processes.environment(seen.programs["vp-a"].pid)
    assert variables["ANTHROPIC_API_KEY"] == "secret"
    assert variables["FLEET_MACHINE"] == "m1"
    assert "NO_SUCH" not in variables


def test_a_status_file_of_another_process_is_not_believed(machine: Machine) -> None:
    """It stays from an earlier life."""
    seen = machine.bring(tiny_bundle({"vp-a": ""}))
    file = machine.layout.status_file("vp-a")
    for content in (json.dumps({"pid": seen.programs["vp-a"].pid + 1, "generation": seen.current}), "{", "\0" * 50):
        file.write_text(content)
        assert machine.look().programs["vp-a"].generation is None


def test_a_silent_program_is_not_hung_up_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGHUP would end a daemon that has not come up yet, so it is left to read the current files by itself."""
    monkeypatch.setattr("orchestrator_fleet.machines.programs.READY_WAIT_S", 0.2)
    machine.lease()
    first = tiny_bundle({"vp-a": "silent"})
    machine.stage(first)
    machine.switch(first)
    pid = until(lambda: machine.pids().get("vp-a"), "it runs")
    second = tiny_bundle({"vp-a": "silent"}, charter="two")
    machine.stage(second)
    machine.switch(second)
    assert machine.pids()["vp-a"] == pid


def session(machine: Machine, orchestrator: str, generation: str) -> subprocess.Popen[bytes]:
    """A session as a daemon starts one: its own process group, its result's path in its environment."""
    folder = machine.layout.work / orchestrator / "task-1.1"
    folder.mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", SESSION],
        env={"FLEET_RESULT": str(folder / "result.json"), "PATH": os.environ["PATH"]},
        start_new_session=True,
    )
    known = pids.identify(process.pid)
    assert known is not None
    record = {"task": "task-1", "pid": known.pid, "start_ticks": known.start_ticks, "generation": generation}
    (folder / "session.json").write_text(json.dumps(record))
    until(lambda: len(processes.of_sessions(folder)) == 2, "the session and its child run")
    return process


def test_sessions_of_an_orchestrator_that_leaves_are_ended_with_all_they_started(
    machine: Machine, strangers: list[subprocess.Popen[bytes]]
) -> None:
    """Those of the others go on."""
    first = machine.bring(tiny_bundle({"vp-a": "", "vp-b": ""}))
    assert first.current is not None
    leaving, staying = (session(machine, name, first.current) for name in ("vp-b", "vp-a"))
    strangers += [leaving, staying]
    machine.bring(tiny_bundle({"vp-a": ""}), stop=("vp-b",))
    assert leaving.wait(10) != 0
    assert processes.of_sessions(machine.layout.work / "vp-b") == []
    assert len(processes.of_sessions(machine.layout.work / "vp-a")) == 2
    assert not machine.layout.key_file("vp-b").exists()


def test_a_generation_that_a_running_session_uses_is_not_pruned(
    machine: Machine, strangers: list[subprocess.Popen[bytes]]
) -> None:
    """It is once the session is over."""
    bundles = [tiny_bundle({"vp-a": ""}, charter=str(n)) for n in range(3)]
    for what in bundles:
        machine.bring(what)
    strangers.append(session(machine, "vp-a", bundles[0].digest))
    machine.done(Prune(token=machine.token, keep=1))
    assert set(machine.look().generations) == {bundles[0].digest, bundles[2].digest}
    strangers[0].kill()
    strangers[0].wait(10)
    machine.done(Prune(token=machine.token, keep=1))
    assert set(machine.look().generations) == {bundles[2].digest}


def test_destroy_ends_sessions_and_copes_with_a_half_broken_root(
    machine: Machine, strangers: list[subprocess.Popen[bytes]]
) -> None:
    """The link dangles, files are garbage or gone; still nothing is left but what is not ours."""
    seen = machine.bring(tiny_bundle({"vp-a": ""}))
    assert seen.current is not None
    strangers.append(session(machine, "vp-a", seen.current))
    layout = machine.layout
    layout.pid_file.unlink()
    layout.journal.write_bytes(b"\xff\xfe{")
    layout.current.unlink()
    layout.current.symlink_to("generations/nowhere")
    (layout.root / "notes.txt").write_text("a person's")
    machine.done(Destroy(token=machine.token))
    strangers[0].wait(10)
    assert machine.processes() == []
    assert processes.of_sessions(layout.work) == []
    assert [path.name for path in layout.root.iterdir()] == ["notes.txt"]


def test_garbage_in_the_machines_own_files_is_survived(machine: Machine) -> None:
    """Journal, lease and keys are read as far as they can be."""
    what = tiny_bundle({"vp-a": ""})
    machine.bring(what)
    layout, token = machine.layout, machine.token
    layout.journal.write_bytes(layout.journal.read_bytes() + b'{"step": "confir')
    layout.lease.write_bytes(b"\0\0\0")
    layout.key_file("vp-a").write_bytes(b"\xff")
    seen = machine.look()
    assert seen.last_good == what.digest
    assert seen.lease is None
    assert seen.programs["vp-a"].key is None
    assert machine.lease() > token
    second = tiny_bundle({"vp-a": ""}, charter="two")
    machine.bring(second)
    again = machine.look()
    assert again.last_good == second.digest
    assert again.programs["vp-a"].key is not None


def test_observing_an_empty_folder_makes_nothing(machine: Machine) -> None:
    """A plan leaves no trace."""
    assert machine.look() == Observed()
    assert not machine.layout.root.exists()


def test_the_same_requests_go_through_a_pipe(machine: Machine) -> None:
    """`python -m orchestrator_fleet.machines.hands ROOT`: JSON in, JSON out, exit code 0."""
    what = tiny_bundle({"vp-a": ""})
    machine.bring(what)

    def piped(text: bytes) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator_fleet.machines.hands", str(machine.root)],
            input=text,
            capture_output=True,
            timeout=30,
            check=True,
        )
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    seen = piped(b'{"op": "observe"}')
    assert (seen["type"], seen["current"]) == ("observed", what.digest)
    assert piped(b'{"op": "release", "token": 1}')["code"] == "fenced"
    assert "can't be read" in str(piped(b"\xff")["problem"])
