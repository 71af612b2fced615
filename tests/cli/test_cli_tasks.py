"""task, vp, sql and route explain --task against a real control plane with a real daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import FLEET, FLEET_YAML, Run, run_in

pytestmark = [pytest.mark.supervisord, pytest.mark.timeout(180)]

DEADLINE_S = 30
WORKER = 'cat >/dev/null; echo to stdout; echo to stderr >&2; echo \'{"result": {"n": 1}}\' >$FLEET_RESULT'


def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A fleet that is applied and served, with a saved key; `run` in its folder."""
    home = tmp_path_factory.mktemp("served")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "charters").mkdir()
    (home / "charters/vp.md").write_text("You do what the task says.\n")
    spec = FLEET_YAML.replace('["true"]', json.dumps(["sh", "-c", WORKER]))
    (home / "fleet.yaml").write_text(
        f'{spec}control_plane: {{url: "http://127.0.0.1:{port}"}}\nrollout: {{min_healthy: 0s}}\n'
    )
    run = run_in(home)
    run("key", "create", "--owner", "person:me", "--scopes", "admin", "--save")
    run("apply", "--yes")
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLEET_")}
    with (home / "serve.log").open("wb") as log:
        server = subprocess.Popen([FLEET, "serve"], cwd=home, stdout=log, stderr=log, env=env)
    try:
        _until((home / ".fleet/serve.json").exists, "serve.json is there")
        yield run
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        run("destroy", "--yes")


def test_a_task_is_added_waited_for_and_shown(served: Run) -> None:
    """With its result; --wait is 0 when it is DONE."""
    added = json.loads(
        served(
            *("task", "add", "--title", "one", "--discipline", "security", "--tag", "a", "--metadata", "repo=x=y"),
            *("--wait", "--timeout", "25s", "--json"),
        ).stdout
    )
    assert (added["status"], added["orchestrator"], added["result"]) == ("DONE", "vp-sec", {"n": 1})
    assert (added["tags"], added["metadata"]) == (["a"], {"repo": "x=y"})
    shown = served("task", "show", added["id"], "--events").stdout
    assert "task_done" in shown
    assert "vp-sec" in shown


def test_many_tasks_of_a_file_depend_on_each_other(served: Run) -> None:
    """`after` becomes `depends_on`; all are waited for; - is stdin."""
    items = [
        {"title": "second", "after": ["first"], "ref": "second"},
        {"title": "first", "ref": "first", "priority": "HIGH"},
        {"title": "third", "after": ["first", "second"]},
    ]
    done = served("task", "add", "--from", "-", "--wait", "--json", stdin=json.dumps(items))
    tasks = {task["title"]: task for task in json.loads(done.stdout)["data"]}
    assert {task["status"] for task in tasks.values()} == {"DONE"}
    assert tasks["second"]["depends_on"] == [tasks["first"]["id"]]
    assert set(tasks["third"]["depends_on"]) == {tasks["first"]["id"], tasks["second"]["id"]}
    assert tasks["first"]["completed_at"] < tasks["second"]["started_at"]


def test_a_wait_that_cannot_end_well_is_1(served: Run) -> None:
    """A task that needs one that is cancelled says so, at once."""
    first = json.loads(served("task", "add", "--title", "x", "--depends-on", _blocker(served), "--json").stdout)["id"]
    served("task", "cancel", first, "--reason", "not needed")
    start = time.monotonic()
    text = served("task", "add", "--title", "y", "--depends-on", first, "--wait", code=1).stdout
    assert "BLOCKED" in text
    assert time.monotonic() - start < 20


def _blocker(run: Run) -> str:
    """A task that stays open: it may begin in a year."""
    items = json.dumps([{"title": "later", "available_at": "2099-01-01T00:00:00Z"}])
    return json.loads(run("task", "add", "--from", "-", "--json", stdin=items).stdout)["data"][0]["id"]


def test_a_wait_ends_after_its_time(served: Run) -> None:
    """1, and how far it is."""
    items = json.dumps([{"title": "later", "available_at": "2099-01-01T00:00:00Z"}])
    done = served("task", "add", "--from", "-", "--wait", "--timeout", "1s", code=1, stdin=items)
    assert "not all done within 1 s: 0 of 1 done" in done.stderr


def test_tasks_are_listed_filtered_and_limited(served: Run) -> None:
    """More than a page of the API, in one list."""
    items = json.dumps([{"title": f"many {n}", "tags": ["many"]} for n in range(105)])
    served("task", "add", "--from", "-", stdin=items)
    listed = json.loads(served("task", "list", "--tag", "many", "--limit", "1000", "--json").stdout)
    assert (len(listed["data"]), listed["total"]) == (105, 105)
    done = served("task", "list", "--tag", "many", "--limit", "3")
    assert len(done.stdout.splitlines()) == 4
    assert "3 of 105" in done.stderr


