"""What actions do on a real machine: its supervisord, its daemons, their sessions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from living_fleet import LivingFleet, living, until

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(240)]

A, B = "vp-1-1", "vp-1-2"


@pytest.fixture(scope="module")
def fleet_of_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LivingFleet]:
    """One machine, two orchestrators: applied, served and connected."""
    for fleet in living(tmp_path_factory.mktemp("acted") / "home", machines=1):
        fleet.make_key()
        fleet.fleet("apply", "--yes")
        fleet.serve()
        yield fleet


@pytest.fixture
def fleet(fleet_of_one: LivingFleet) -> LivingFleet:
    """The same, with everybody there and nobody paused."""
    for name in (A, B):
        fleet_of_one.http("POST", f"/api/vps/{name}/activate")
    fleet_of_one.wait_online()
    return fleet_of_one


def ask(fleet: LivingFleet, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
    """A request that may be refused."""
    bearer = {"Authorization": f"Bearer {fleet.key}"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, fleet.url + path, headers={**bearer, **named}, json=body, timeout=60)


def act(fleet: LivingFleet, vp: str, action: str, **headers: str) -> httpx.Response:
    return ask(fleet, "POST", f"/api/vps/{vp}/actions", {"action": action}, **headers)


def newest(fleet: LivingFleet, vp: str) -> dict[str, Any]:
    line: dict[str, Any] = fleet.http("GET", f"/api/vps/{vp}/actions?limit=1")["data"][0]
    return line


def started(fleet: LivingFleet, task: dict[str, Any], attempt: int = 1) -> int:
    """The pid of a task's session, once it runs."""
    mark = fleet.home / f"marks/started-{task['id']}.{attempt}"
    return int(until(lambda: mark.exists() and mark.read_text(), "the session started"))


def ended(fleet: LivingFleet, task: dict[str, Any]) -> list[str]:
    return sorted(path.name.rpartition(".")[2] for path in (fleet.home / "marks").glob(f"ended-{task['id']}.*"))


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_told_to_end(pid: int) -> bool:
    """Whether a SIGTERM waits for it."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def hands(fleet: LivingFleet, **request: Any) -> Any:
    """One request straight to the machine."""
    command = [sys.executable, "-m", "orchestrator_fleet.machines.hands", str(fleet.home / ".fleet/machines/m01")]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_a_restart_is_another_process_and_the_session_goes_on(fleet: LivingFleet) -> None:
    """Through supervisord, of that daemon alone; the session is adopted, and is one attempt."""
    pids, supervisords, generations = fleet.programs(), fleet.supervisords(), fleet.json("status")["machines"]
    task = fleet.add_task("long", orchestrator=A, metadata={"sleep_s": 10})
    session = started(fleet, task)
    answer = act(fleet, A, "restart")
    assert is_there(session)
    now = fleet.programs()
    done = answer.json()
    assert (answer.status_code, done["outcome"], done["state"], done["changed"]) == (200, "done", "done", True)
    assert done["detail"] == f"m01: pid {pids[A]} -> {now[A]}"
    assert (now[A] != pids[A], now[B], fleet.supervisords()) == (True, pids[B], supervisords)
    assert fleet.json("status")["machines"][0]["generation"] == generations[0]["generation"]
    assert (done["previous"], done["status"]) == ("ONLINE", "ONLINE")
    (finished,) = fleet.wait_done([task["id"]])
    assert (finished["attempt"], ended(fleet, task)) == (1, ["1"])
    assert newest(fleet, A)["id"] == done["id"]
    assert not is_there(pids[A])
    fleet.fleet("plan", "--exit-code", code=0)


def test_deactivated_it_claims_nothing_and_what_runs_is_finished(fleet: LivingFleet) -> None:
    """A drain of the same ends with that session; the other orchestrator does not notice."""
    task = fleet.add_task("runs", orchestrator=A, metadata={"sleep_s": 2})
    started(fleet, task)
    fleet.http("POST", f"/api/vps/{A}/deactivate", json={"reason": "enough"})
    waits, other = fleet.add_task("waits", orchestrator=A), fleet.add_task("other", orchestrator=B)
    begun = act(fleet, A, "drain")
    assert (begun.status_code, begun.json()["state"], begun.json()["changed"]) == (202, "running", True)
    (finished, _) = fleet.wait_done([task["id"], other["id"]])
    assert finished["attempt"] == 1
    until(lambda: newest(fleet, A)["outcome"] == "done", "it is drained")
    assert fleet.task(waits["id"])["status"] == "TODO"
    assert fleet.http("GET", f"/api/vps/{A}")["status"] == "AWAY"
    assert fleet.programs().keys() == {A, B}
    fleet.http("POST", f"/api/vps/{A}/activate")
    fleet.wait_done([waits["id"]])


@pytest.mark.parametrize("how", ["deactivate", "stop_sessions"])
def test_what_is_taken_away_is_ended_there_and_done_again(fleet: LivingFleet, how: str) -> None:
    """No try is lost; a pause keeps it in line, and without one it is claimed at once."""
    task = fleet.add_task("taken", orchestrator=B, metadata={"sleep_s": 2})
    session = started(fleet, task)
    if how == "deactivate":
        fleet.http("POST", f"/api/vps/{B}/deactivate", json={"drain": False})
        assert fleet.task(task["id"])["status"] == "TODO"
    else:
        assert act(fleet, B, "stop_sessions").json()["detail"] == "1 session ended, the tasks stand in line again"
    until(lambda: not is_there(session), "its process is ended")
    if how == "deactivate":
        assert fleet.task(task["id"])["status"] == "TODO"
        fleet.http("POST", f"/api/vps/{B}/activate")
    (done,) = fleet.wait_done([task["id"]])
    assert (done["attempt"], ended(fleet, task)) == (2, ["2"])


def test_of_several_restarts_at_once_one_is_done(fleet: LivingFleet) -> None:
    """The others are told which goes on; the key's repeat is answered as before, and not done again."""
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(act, fleet, A, "restart", Idempotency_Key="once") for _ in range(2)]
        asked += [pool.submit(act, fleet, A, "restart") for _ in range(3)]
        answers = [one.result() for one in asked]
    done = [one.json() for one in answers if one.status_code == 200]
    refused = [one.json() for one in answers if one.status_code != 200]
    assert len({one["id"] for one in done}) == len(done) >= 1
    assert {(one["status"], one["code"]) for one in refused} <= {(409, "in_progress")}
    assert refused
    fleet.wait_online()
    first = act(fleet, A, "restart", Idempotency_Key="once more").json()
    pid = fleet.programs()[A]
    assert act(fleet, A, "restart", Idempotency_Key="once more").json() == first
    assert fleet.programs()[A] == pid


