"""A claimed task becomes a process, and its end becomes a Finish."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from living_daemon import NAME, SH, LivingMachine, is_running, until
from scripted_plane import ScriptedPlane

from orchestrator_fleet.daemon.outcome import RESULT_TEXT_BYTES
from orchestrator_fleet.wire import link as wire
from orchestrator_fleet.wire.documents import RunnerDoc, WorkspaceDoc


def run_one(plane: ScriptedPlane, machine: LivingMachine, script: str, **generation: object) -> wire.Finish:
    """The Finish of one task worked by a shell script."""
    machine.generation(command=(*SH, script), **generation)  # type: ignore[arg-type]
    machine.online()
    plane.grant("task-1")
    finish: wire.Finish = until(lambda: plane.finish_of("task-1"), "the task is finished")
    return finish


def test_a_claimed_task_is_run_and_finished_with_result_and_usage(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """From the claim to the answer, with the task on stdin, the live log, and all of it on disk."""
    script = """cat > copy.json; echo out; echo err >&2
    printf '{"result": {"answer": 42}, "usage": {"input_tokens": 3, "usd": 0.5}}' > "$FLEET_RESULT" """
    finish = run_one(plane, machine, script)
    assert (finish.outcome, finish.exit_code, finish.error) == ("done", 0, "")
    assert finish.result == {"answer": 42}
    assert finish.usage == wire.Usage(input_tokens=3, usd=0.5)
    assert finish.token == "t-task-1"
    assert json.loads((machine.session("task-1") / "copy.json").read_text()) == {"id": "task-1", "title": "a task"}
    assert plane.log_of("task-1") == "out\n"
    assert plane.log_of("task-1", "stderr") == "err\n"
    until(lambda: machine.record("task-1")["told"], "the answer is written down")
    until(lambda: machine.status()["sessions"] == 0, "its slot is free")


def test_the_environment_is_exactly_what_is_declared(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """PATH, HOME, LANG, TZ where set, our own four, and the secrets: nothing of the daemon's own."""
    (machine.root / "token.txt").write_text("from a file\n")
    machine.generation(
        command=("/usr/bin/env", "-0"),
        secrets={"A": "env:GIVEN", "B": "file:token.txt", "C": "exec:printf 'from %s' command"},
    )
    machine.online(GIVEN="from env", TZ="Europe/Berlin")
    plane.grant("task-1", attempt=3)
    until(lambda: plane.finish_of("task-1"), "the task is finished")
    text = (machine.session("task-1", 3) / "stdout.log").read_text()
    found = dict(entry.split("=", 1) for entry in text.split("\0") if entry)
    assert found.pop("PATH")
    assert found == {
        "HOME": str(machine.root),
        "LANG": "C.UTF-8",
        "TZ": "Europe/Berlin",
        "A": "from env",
        "B": "from a file",
        "C": "from command",
        "FLEET_TASK_ID": "task-1",
        "FLEET_ATTEMPT": "3",
        "FLEET_RESULT": str(machine.session("task-1", 3) / "result.json"),
        "FLEET_URL": plane.url,
        "FLEET_INBOX": str(machine.root / "run" / "vp-eng.inbox.jsonl"),
    }


@pytest.mark.parametrize(
    ("script", "outcome", "exit_code", "error"),
    [
        ("exit 0", "done", 0, ""),
        ("echo no luck >&2; exit 75", "failed", 75, "exit code 75: failed for now; stderr ends: no luck"),
        ("exit 78", "failed_for_good", 78, "exit code 78: failed for good"),
        ("exit 1", "failed", 1, "exit code 1"),
        ("kill -9 $$", "failed", 137, "exit code 137: ended by SIGKILL"),
        ("kill -9 $PPID; exec sleep 60", "crashed", None, "gone without an exit code"),
    ],
)
def test_the_exit_code_decides_the_outcome(  # noqa: PLR0917 - the table's columns
    plane: ScriptedPlane, machine: LivingMachine, script: str, outcome: str, exit_code: int | None, error: str
) -> None:
    """The table of fleet.yaml's command runner, row by row."""
    finish = run_one(plane, machine, script)
    assert (finish.outcome, finish.exit_code) == (outcome, exit_code)
    assert error in finish.error
    until(lambda: machine.status()["sessions"] == 0, "the slot is free")
    until(lambda: list(machine.leftovers()) == [machine.daemons[0].pid], "nothing but the daemon is left")