def test_logs_go_to_the_streams_they_came_from(served: Run) -> None:
    """Afterwards, and followed until the task ends."""
    task = json.loads(served("task", "add", "--title", "log", "--json").stdout)["id"]
    followed = served("task", "logs", "-f", task)
    after = served("task", "logs", task)
    for done in (followed, after):
        assert (done.stdout, done.stderr) == ("to stdout\n", "to stderr\n")
    pieces = [json.loads(line) for line in served("task", "logs", task, "--json").stdout.splitlines()]
    assert {piece["stream"] for piece in pieces} == {"stdout", "stderr"}


def test_retry_of_a_task_that_ended_makes_a_new_one(served: Run) -> None:
    """And one that does not exist is told beside it, with exit 1."""
    task = json.loads(served("task", "add", "--title", "again", "--wait", "--json").stdout)["id"]
    done = served("task", "retry", task, "task-none", code=1)
    assert f"{task}  TODO as task-" in done.stdout
    assert "task-none  404" in done.stderr


def test_tasks_are_chosen_cancelled_retried_and_assigned_together(served: Run) -> None:
    """A dry run says what would happen first; what is refused makes the exit code 1."""
    items = json.dumps([{"title": f"b{n}", "tags": ["bulk"], "available_at": "2099-01-01T00:00:00Z"} for n in range(3)])
    ids = [
        task["id"] for task in json.loads(served("task", "add", "--from", "-", "--json", stdin=items).stdout)["data"]
    ]
    dry = served("task", "cancel", "--tag", "bulk", "--dry-run")
    assert sorted(dry.stdout.split()) == sorted([*ids, *["CANCELLED"] * 3])
    assert "3 tasks, 3 changed, 0 refused if this were no dry run" in dry.stderr
    moved = json.loads(served("task", "assign", "--tag", "bulk", "--to", "vp-sec", "--json").stdout)
    assert (moved["matched"], moved["changed"], moved["failed"]) == (3, 3, 0)
    assert json.loads(served("task", "show", ids[0], "--json").stdout)["orchestrator"] == "vp-sec"
    served("task", "cancel", "--tag", "bulk", "--status", "TODO", "--reason", "enough")
    assert json.loads(served("task", "list", "--tag", "bulk", "--status", "CANCELLED", "--json").stdout)["total"] == 3
    refused = served("task", "cancel", ids[0], "--dry-run", code=1)
    assert "CANCELLED is final" in refused.stderr
    again = served("task", "retry", "--tag", "bulk", "--status", "CANCELLED", "--dry-run")
    assert again.stdout.count("TODO") == 3


def test_why_events_and_a_pause_are_told(served: Run) -> None:
    """What holds a task, in words and as JSON; a pause that ends by itself, and one that is ended."""
    paused = served("vp", "pause", "vp-sec", "--reason", "a holiday").stdout
    assert "-> AWAY" in paused
    assert "it was so already" in served("vp", "pause", "vp-sec", "--reason", "a holiday").stdout
    task = json.loads(served("task", "add", "--title", "held", "--orchestrator", "vp-sec", "--json").stdout)["id"]
    assert "pause: paused by" in served("task", "why", task).stdout
    assert json.loads(served("task", "why", task, "--json").stdout)["binding"]["kind"] == "pause"
    assert "AWAY" in served("vp", "list").stdout
    assert "AWAY -> " in served("vp", "resume", "vp-sec").stdout
    followed = served("task", "events", "-f", task).stdout.splitlines()
    assert [line.split()[1] for line in followed] == ["task_created", "task_claimed", "task_done"]
    events = [json.loads(line) for line in served("task", "events", task, "--json").stdout.splitlines()]
    assert [event["kind"] for event in events] == [line.split()[1] for line in followed]
    assert "404" in served("vp", "resume", "vp-none", code=1).stderr
    served("vp", "pause", "vp-sec", "--for", "1s")
    _until(lambda: "AWAY" not in served("vp", "list").stdout, "the pause ended by itself")


def test_a_task_is_planned_for_later_and_found_by_its_times(served: Run) -> None:
    """--not-before and --estimate are the API's fields; lists and the like go by the times that tasks have."""
    times = ("--due", "2090-01-02T00:00:00Z", "--not-before", "2090-01-01T00:00:00Z")
    task = json.loads(served("task", "add", "--title", "later", *times, "--estimate", "15m", "--json").stdout)
    assert (task["available_at"][:10], task["due_at"][:10], task["estimate_s"]) == ("2090-01-01", "2090-01-02", 900)
    for option, time_, found in (
        ("--due-after", "2090-01-01T00:00:00Z", [task["id"]]),
        ("--due-before", "2090-01-01T00:00:00Z", []),
        ("--created-after", "2090-01-01T00:00:00Z", []),
    ):
        listed = json.loads(served("task", "list", "-q", "later", option, time_, "--json").stdout)
        assert [one["id"] for one in listed["data"]] == found, option
    assert f"{task['id']}  CANCELLED" in served("task", "cancel", "--due-after", "2090-01-01T00:00:00Z").stdout


