"""What outlives what: sessions their daemon, daemons their link, what is in force a broken generation."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path

import pytest
from living_daemon import NAME, SH, LivingMachine, is_running, until
from scripted_plane import Answer, ScriptedPlane, finished

from orchestrator_fleet.wire import link as wire

WAITS = (*SH, "echo x >> ../../../runs; while [ ! -e ../../../go ]; do sleep 0.05; done; echo done")
SECOND = "2" * 64


def kill(machine: LivingMachine) -> None:
    machine.daemons[-1].kill()
    machine.daemons[-1].wait(10)


def test_a_daemon_killed_in_mid_session_is_followed_by_one_that_adopts_it(
    plane: ScriptedPlane, machine: LivingMachine
) -> None:
    """The same process goes on; it is held from the first message on, and finished once."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    assert is_running(pid)
    machine.online()
    assert plane.of(wire.Hello)[-1].held == (wire.Held(task="task-1", token="t-task-1"),)
    assert machine.status()["sessions"] == 1
    assert machine.record("task-1")["pid"] == pid
    (machine.root / "go").touch()
    finish = until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert (finish.outcome, finish.result) == ("done", "done\n")
    until(lambda: machine.record("task-1")["told"], "the answer is written down")
    assert len(plane.of(wire.Finish)) == 1
    assert (machine.root / "runs").read_text() == "x\n"


def _lives(machine: LivingMachine, pid: int) -> bool:
    return bool(machine.status().get("pid") == pid)


def _is_past(moment: float) -> bool:
    return time.monotonic() > moment


def test_daemons_killed_at_any_moment_lose_no_task_and_work_none_twice(
    plane: ScriptedPlane, machine: LivingMachine
) -> None:
    """Forty sessions under twelve daemons, each killed within a fraction of a second of its coming."""
    chance, count = random.Random(7), 40  # noqa: S311 - the same moments at every run
    machine.generation(command=(*SH, "echo x >> ../../../runs.$FLEET_TASK_ID; sleep 0.2"), sessions_max=5)
    for number in range(count):
        plane.grant(f"task-{number}")
    for _ in range(12):
        daemon = machine.start()
        until(partial(_lives, machine, daemon.pid), "the daemon lives")
        until(partial(_is_past, time.monotonic() + chance.random() / 2), "a moment")
        kill(machine)
    machine.online()
    until(lambda: len({finish.task for finish in plane.of(wire.Finish)}) == count, "every task is finished")
    for finish in plane.of(wire.Finish):
        runs = machine.root / f"runs.{finish.task}"
        # A daemon killed between its record and the start leaves a session that never was.
        assert finish.outcome == ("done" if runs.exists() else "crashed")
        assert not runs.exists() or runs.read_text() == "x\n"