def test_without_a_result_file_the_end_of_stdout_is_the_result(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The last bytes as text; no half character at its front."""
    finish = run_one(plane, machine, "i=0; while [ $i -lt 3000 ]; do printf €; i=$((i+1)); done")
    assert finish.outcome == "done"
    assert finish.result == "€" * (RESULT_TEXT_BYTES // 3)
    assert plane.log_of("task-1") == "€" * 3000


def test_a_command_that_is_not_there_says_so(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """127, with the words of who looked for it."""
    machine.generation(command=("no-such-command",))
    machine.online()
    plane.grant("task-1")
    finish = until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert (finish.outcome, finish.exit_code) == ("failed", 127)
    assert "no-such-command" in finish.error


def test_files_that_travel_along_are_copied_so_that_the_generation_stays_as_it_is(
    plane: ScriptedPlane, machine: LivingMachine
) -> None:
    """What the session writes beside its script, as Python does with __pycache__, lands in its own folder."""
    script = "agents/hello.sh"
    digest = machine.generation(command=(f"{{assets}}/{script}",), assets={script: "0" * 64})
    original = machine.root / "generations" / digest / "assets" / script
    original.parent.mkdir(parents=True)
    original.write_text('#!/bin/sh\ntouch "${0%/*}/beside"; printf %s "$0"')
    machine.online()
    plane.grant("task-1")
    ran = until(lambda: plane.finish_of("task-1"), "the task is finished").result
    assert ran.startswith(str(machine.root / "work"))
    assert ran.endswith(f"/assets/{script}")
    assert list(original.parent.iterdir()) == [original]


def test_a_session_has_no_more_memory_than_its_limit(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """RLIMIT_AS, for the command and all it starts."""
    finish = run_one(plane, machine, "ulimit -v", memory=256 << 20)
    assert finish.result == f"{256 << 10}\n"


def test_the_time_limit_ends_the_whole_tree(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Children, grandchildren, those that ignore TERM and those that left the group."""
    script = """sleep 600 & setsid sleep 601 & (trap '' TERM; sleep 602) & wait"""
    finish = run_one(plane, machine, script, timeout_s=1.0)
    assert finish.outcome == "timeout"
    assert "longer than 1 s" in finish.error
    until(lambda: list(machine.leftovers()) == [machine.daemons[0].pid], "nothing but the daemon is left")


def test_a_session_that_ignores_term_is_killed_after_the_grace(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The second rung of the ladder."""
    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    finish = run_one(plane, machine, script, timeout_s=0.5)
    assert (finish.outcome, finish.exit_code) == ("timeout", None)
    until(lambda: list(machine.leftovers()) == [machine.daemons[0].pid], "nothing but the daemon is left")


def test_what_a_session_leaves_running_ends_with_it(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Exit 0 with children in the background is done, and the children are gone."""
    finish = run_one(plane, machine, "sleep 600 & setsid sleep 601 & exit 0")
    assert finish.outcome == "done"
    until(lambda: list(machine.leftovers()) == [machine.daemons[0].pid], "nothing but the daemon is left")


def test_a_cancel_ends_the_session(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """TERM reaches the command, which may clean up; the outcome is cancelled whatever it exits with."""
    machine.generation(command=(*SH, "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.1; done"))
    machine.online()
    plane.grant("task-1")
    until(lambda: plane.log_of("task-1") == "ready\n", "the session runs")
    plane.push(wire.Cancel(task="task-1", token="another", reason="not this one"))
    plane.push(wire.Cancel(task="task-1", token="t-task-1", reason="changed my mind"))
    finish = until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert (finish.outcome, finish.exit_code) == ("cancelled", 0)
    assert plane.log_of("task-1") == "ready\nbye\n"


@pytest.mark.parametrize(
    ("made", "error"),
    [
        ("printf '{' > $FLEET_RESULT", "truncated"),
        (": > $FLEET_RESULT", "truncated"),
        ("printf '[1]' > $FLEET_RESULT", "Expected `object`"),
        ("printf '{\"answer\": 1}' > $FLEET_RESULT", "missing required field `result`"),
        ('printf \'{"result": 1, "usage": {"usd": "much"}}\' > $FLEET_RESULT', "$.usage.usd"),
        ('printf \'{"result": 1, "usage": {"usd": -1}}\' > $FLEET_RESULT', "usage.usd: got -1"),
        (f'echo \'{{"result": 1, "usage": {{"usd": {10**13}}}}}\' > $FLEET_RESULT', "usage.usd: got 1000"),
        (f"echo '{{\"result\": {'[' * 200}{']' * 200}}}' > $FLEET_RESULT", "deeper than 100"),
        ("head -c 1048577 /dev/zero > $FLEET_RESULT", "more than 1048576 bytes"),
        ("mkfifo $FLEET_RESULT", "no regular file"),
        ("mkdir $FLEET_RESULT", "no regular file"),
        ("head -c 40000 /dev/zero | tr '\\0' '[' > $FLEET_RESULT", "$FLEET_RESULT"),
    ],
)
def test_a_result_that_is_none_fails_the_attempt(
    plane: ScriptedPlane, machine: LivingMachine, made: str, error: str
) -> None:
    """Exit 0 does not help it; the error says what was found and what to write."""
    finish = run_one(plane, machine, made)
    assert (finish.outcome, finish.result) == ("failed", None)
    assert error in finish.error


def test_usage_counts_also_when_the_attempt_failed(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """What was spent was spent."""
    finish = run_one(
        plane, machine, 'printf \'{"result": null, "usage": {"output_tokens": 7}}\' > $FLEET_RESULT; exit 1'
    )
    assert (finish.outcome, finish.usage) == ("failed", wire.Usage(output_tokens=7))


@pytest.mark.parametrize(
    ("made", "until_us"),
    [
        ('{"quota": {"until": "2026-01-05T10:00:00+01:00"}}', "2026-01-05T09:00:00+00:00"),
        ('{"quota": {}, "usage": {"usd": 0.5}}', None),
        ('{"quota": {}, "result": "half of it"}', None),
    ],
)
@pytest.mark.parametrize("exit_code", [0, 1, 75])
def test_a_session_whose_providers_quota_is_spent_has_not_failed(
    plane: ScriptedPlane, machine: LivingMachine, *, made: str, until_us: str | None, exit_code: int
) -> None:
    """Whatever its exit code; it says until when, or leaves that to the control plane."""
    finish = run_one(plane, machine, f"echo '{made}' > $FLEET_RESULT; echo 429 >&2; exit {exit_code}")
    assert (finish.outcome, finish.exit_code, finish.result) == ("quota", exit_code, None)
    assert finish.error == "the provider's quota is spent; stderr ends: 429"
    assert finish.until == (None if until_us is None else datetime.fromisoformat(until_us))
    assert (finish.usage is not None) == ("usage" in made)


@pytest.mark.parametrize(
    ("made", "error"),
    [('{"quota": {"until": "soon"}}', "$.quota.until"), ('{"quota": {"until": "2026-01-05T09:00:00"}}', "timezone")],
)
def test_a_quota_that_ends_at_no_moment_fails_the_attempt(
    plane: ScriptedPlane, machine: LivingMachine, made: str, error: str
) -> None:
    """As any other result that is none."""
    finish = run_one(plane, machine, f"echo '{made}' > $FLEET_RESULT")
    assert finish.outcome == "failed"
    assert error in finish.error


def test_a_session_that_ran_too_long_has_that_outcome_whatever_it_says_of_quota(
    plane: ScriptedPlane, machine: LivingMachine
) -> None:
    """What the daemon ended, the daemon explains."""
    finish = run_one(plane, machine, "echo '{\"quota\": {}}' > $FLEET_RESULT; sleep 60", timeout_s=1.0)
    assert (finish.outcome, finish.until) == ("timeout", None)


def test_too_much_output_ends_the_session(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The attempt fails with the limit in its error; of the log a head and a tail were sent."""
    finish = run_one(plane, machine, "head -c 70000000 /dev/zero | tr '\\0' x; sleep 600")
    assert finish.outcome == "failed"
    assert "more than 67108864 bytes" in finish.error
    logs = [piece for piece in plane.of(wire.Log) if piece.stream == "stdout"]
    assert all(len(piece.text.encode()) <= wire.MAX_LOG_CHUNK_BYTES for piece in logs)
    assert sum(len(piece.text) for piece in logs) <= (1 << 20) + (64 << 10)
    assert logs[-1].offset + len(logs[-1].text) == 70_000_000


def test_output_that_is_no_text_is_sent_as_text(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Byte by byte, so that each piece begins where the one before it ended."""
    finish = run_one(plane, machine, "head -c 100000 /dev/zero | tr '\\0' '\\377'; head -c 9 /dev/zero")
    assert plane.log_of("task-1") == "?" * 100_009
    assert finish.result == "?" * RESULT_TEXT_BYTES
    begins = 0
    for piece in plane.of(wire.Log):
        assert piece.offset == begins
        assert len(piece.text.encode()) <= wire.MAX_LOG_CHUNK_BYTES
        begins += len(piece.text.encode())


@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ("env:NOT_SET", "supervisord was started with has no NOT_SET"),
        ("file:missing.txt", "No such file"),
        ("exec:false", "exit code 1"),
        ("exec:'unbalanced", "can't be run"),
        ("exec:no-such-command", "can't be run"),
        ("exec:head -c 70000 /dev/zero", "more than 65536 bytes"),
    ],
)
def test_a_secret_that_cant_be_had_fails_the_attempt(
    plane: ScriptedPlane, machine: LivingMachine, reference: str, error: str
) -> None:
    """Nothing is started, and the error names the reference."""
    machine.generation(command=(*SH, "true"), secrets={"TOKEN": reference})
    machine.online()
    plane.grant("task-1")
    finish = until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert finish.outcome == "failed"
    assert f"secret TOKEN ({reference})" in finish.error
    assert error in finish.error
    assert not (machine.session("task-1") / "pid").exists()


def test_a_runner_that_is_not_available_fails_for_good(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """With what to write into fleet.yaml instead."""
    machine.generation(runner=RunnerDoc(type="claude-code", model="some"))
    machine.online()
    plane.grant("task-1")
    finish = until(lambda: plane.finish_of("task-1"), "the task is finished")
    assert finish.outcome == "failed_for_good"
    assert f"orchestrators.{NAME}.runner" in finish.error


def git(*arguments: str, cwd: Path) -> str:
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@acme.test")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repo(machine: LivingMachine) -> Path:
    """A repository beside fleet.yaml with a branch and a tag."""
    path = machine.root / "app"
    path.mkdir()
    git("init", "--quiet", "--initial-branch=main", cwd=path)
    for text, name in (("one", "v1"), ("two", "v2")):
        (path / "file.txt").write_text(text)
        git("add", ".", cwd=path)
        git("commit", "--quiet", "-m", text, cwd=path)
        git("tag", name, cwd=path)
    git("branch", "older", "v1", cwd=path)
    return path


@pytest.mark.parametrize(("ref", "text"), [("main", "two"), ("older", "one"), ("v1", "one"), ("HEAD", "two")])
@pytest.mark.usefixtures("repo")
def test_a_workspace_is_a_clone_at_the_declared_ref(
    plane: ScriptedPlane, machine: LivingMachine, ref: str, text: str
) -> None:
    """In the session's folder; the task names it."""
    workspace = WorkspaceDoc(repo="app", ref=ref, isolate="worktree")
    finish = run_one(plane, machine, "cat repo/file.txt; cat > told.json", workspace=workspace)
    assert (finish.outcome, finish.result) == ("done", text)
    told = json.loads((machine.session("task-1") / "told.json").read_text())
    assert told["workspace"] == str(machine.session("task-1") / "repo")


def test_a_workspace_without_isolation_is_the_tree_itself(
    plane: ScriptedPlane, machine: LivingMachine, repo: Path
) -> None:
    """Nothing is cloned."""
    workspace = WorkspaceDoc(repo="app", ref="main", isolate="none")
    finish = run_one(plane, machine, "cat", workspace=workspace)
    assert json.loads(finish.result)["workspace"] == str(repo)


@pytest.mark.parametrize(
    ("workspace", "outcome", "error"),
    [
        (WorkspaceDoc(repo="nowhere", ref="main", isolate="worktree"), "failed", "does not exist"),
        (WorkspaceDoc(repo="app", ref="no-such", isolate="worktree"), "failed", "Needed a single revision"),
        (WorkspaceDoc(repo="app", ref="--upload-pack=x", isolate="worktree"), "failed_for_good", "workspace.ref"),
        (WorkspaceDoc(repo="git@host:app", ref="main", isolate="none"), "failed_for_good", "workspace.isolate"),
    ],
)
@pytest.mark.usefixtures("repo")
def test_a_workspace_that_cant_be_had_fails_the_attempt(
    plane: ScriptedPlane, machine: LivingMachine, workspace: WorkspaceDoc, outcome: str, error: str
) -> None:
    """With git's own words."""
    finish = run_one(plane, machine, "echo must not run", workspace=workspace)
    assert finish.outcome == outcome
    assert error in finish.error
    assert "must not run" not in plane.log_of("task-1")


def test_no_more_sessions_run_than_allowed(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """The next is claimed when one ends, and claims ask for the free slots alone."""
    machine.generation(command=(*SH, "while [ ! -e ../../../go ]; do sleep 0.05; done"), sessions_max=2)
    machine.online()
    for number in range(5):
        plane.grant(f"task-{number}")
    for number in range(2):
        machine.running(f"task-{number}")
    assert machine.status()["sessions"] == 2
    assert plane.claim is None
    (machine.root / "go").touch()
    until(lambda: len(plane.of(wire.Finish)) == 5, "all five are finished")
    assert max(claim.limit for claim in plane.of(wire.Claim)) == 2


def test_a_grant_that_comes_twice_is_worked_once(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """By its token, while the session runs and after it ended."""
    machine.generation(command=(*SH, "echo x >> ../../../runs; while [ ! -e ../../../go ]; do sleep 0.05; done"))
    machine.online()
    plane.grant("task-1")
    machine.running("task-1")
    plane.grant("task-1")
    until(lambda: plane.claim, "the second grant was taken in")
    (machine.root / "go").touch()
    until(lambda: plane.finish_of("task-1"), "the task is finished")
    until(lambda: machine.record("task-1")["told"], "it is over")
    plane.grant("task-1")
    plane.grant("task-2")
    until(lambda: plane.finish_of("task-2"), "the task after it is finished")
    assert (machine.root / "runs").read_text() == "x\nx\n"
    assert len(plane.of(wire.Finish)) == 2


def test_a_task_id_that_is_a_path_is_not_followed(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Nothing is made outside the work folder, and the daemon goes on."""
    machine.generation()
    machine.online()
    plane.grant("../../escaped")
    plane.grant("task-1")
    until(lambda: plane.finish_of("task-1"), "the next task is finished")
    assert not list(machine.root.parent.rglob("*escaped*"))


def test_only_the_last_finished_sessions_are_kept(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """Twenty folders stay for people to read; older ones go."""
    machine.generation(sessions_max=10)
    machine.online()
    for number in range(25):
        plane.grant(f"task-{number:02}")
    until(lambda: len(plane.of(wire.Finish)) == 25, "all are finished")
    until(lambda: len(list((machine.root / "work" / NAME).iterdir())) == 20, "the oldest are gone")


def test_is_running_tells_the_daemon(plane: ScriptedPlane, machine: LivingMachine) -> None:
    """What these tests look with sees a process, and its absence."""
    machine.generation()
    daemon = machine.online()
    assert plane.of(wire.Hello)
    assert is_running(daemon.pid)
    daemon.kill()
    daemon.wait(10)
    assert not is_running(daemon.pid)