def test_decisions_say_what_a_task_waits_for_instead(served: Run) -> None:
    """Exit 1 with the reason; unblock puts one back that somebody blocked."""
    task = json.loads(served("task", "add", "--title", "d", "--depends-on", _blocker(served), "--json").stdout)["id"]
    for verb in ("approve", "reject"):
        assert "BLOCKED/dependency" in served("task", verb, task, code=1).stderr
    assert "it waits for" in served("task", "unblock", task, code=1).stderr


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("task", "cancel"), "name tasks, or choose them"),
        (("task", "retry", "task-x", "--status", "DONE"), "one of both"),
        (("task", "assign", "task-x"), "--to"),
        (("vp", "pause", "vp-sec", "--for", "1s", "--until", "2030-01-01T00:00:00Z"), "not both"),
        (("task", "add"), "give --title, or --from FILE"),
        (("task", "add", "--title", "x", "--from", "y"), "drop --title"),
        (("task", "add", "--due", "x", "--tag", "t", "--from", "y"), "drop --tag, --due"),
        (("task", "add", "--title", "x", "--metadata", "novalue"), "wanted name=value"),
        (("task", "show", "../vps"), "wanted a task's id"),
        (("vp", "show", "../tasks"), "wanted an orchestrator's name"),
        (("task", "list", "--limit", "0"), "--limit"),
    ],
)
def test_wrong_arguments_are_64_before_anything_is_asked(served: Run, args: tuple[str, ...], problem: str) -> None:
    """With what is wrong."""
    assert problem in served(*args, code=64).stderr


def test_the_apis_refusal_is_told_field_by_field(served: Run) -> None:
    """All of them at once."""
    items = json.dumps({"title": "", "priority": "SOON", "nonsense": 1})
    said = served("task", "add", "--from", "-", code=1, stdin=items).stderr
    assert said.startswith("422 ")
    assert all(f"  {field}: " in said for field in ("title", "priority", "nonsense"))


def test_of_many_tasks_it_is_told_which_was_refused(served: Run) -> None:
    """And how many stand, since those are not taken back."""
    items = json.dumps([{"title": "good"}, {"title": "bad one", "nonsense": 1}, {"title": "never"}])
    said = served("task", "add", "--from", "-", code=1, stdin=items).stderr
    assert "bad one, when 1 of 3 were added: 422 " in said
    assert "  nonsense: is not a known field" in said


def test_orchestrators_are_listed_and_shown(served: Run) -> None:
    """As the control plane sees them."""

    def online() -> bool:
        vps = json.loads(served("vp", "list", "--json").stdout)["data"]
        return {vp["id"]: vp["status"] for vp in vps} == {"vp-eng": "ONLINE", "vp-sec": "ONLINE"}

    _until(online, "both are ONLINE")
    assert "vp-eng" in served("vp", "list", "--discipline", "engineering").stdout
    assert json.loads(served("vp", "show", "vp-sec", "--json").stdout)["machine"] == "m01"
    assert "404" in served("vp", "show", "vp-none", code=1).stderr


def test_route_explain_of_a_task_that_exists(served: Run) -> None:
    """Why it went where it is."""
    task = json.loads(served("task", "add", "--title", "z", "--discipline", "security", "--json").stdout)["id"]
    answer = json.loads(served("route", "explain", "--task", task, "--json").stdout)
    assert (answer["rule"], answer["orchestrator"]) == ("by-discipline", "vp-sec")


def test_sql_answers_as_table_csv_and_json(served: Run) -> None:
    """What is committed is in the answer."""
    task = json.loads(served("task", "add", "--title", "sql", "--wait", "--json").stdout)["id"]
    query = f"select title, status from tasks where id = '{task}'"  # noqa: S608 - an id that was just given
    assert served("sql", query).stdout == "title  status\nsql    DONE\n"
    assert served("sql", query, "--format", "csv").stdout == "title,status\nsql,DONE\n"
    answer = json.loads(served("sql", "-", "--json", stdin=query).stdout)
    assert (answer["columns"], answer["rows"]) == (["title", "status"], [["sql", "DONE"]])
    done = served("sql", "select * from range(10)", "--limit", "2")
    assert len(done.stdout.splitlines()) == 3
    assert "the first 2 rows" in done.stderr
    served("sql", "drop table events", code=1)


def test_sql_gives_as_many_rows_as_are_asked_for(served: Run) -> None:
    """Also more than the API gives by itself."""
    answer = json.loads(served("sql", "from range(12000)", "--limit", "11000", "--json").stdout)
    assert (len(answer["rows"]), answer["truncated"]) == (11_000, True)
    assert "100000" in served("sql", "select 1", "--limit", "100001", code=64).stderr


def test_a_wrong_key_and_a_wrong_place_say_what_to_do(served: Run, tmp_path: Path) -> None:
    """One line, exit 1; --url needs no fleet.yaml."""
    assert "check FLEET_KEY" in served("task", "list", code=1, FLEET_KEY="fleet_wrong").stderr
    unreachable = served("task", "list", "--url", "http://127.0.0.1:9", cwd=tmp_path, code=1, FLEET_KEY="x").stderr
    assert "is `fleet serve` running?" in unreachable
    assert len(unreachable.splitlines()) == 1


def test_data_is_not_removed_under_a_running_control_plane(served: Run) -> None:
    """Exit 3, naming its pid."""
    assert "pid" in served("destroy", "--yes", "--data", code=3).stderr