def test_the_log_goes_on_where_it_was(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """A later daemon sends what the earlier one had not."""
    machine.generation(command=(*SH, "echo one; while [ ! -e ../../../go ]; do sleep 0.05; done; echo two"))
    machine.online()
    plane.grant("task-1")
    until(lambda: plane.log_of("task-1") == "one\n", "the first line came")
    until((machine.session("task-1") / "sent").exists, "that is written down")
    kill(machine)
    (machine.root / "go").touch()
    machine.online()
    until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert plane.log_of("task-1") == "one\ntwo\n"


def test_a_session_that_ended_without_a_daemon_is_told_by_the_next(
    plane: ScriptedPlane, machine: LivingMachine
) -> None:
    """Its exit code waited on disk."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    (machine.root / "go").touch()
    until(lambda: (machine.session("task-1") / "exit").exists() and not is_running(pid), "it ended")
    machine.online()
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "done"


def test_a_session_that_ended_in_time_is_no_timeout_later(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Its limit passed while no daemon was there, but it had ended before."""
    machine.generation(command=WAITS, timeout_s=2.0)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    (machine.root / "go").touch()
    until(lambda: not is_running(pid), "it ended")
    until(lambda: time.time_ns() // 1000 > machine.record("task-1")["deadline_us"], "its limit has passed")
    machine.online()
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "done"


def test_the_time_limit_counts_over_a_restart(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The deadline is the attempt's, not the daemon's."""
    machine.generation(command=WAITS, timeout_s=2.0)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    until(lambda: time.time_ns() // 1000 > machine.record("task-1")["deadline_us"], "its limit has passed")
    machine.online()
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "timeout"
    until(lambda: not is_running(pid), "its process is ended")


def test_a_session_killed_together_with_its_daemon_has_crashed(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Gone without an exit code; what it started goes as well."""
    machine.generation(command=(*SH, "sleep 600 & wait"))
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    os.kill(pid, signal.SIGKILL)
    daemon = machine.online()
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "crashed"
    until(lambda: list(machine.leftovers()) == [daemon.pid], "nothing of it is left")


def test_a_session_of_an_earlier_boot_has_crashed(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Its number may be another process's by now: that one is left alone."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    path = machine.session("task-1") / "session.json"
    path.write_text(path.read_text().replace(machine.record("task-1")["boot"], "another-boot"))
    os.kill(pid, signal.SIGKILL)
    machine.online()
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "crashed"


def test_a_session_written_down_but_never_started_has_crashed(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The daemon died between its record and the start; a late start finds that it may not run."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    os.kill(pid, signal.SIGKILL)
    folder, record = machine.session("task-1"), machine.record("task-1")
    (folder / "pid").unlink()
    text = (folder / "session.json").read_text()
    (folder / "session.json").write_text(
        text.replace(f'"pid":{record["pid"]},', "").replace(f'"start_ticks":{record["start_ticks"]},', "")
    )
    machine.online()
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "crashed"
    assert (folder / "pid").exists()


def test_a_session_started_but_not_written_down_is_adopted(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The daemon died between the start and its record: the session's own word counts."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    path, record = machine.session("task-1") / "session.json", machine.record("task-1")
    path.write_text(path.read_text().replace(f'"pid":{pid},"start_ticks":{record["start_ticks"]},', ""))
    assert "pid" not in machine.record("task-1")
    machine.online()
    assert plane.of(wire.Hello)[-1].held
    assert is_running(pid)
    (machine.root / "go").touch()
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "done"


def test_a_lost_status_file_is_written_again_on_sighup(machine: LivingMachine) -> None:
    """Nothing else changed, so nothing else would write it."""
    machine.generation()
    daemon = machine.online()
    file = machine.root / "run" / f"{NAME}.json"
    file.unlink()
    daemon.send_signal(signal.SIGHUP)
    until(file.exists, "the status file is back")


def test_a_folder_without_a_readable_record_is_ended_and_removed(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Nobody holds it, so the control plane gives the task out again."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    kill(machine)
    (machine.session("task-1") / "session.json").write_bytes(b"\xff{")
    left = machine.session("task-1") / "left-by-the-first-life"
    left.touch()
    machine.online()
    assert plane.of(wire.Hello)[-1].held == ()
    until(lambda: not is_running(pid), "its process is ended")
    until(lambda: not left.exists(), "its folder is removed")


def test_sigterm_leaves_sessions_running_and_is_quick(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Exit 0 in under two seconds, nothing finished, nothing ended."""
    machine.generation(command=WAITS)
    daemon = machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    began = time.monotonic()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(10) == 0
    assert time.monotonic() - began < 2
    assert is_running(pid)
    assert plane.of(wire.Finish) == []


def test_a_finish_that_was_not_answered_is_told_again(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The link broke in its midst: it is held until somebody answers, and told once more."""

    def cut_once(_: wire.Finish) -> Answer:
        plane.on_finish = finished
        return None

    plane.on_finish = cut_once
    machine.generation(command=(*SH, "echo done"))
    machine.online()
    plane.grant("task-1")
    until(lambda: len(plane.of(wire.Finish)) == 2, "it was told again")
    until(lambda: machine.record("task-1")["told"], "the answer is written down")
    assert plane.of(wire.Hello)[-1].held == (wire.Held(task="task-1", token="t-task-1"),)
    assert plane.of(wire.Finish)[0].result == plane.of(wire.Finish)[1].result == "done\n"
    until(lambda: machine.status()["sessions"] == 0, "it holds no slot")


def test_a_finish_waits_for_the_control_plane_over_a_restart(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Ended while nobody was there to be told, and the daemon died before somebody was."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    machine.running("task-1")
    plane.stop()
    (machine.root / "go").touch()
    until(lambda: machine.record("task-1").get("finished"), "its end is written down")
    kill(machine)
    plane.start()
    machine.online()
    finish = until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert (finish.outcome, finish.result) == ("done", "done\n")


@pytest.mark.parametrize(
    ("code", "told"),
    [("lease_lost", 1), ("not_found", 1), ("unavailable", 2)],
)
def test_a_refused_finish_is_dropped_unless_trying_again_can_help(
    plane: ScriptedPlane, machine: LivingMachine, code: str, told: int
) -> None:
    """What is lost is lost; what is only unavailable is asked for again."""

    def refuse_once(_: wire.Finish) -> Answer:
        plane.on_finish = finished
        return wire.Problem(code=code, detail="no")

    plane.on_finish = refuse_once
    machine.generation()
    machine.online()
    plane.grant("task-1")
    until(lambda: machine.record("task-1").get("told"), "it is over")
    assert len(plane.of(wire.Finish)) == told


def test_a_result_that_the_control_plane_refuses_fails_the_attempt(
    plane: ScriptedPlane, machine: LivingMachine
) -> None:
    """Told once more, without the result, with why."""

    def refuse(finish: wire.Finish) -> Answer:
        if finish.result is not None:
            return wire.Problem(code="invalid", detail="result: too deep")
        return finished(finish)

    plane.on_finish = refuse
    machine.generation(command=(*SH, "echo done"))
    machine.online()
    plane.grant("task-1")
    until(lambda: machine.record("task-1").get("told"), "it is over")
    last = plane.of(wire.Finish)[-1]
    assert (last.outcome, last.result) == ("failed", None)
    assert "result: too deep" in last.error


@pytest.mark.parametrize("told_by", ["beat", "welcome"])
def test_a_lost_lease_ends_the_session_and_drops_its_output(
    plane: ScriptedPlane, machine: LivingMachine, told_by: str
) -> None:
    """Somebody else works on it by now: nothing more is said of it."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    if told_by == "welcome":
        kill(machine)
        plane.lost.add("task-1")
        machine.online()
    plane.lost.add("task-1")
    until(lambda: not is_running(pid), "the session is ended")
    until(lambda: machine.status()["sessions"] == 0, "its slot is free")
    plane.grant("task-2")
    (machine.root / "go").touch()
    until(lambda: plane.finish_of("task-2"), "the next task is finished")
    assert plane.finish_of("task-1") is None


def test_a_new_generation_is_for_new_sessions(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """After SIGHUP the claim names the new charter; the running session keeps the old, and no process changes."""
    machine.generation(command=WAITS)
    daemon = machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    machine.generation(SECOND, command=WAITS, charter="c2")
    daemon.send_signal(signal.SIGHUP)
    until(lambda: machine.status()["generation"] == SECOND, "the status file says so")
    assert machine.status()["charter_version"] == "c2"
    until(lambda: plane.claim and plane.claim.charter_version == "c2", "the waiting claim names it")
    until(lambda: plane.of(wire.Beat) and plane.of(wire.Beat)[-1].charter_version == "c2", "the beat says so")
    plane.grant("task-2")
    machine.running("task-2")
    assert is_running(pid)
    assert daemon.poll() is None
    first, second = machine.record("task-1"), machine.record("task-2")
    assert (first["generation"], first["charter_version"]) == ("1" * 64, "c1")
    assert (second["generation"], second["charter_version"]) == (SECOND, "c2")
    (machine.root / "go").touch()
    until(lambda: len(plane.of(wire.Finish)) == 2, "both are finished")
    assert [claim.charter_version for claim in plane.of(wire.Claim)].count("c2") >= 1


def test_a_new_generation_breaks_no_link_before_the_next_stands(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The control plane meets the new connection while it still has the old one."""
    machine.generation()
    daemon = machine.online()
    seen: list[int] = []
    greet = plane.greeting

    def look(hello: wire.Hello) -> Answer:
        seen.append(plane.open)
        return greet(hello)

    plane.greeting = look
    machine.generation(SECOND)
    daemon.send_signal(signal.SIGHUP)
    until(lambda: seen, "the new link is greeted")
    assert seen == [2]
    until(lambda: plane.open == 1, "the old one is closed")


def test_more_sessions_are_allowed_at_once(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """A full daemon that may now run more claims without waiting for an end."""
    machine.generation(command=WAITS, sessions_max=1)
    daemon = machine.online()
    plane.grant("task-1")
    plane.grant("task-2")
    machine.running("task-1")
    machine.generation(SECOND, command=WAITS, sessions_max=2)
    daemon.send_signal(signal.SIGHUP)
    machine.running("task-2")


def test_a_missed_signal_costs_no_more_than_a_claim(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Before each claim the daemon looks whether another generation is current."""
    machine.generation()
    machine.online()
    machine.generation(SECOND, charter="c2")
    plane.grant("task-1")
    until(lambda: plane.finish_of("task-1"), "a task is finished")
    until(lambda: plane.claim and plane.claim.charter_version == "c2", "the next claim names the new charter")
    assert machine.status()["generation"] == SECOND


def test_a_status_file_that_cant_be_written_stops_no_work(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Observers lose sight; tasks don't."""
    machine.generation()
    machine.online()
    path = machine.root / "run" / f"{NAME}.json"
    path.unlink()
    path.mkdir()
    (path / "in the way").touch()
    plane.grant("task-1")
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "done"
    assert "status file can't be written" in machine.output.read_text()


def test_a_broken_generation_leaves_the_last_good_one(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Work goes on, and the status file says why it isn't the current one."""
    machine.generation()
    daemon = machine.online()
    broken = machine.root / "generations" / SECOND / "orchestrators" / NAME
    broken.mkdir(parents=True)
    (broken / "orchestrator.json").write_text('{"name": 1}')
    machine.switch(SECOND)
    daemon.send_signal(signal.SIGHUP)
    until(lambda: SECOND in machine.status()["problem"], "the status file says why")
    assert machine.status()["generation"] == "1" * 64
    plane.grant("task-1")
    assert until(lambda: plane.finish_of("task-1"), "the task is finished").outcome == "done"
    machine.generation(SECOND)
    daemon.send_signal(signal.SIGHUP)
    until(lambda: machine.status()["generation"] == SECOND, "a good one is taken")
    assert machine.status()["problem"] == ""


def test_a_daemon_without_a_generation_waits_for_one(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """It says what it waits for, and SIGHUP makes it look."""
    daemon = machine.start()
    until(lambda: "no current generation" in machine.status().get("problem", ""), "it says what is missing")
    machine.generation()
    daemon.send_signal(signal.SIGHUP)
    until(lambda: machine.status()["link"] == "connected", "the link is up")
    assert plane.of(wire.Hello)[0].generation == "1" * 64


def test_a_second_daemon_waits_for_the_first(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """It takes over, sessions included, when the first is gone."""
    machine.generation(command=WAITS)
    first = machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    second = machine.start()
    until(lambda: _has_got_to_the_lock(second.pid), "the second waits")
    assert machine.status()["pid"] == first.pid
    first.send_signal(signal.SIGTERM)
    until(lambda: machine.status()["pid"] == second.pid and machine.status()["sessions"] == 1, "the second took over")
    assert is_running(pid)
    assert first.wait(10) == 0


def _has_got_to_the_lock(pid: int) -> bool:
    """Its signal handlers stand from just before it first tries the lock."""
    lines = proc(pid, "status").splitlines()
    caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(caught, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.usefixtures("plane")
def test_a_daemon_whose_supervisord_is_gone_already_leaves(machine: LivingMachine) -> None:
    """It ended while the daemon was starting: its parent is not the machine's supervisord."""
    machine.generation()
    (machine.root / "run").mkdir()
    (machine.root / "run" / "supervisord.pid").write_text(f"{os.getpid() + 1}\n")
    daemon = machine.start(SUPERVISOR_ENABLED="1")
    assert daemon.wait(10) == 0
    (machine.root / "run" / "supervisord.pid").write_text(f"{os.getpid()}\n")
    machine.online(SUPERVISOR_ENABLED="1")


def test_a_daemon_ends_with_its_parent(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """A supervisord that was killed leaves no daemon behind, and a daemon leaves its sessions."""
    machine.generation(command=WAITS)
    machine.start_under_a_shell()
    until(lambda: machine.status().get("link") == "connected", "the link is up")
    plane.grant("task-1")
    session, daemon = machine.running("task-1"), machine.status()["pid"]
    kill(machine)
    until(lambda: not is_running(daemon), "the daemon is gone")
    assert is_running(session)


@pytest.mark.parametrize("status", [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN])
def test_a_key_that_is_not_accepted_is_told(plane: ScriptedPlane, machine: LivingMachine, status: HTTPStatus) -> None:
    """In the status file; SIGHUP tries again at once."""
    plane.refuse = status
    machine.generation()
    daemon = machine.start()
    until(lambda: machine.status().get("link") == "unauthorized", "the status file says so")
    assert str(status.value) in machine.status()["link_detail"]
    plane.refuse = None
    daemon.send_signal(signal.SIGHUP)
    until(lambda: machine.status()["link"] == "connected", "the link is up", 4.0)


@pytest.mark.parametrize("text", [None, "", "fleet_k-00000000_cut", "\xff"])
def test_a_key_file_that_cant_be_used_is_told(plane: ScriptedPlane, machine: LivingMachine, text: str | None) -> None:
    """With its path and the cure; nobody is asked without a key."""
    if text is None:
        machine.key_file.unlink()
    else:
        machine.key_file.write_text(text, encoding="latin-1")
    machine.generation()
    machine.start()
    until(lambda: machine.status().get("link") == "unauthorized", "the status file says so")
    assert str(machine.key_file) in machine.status()["link_detail"]
    assert "fleet apply" in machine.status()["link_detail"]
    assert plane.connections == 0


def test_a_refused_greeting_is_told(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Such as an orchestrator that the control plane doesn't know."""
    plane.greeting = lambda _: wire.Problem(code="not_found", detail="vp-eng is not declared")
    machine.generation()
    machine.start()
    until(lambda: machine.status().get("link") == "refused", "the status file says so")
    assert "vp-eng is not declared" in machine.status()["link_detail"]


@pytest.mark.parametrize("garbage", ["{", "[]", '{"type": "no-such"}', '{"type": "claimed", "grants": 7}', "[" * 5000])
def test_garbage_ends_the_connection_and_not_the_daemon(
    plane: ScriptedPlane, machine: LivingMachine, garbage: str
) -> None:
    """It connects anew, and its session goes on."""
    machine.generation(command=WAITS)
    daemon = machine.online()
    plane.grant("task-1")
    pid = machine.running("task-1")
    plane.push(garbage)
    until(lambda: len(plane.of(wire.Hello)) == 2, "it connected anew")
    assert plane.of(wire.Hello)[1].held
    assert is_running(pid)
    assert daemon.poll() is None


def test_garbage_instead_of_a_welcome_is_no_reason_to_hurry(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Each connection waits longer for the next."""
    plane.greeting = lambda _: "garbage"
    machine.generation()
    machine.start()
    until(lambda: plane.connections >= 3, "it tries again")
    assert machine.status()["link"] == "connecting"
    plane.greeting = lambda _: wire.Welcome(beat_s=0.2, lease_s=30)
    until(lambda: machine.status()["link"] == "connected", "the link is up")
    assert plane.connections <= 6


def test_a_daemon_comes_back_when_the_control_plane_does(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """With what it holds."""
    machine.generation(command=WAITS)
    machine.online()
    plane.grant("task-1")
    machine.running("task-1")
    plane.stop()
    until(lambda: machine.status()["link"] == "connecting", "the link is down")
    plane.start()
    until(lambda: machine.status()["link"] == "connected", "the link is up")
    assert plane.of(wire.Hello)[-1].held == (wire.Held(task="task-1", token="t-task-1"),)


def test_an_answer_with_an_unknown_number_is_ignored(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Late, or not for us: grants in it are nobody's."""
    machine.generation()
    machine.online()
    stray = wire.Grant(task={"id": "task-9"}, attempt=1, token="t")
    plane.push(wire.Claimed(id=987_654, grants=(stray,)))
    plane.grant("task-1")
    until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert plane.finish_of("task-9") is None
    assert len(plane.of(wire.Hello)) == 1


def test_a_wrong_command_line_is_told(machine: LivingMachine) -> None:
    """Exit 64, one line."""
    daemon = machine.start(FLEET_MACHINE="")
    assert daemon.wait(10) == 64
    assert machine.output.read_text().strip().endswith("`fleet apply` starts it")
    assert "FLEET_MACHINE" in machine.output.read_text()


def test_an_idle_daemon_is_small_and_still(
    plane: ScriptedPlane, machine: LivingMachine, record_property: Callable[[str, object], None]
) -> None:
    """Under 40 MB, and no CPU but for its beats."""
    plane.beat_s = 5.0
    machine.generation()
    daemon = machine.online()
    plane.grant("task-1")
    until(lambda: machine.record("task-1").get("told"), "one task was worked")
    rollup = proc(daemon.pid, "smaps_rollup")
    rss_kib = int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Rss:")))
    assert rss_kib < 40 * 1024
    record_property("rss_kib", rss_kib)
    before, end = cpu_ticks(daemon.pid), time.monotonic() + 2
    until(lambda: time.monotonic() > end, "two seconds of doing nothing")
    assert cpu_ticks(daemon.pid) - before <= 2


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def cpu_ticks(pid: int) -> int:
    fields = proc(pid, "stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