def test_while_somebody_applies_nothing_is_restarted(fleet: LivingFleet) -> None:
    """409 `lease_held`, naming who; in the log as well."""
    pids = fleet.programs()
    lease = hands(fleet, op="acquire", holder="ada's apply", ttl_s=60)
    refused = act(fleet, A, "restart")
    assert (refused.status_code, refused.json()["code"]) == (409, "lease_held")
    assert "ada's apply" in refused.json()["detail"]
    assert (newest(fleet, A)["outcome"], newest(fleet, A)["detail"]) == ("failed", refused.json()["detail"])
    hands(fleet, op="release", token=lease["token"])
    assert fleet.programs() == pids
    assert act(fleet, A, "restart").json()["outcome"] == "done"


def test_many_are_restarted_in_one_request(fleet: LivingFleet) -> None:
    """Each by itself, also at one machine; from the command line too."""
    pids = fleet.programs()
    answer = ask(fleet, "POST", "/api/vps/bulk", {"action": "restart", "ids": [B, A, "vp-none"]})
    results = answer.json()["results"]
    assert (answer.status_code, [(one["id"], one["ok"]) for one in results]) == (
        207,
        [(B, True), (A, True), ("vp-none", False)],
    )
    assert [one["outcome"] for one in results[:2]] == ["done", "done"]
    now = fleet.programs()
    assert [now[name] != pids[name] for name in (A, B)] == [True, True]
    said = fleet.fleet("vp", "restart", A, "vp-none", "--reason", "again", code=1)
    assert said.stdout.startswith(f"{A}  restart done: m01: pid {now[A]} -> ")
    assert "there is no orchestrator vp-none" in said.stderr
    assert "again" in fleet.fleet("vp", "actions", A).stdout
    assert fleet.json("vp", "drain", A)["results"][0]["outcome"] == "done"
    assert "AWAY" in fleet.fleet("vp", "list").stdout
    assert fleet.json("vp", "activate", A)["results"][0]["changed"] is True
    assert "no session runs" in fleet.fleet("vp", "stop-sessions", A).stdout


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_control_plane_that_ends_in_the_middle_leaves_no_daemon_down(fleet: LivingFleet, number: int) -> None:
    """Whoever waited is told 202 if there is time; the log says so after the next start, and another may begin."""
    pid = fleet.programs()[A]
    os.kill(pid, signal.SIGSTOP)  # so that it takes its time to end
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(act, fleet, A, "restart", Idempotency_Key=f"cut off by {number}")
        until(lambda: is_told_to_end(pid), "the daemon is told to end")
        line = newest(fleet, A)
        assert (line["action"], line["state"]) == ("restart", "running")
        shown = fleet.fleet("vp", "list").stdout
        assert "restart since" in next(row for row in shown.splitlines() if row.startswith(A))
        assert fleet.server is not None
        fleet.server.send_signal(number)
        if number == signal.SIGKILL:
            assert isinstance(asked.exception(), httpx.TransportError)
        else:
            assert (asked.result().status_code, asked.result().json()["state"]) == (202, "running")
    os.kill(pid, signal.SIGCONT)
    fleet.server.wait(30)
    fleet.serve()
    closed = newest(fleet, A)
    assert (closed["id"], closed["outcome"], closed["detail"]) == (line["id"], "failed", "the control plane ended")
    until(lambda: fleet.programs().get(A, pid) != pid, "supervisord has started another")
    fleet.wait_online()
    again = act(fleet, A, "restart", Idempotency_Key=f"cut off by {number}")
    # What was answered is answered again; what was not is done.
    assert (again.status_code, again.json()["state"]) == (
        (200, "done") if number == signal.SIGKILL else (202, "running")
    )
    assert act(fleet, A, "restart").json()["outcome"] == "done"


def test_without_supervisord_there_is_nothing_to_restart(fleet: LivingFleet) -> None:
    """409 `not_running`, and what to do."""
    os.kill(fleet.supervisords()["m01"], signal.SIGKILL)
    until(lambda: hands(fleet, op="observe")["supervisord"] == "DOWN", "supervisord is gone")
    refused = act(fleet, A, "restart")
    assert (refused.status_code, refused.json()["code"]) == (409, "not_running")
    assert "fleet apply" in refused.json()["detail"]
    fleet.fleet("apply", "--yes")
    fleet.wait_online()
