"""From fleet.yaml to finished tasks in SQL, on real supervisords and daemons."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from living_fleet import LivingFleet, processes_under, until

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(180)]


def test_tasks_reach_their_orchestrator_are_done_and_stand_in_sql(running: LivingFleet) -> None:
    """HTTP in, routed by rule, worked by a daemon, visible in the API and in DuckDB alike."""
    ids = [running.add_task(f"t{n}", discipline=f"d{n % 2 + 1}")["id"] for n in range(8)]
    done = running.wait_done(ids)
    assert {t["route"] for t in done} == {"by-discipline"}
    assert all(t["orchestrator"].endswith(f"-{t['discipline'][1]}") for t in done)
    assert all(t["result"] == {"title": t["title"]} for t in done)
    assert all(t["generation"] and t["charter_version"] and t["attempt"] == 1 for t in done)
    rows = running.json("sql", "select status, count(*) from tasks group by 1")["rows"]
    assert rows == [["DONE", running.http("GET", "/api/tasks?status=DONE")["pagination"]["total"]]]


def test_sql_answers_while_the_server_runs_and_while_it_does_not(running: LivingFleet) -> None:
    """What happened last is in the answer both times."""
    task = running.add_task("only")["id"]
    running.wait_done([task])
    query = "select id, status from tasks"
    while_up = running.json("sql", query)["rows"]
    running.kill_server()
    assert running.json("sql", query)["rows"] == while_up == [[task, "DONE"]]


def test_a_charter_edit_restarts_nothing_and_the_next_session_runs_under_it(running: LivingFleet) -> None:
    """Same pids, and the attempt names the new charter version."""
    first = running.wait_done([running.add_task("before")["id"]])[0]
    pids, supervisords = running.programs(), running.supervisords()
    running.write_charter("vp", "You do what the task says, and say why.")
    plan = running.json("plan", "--exit-code", code=2)
    assert {a["change"] for a in plan["actions"] if a["kind"] == "reload"} == {"charter_wording"}
    running.fleet("apply", "--yes")
    assert running.programs() == pids
    assert running.supervisords() == supervisords
    second = running.wait_done([running.add_task("after")["id"]])[0]
    assert second["charter_version"] != first["charter_version"]
    assert second["generation"] != first["generation"]
    running.fleet("plan", "--exit-code", code=0)


def test_a_runner_edit_restarts_that_orchestrator_alone(running: LivingFleet) -> None:
    """One pid changes."""
    before = running.programs()
    running.write_fleet(command={"vp-1-2": ["python3", "-u", "scripts/worker.py"]})
    running.fleet("apply", "--yes")
    after = running.programs()
    assert {name for name in after if after[name] != before[name]} == {"vp-1-2"}


def test_applying_twice_does_nothing_the_second_time(running: LivingFleet) -> None:
    """No pid, no generation and no journal line changes."""
    before = running.json("status")
    running.fleet("apply", "--yes")
    after = running.json("status")
    assert [(m["generation"], m["programs"].keys()) for m in after["machines"]] == [
        (m["generation"], m["programs"].keys()) for m in before["machines"]
    ]
    assert running.programs() == {n: p["pid"] for m in before["machines"] for n, p in m["programs"].items()}


def test_a_saved_plan_is_refused_once_a_machine_moved(running: LivingFleet) -> None:
    """Exit 3, and the machine's name."""
    running.write_charter("vp", "Another mandate.")
    running.fleet("plan", "-o", "plan.json")
    running.fleet("apply", "--yes", "--only", "m02")
    refused = running.fleet("apply", "plan.json", "--yes", code=3)
    assert "m02" in refused.stderr
    assert "m01" not in refused.stderr


def test_destroy_leaves_nothing_behind(fleet: LivingFleet) -> None:
    """No process and no machine folder."""
    fleet.fleet("apply", "--yes")
    assert processes_under(fleet.home)
    fleet.fleet("destroy", "--yes")
    assert processes_under(fleet.home) == []
    assert not (fleet.home / ".fleet/machines").exists()
    assert not (fleet.home / ".fleet/control").exists()


def test_a_daemon_killed_in_mid_session_comes_back_and_adopts_it(running: LivingFleet) -> None:
    """One attempt, one start, one end."""
    task = running.add_task("long", orchestrator="vp-1-1", metadata={"sleep_s": 3})["id"]
    until(lambda: running.starts_and_ends()[0], "the session started")
    os.kill(running.programs()["vp-1-1"], signal.SIGKILL)
    done = running.wait_done([task])[0]
    assert done["attempt"] == 1
    assert [len(x) for x in running.starts_and_ends()] == [1, 1]


def test_a_supervisord_killed_is_brought_back_by_apply_without_a_second_daemon(running: LivingFleet) -> None:
    """The plan says what is down; apply mends it; the running session is not lost."""
    task = running.add_task("long", orchestrator="vp-1-1", metadata={"sleep_s": 4})["id"]
    until(lambda: running.starts_and_ends()[0], "the session started")
    os.kill(running.supervisords()["m01"], signal.SIGKILL)
    plan = running.json("plan", "--exit-code", code=2)
    assert {a["subject"] for a in plan["actions"] if a["kind"] == "start"} >= {"vp-1-1", "vp-1-2"}
    running.fleet("apply", "--yes")
    running.fleet("plan", "--exit-code", code=0)
    done = running.wait_done([task])[0]
    assert done["attempt"] == 1
    assert len(running.starts_and_ends()[1]) == 1


def test_the_control_plane_killed_in_mid_work_loses_and_doubles_nothing(running: LivingFleet) -> None:
    """Tasks are claimed, running and waiting when it dies; all end once."""
    ids = [running.add_task(f"t{n}", discipline=f"d{n % 2 + 1}", metadata={"sleep_s": 0.4})["id"] for n in range(24)]
    until(lambda: len(running.starts_and_ends()[1]) >= 3, "some are done")
    running.kill_server()
    running.serve()
    done = running.wait_done(ids)
    assert len(done) == len(ids)
    started, ended = running.starts_and_ends()
    assert len(started) == len(ended) == len(ids), "no session was started twice"
    ends = running.json("sql", "select task, count(*) from events where kind = 'task_done' group by 1")["rows"]
    assert sorted(ends) == sorted([i, 1] for i in ids)


def test_a_machine_taken_out_of_the_file_is_taken_down(running: LivingFleet) -> None:
    """What fleet.yaml no longer names does not go on running."""
    running.machines = 1
    running.write_fleet()
    plan = running.fleet("apply", "--yes", code=None)
    if plan.returncode == 3:  # half of the fleet goes: more than max_deletes allows without saying so
        assert "max_deletes" in plan.stderr
        running.write_fleet(extra="")
        text = (running.home / "fleet.yaml").read_text()
        (running.home / "fleet.yaml").write_text(text.replace("min_healthy: 0s", "min_healthy: 0s, max_deletes: 100%"))
        running.fleet("apply", "--yes")
    assert set(running.programs()) == {"vp-1-1", "vp-1-2"}
    assert processes_under(running.home / ".fleet/machines/m02") == []
    assert not (running.home / ".fleet/machines/m02").exists()


def test_nothing_is_written_outside_the_state_folder(running: LivingFleet) -> None:
    """The fleet folder holds what people put there, and .fleet."""
    allowed = {"charters", "scripts", "marks", "fleet.yaml", ".fleet", "serve.log"}
    assert {p.name for p in Path(running.home).iterdir()} <= allowed
