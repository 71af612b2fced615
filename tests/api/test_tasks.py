"""`/api/tasks`: each route, its answers and its refusals."""

from __future__ import annotations

import base64
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from serving import ControlPlane, until

NO_TASK = "task-00000000000000000000000000"
UNKNOWN_TOKEN = "0" * 32


def problem(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    body = answer.json()
    assert body["status"] == answer.status_code
    assert {"type", "title", "detail", "code", "request_id"} <= body.keys()
    return answer.status_code, body["code"]


def fields(answer: httpx.Response) -> set[str]:
    assert answer.status_code == 422, answer.text
    return {error["field"] for error in answer.json()["errors"]}


def nested(levels: int) -> Any:
    """Objects in each other, `levels` of them."""
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def cursor(*parts: Any) -> str:
    """What a cursor of the list of tasks looks like."""
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


def drain(plane: ControlPlane, orchestrator: str = "vp-a") -> None:
    """Take everything out of an orchestrator's line."""
    while taken := plane.poll(orchestrator, limit=50):
        for one in taken:
            plane.json("POST", f"/api/tasks/{one['task']['id']}/complete", json={"token": one["lease"]["token"]})


def test_a_task_is_created_routed_and_found_again(shared: ControlPlane) -> None:
    """201 with its place, then the same body by GET."""
    due = datetime.now(UTC) + timedelta(days=1)
    body = {
        "title": "Fix it",
        "description": "All of it.",
        "priority": "HIGH",
        "discipline": "ops",
        "tags": ["x", "y"],
        "due_at": due.isoformat(),
        "estimate_s": 60,
        "metadata": {"repo": {"name": "a"}},
        "max_attempts": 7,
    }
    answer = shared.ask("POST", "/api/tasks", json=body)
    assert answer.status_code == 201
    task = answer.json()
    assert answer.headers["location"] == f"/api/tasks/{task['id']}"
    assert datetime.fromisoformat(task.pop("due_at")) == due
    assert {name: task[name] for name in body if name != "due_at"} == {k: v for k, v in body.items() if k != "due_at"}
    assert (task["status"], task["orchestrator"], task["route"], task["version"]) == (
        "TODO",
        "vp-b",
        "by-discipline",
        1,
    )
    found = shared.ask("GET", answer.headers["location"])
    assert {k: v for k, v in found.json().items() if k != "due_at"} == task
    assert found.headers["etag"] == '"1"'
    drain(shared, "vp-b")


def test_every_wrong_field_is_told_at_once(shared: ControlPlane) -> None:
    """Unknown, missing and wrong ones together, with what was wanted."""
    body = {
        "titel": "x",
        "priority": "URGENT",
        "tags": ["ok", 5],
        "due_at": "tomorrow",
        "max_attempts": 0,
        "estimate_s": "60",
        "orchestrator": "../x",
        "metadata": [],
    }
    answer = shared.ask("POST", "/api/tasks", json=body)
    assert problem(answer) == (422, "invalid")
    assert fields(answer) == {
        "titel",
        "title",
        "priority",
        "tags[1]",
        "due_at",
        "max_attempts",
        "estimate_s",
        "orchestrator",
        "metadata",
    }
    messages = {error["field"]: error["message"] for error in answer.json()["errors"]}
    assert messages["titel"] == "is not a known field; did you mean title?"
    assert messages["title"] == "is required"
    assert messages["priority"] == "got 'URGENT', wanted one of CRITICAL, HIGH, MEDIUM, LOW"
    assert messages["due_at"] == "wanted a time with its zone (RFC 3339), such as 2026-11-20T09:00:00Z"


@pytest.mark.parametrize("path", ["/api/tasks", "/api/vps/vp-a/backlog", "/api/vps"])
def test_every_wrong_word_of_a_query_is_told_at_once(shared: ControlPlane, path: str) -> None:
    """Each with what was wanted, as of a body."""
    answer = shared.ask("GET", path, params={"status": "todo,HIGH", "sort": "size", "order": "up"})
    assert problem(answer) == (422, "invalid")
    told = [(error["field"], error["message"].split(", wanted one of ")[0]) for error in answer.json()["errors"]]
    wanted = [("order", "got 'up'"), ("sort", "got 'size'"), ("status", "got 'HIGH'"), ("status", "got 'todo'")]
    assert sorted(told) == wanted


def test_a_time_in_a_query_that_is_none_says_what_one_is(shared: ControlPlane) -> None:
    """In the words that bodies have for it."""
    answer = shared.ask("GET", "/api/tasks", params={"due_before": "tomorrow", "created_after": "x"})
    assert {error["field"] for error in answer.json()["errors"]} == {"due_before", "created_after"}
    assert {error["message"] for error in answer.json()["errors"]} == {
        "wanted a time with its zone (RFC 3339), such as 2026-11-20T09:00:00Z"
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"title": ""}, "title"),
        ({"title": "x" * 501}, "title"),
        ({"title": "nul \0"}, "title"),
        ({"title": "x", "description": "x" * 100_001}, "description"),
        ({"title": "x", "tags": ["t"] * 51}, "tags"),
        ({"title": "x", "due_at": "2026-01-01T00:00:00"}, "due_at"),
        ({"title": "x", "orchestrator": "vp-nobody"}, "orchestrator"),
        ({"title": "x", "depends_on": [NO_TASK]}, "depends_on[0]"),
        ({"title": "x", "depends_on": [f"{NO_TASK[:-4]}{n:04}" for n in range(1_001)]}, "depends_on"),
        ({"title": "x", "due_at": "9999-12-31T23:59:59-23:59"}, "due_at"),
        ({"title": "x", "available_at": "0001-01-01T00:00:00+23:59"}, "available_at"),
        ({"title": "x", "metadata": nested(101)}, "metadata"),
        ({"title": "x", "metadata": {"a": nested(100)}}, "metadata"),
        ([], "body"),
        (None, "body"),
    ],
)
def test_a_limit_is_named_where_it_is_passed(shared: ControlPlane, body: Any, field: str) -> None:
    """422 with the field."""
    assert fields(shared.ask("POST", "/api/tasks", json=body)) == {field}


@pytest.mark.parametrize(
    "raw", [b"{", b'{"title": "x"} x', b"\xff", b"[" * 100_000, b'{"title": "\\ud800"}', b'{"a": 1e999}']
)
def test_a_body_that_is_not_json_is_400(shared: ControlPlane, raw: bytes) -> None:
    """However it is broken."""
    assert problem(shared.ask("POST", "/api/tasks", content=raw)) == (400, "malformed_json")


def test_a_body_over_the_limit_is_413_however_it_is_sent(shared: ControlPlane) -> None:
    """With a length that tells, and in chunks that don't."""
    big = b'{"title": "' + b"x" * (1 << 20) + b'"}'
    assert problem(shared.ask("POST", "/api/tasks", content=big)) == (413, "body_too_large")
    chunks = (big[at : at + 65_536] for at in range(0, len(big), 65_536))
    assert problem(shared.ask("POST", "/api/tasks", content=chunks)) == (413, "body_too_large")


def test_routes_that_are_not_there_are_problems_too(shared: ControlPlane) -> None:
    """404 for a path, 405 with Allow for a method."""
    assert problem(shared.ask("GET", "/api/nope")) == (404, "not_found")
    assert problem(shared.ask("GET", f"/api/tasks/{NO_TASK}")) == (404, "not_found")
    answer = shared.ask("PATCH", "/api/tasks")
    assert problem(answer) == (405, "method_not_allowed")
    assert {"GET", "POST"} <= set(answer.headers["allow"].replace(" ", "").split(","))


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("status=OPEN", "status"),
        ("priority=TODO,HIGH", "priority"),
        ("sort=title", "sort"),
        ("order=up", "order"),
        ("cursor=nonsense", "cursor"),
        (f"cursor={cursor('claim', False, 1 << 63, [1, 2, 3, 'a'])}", "cursor"),
        (f"cursor={cursor('claim', False, 1, [1, 2, 10**30, 'a'])}", "cursor"),
        (f"cursor={cursor('claim', False, 1, [1, 2, 3, chr(0)])}", "cursor"),
        ("q=%00", "q"),
        ("tag=a%00", "tag"),
        ("due_after=9999-12-31T23:59:59-23:59", "due_after"),
        ("due_before=soon", "due_before"),
        ("stauts=TODO", "stauts"),
    ],
)
def test_a_wrong_query_is_422(shared: ControlPlane, query: str, field: str) -> None:
    """A filter with a typing error must not list everything."""
    assert fields(shared.ask("GET", f"/api/tasks?{query}")) == {field}


def test_the_same_idempotency_key_creates_one_task(shared: ControlPlane) -> None:
    """Also when asked many times at once; another body is refused, another key's caller is another."""
    headers = {"Idempotency-Key": "abc"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda _: shared.ask("POST", "/api/tasks", json={"title": "once"}, headers=headers), range(16))
        )
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert len({answer.headers["location"] for answer in answers}) == 1
    again = shared.ask("POST", "/api/tasks", json={"title": "other"}, headers=headers)
    assert problem(again) == (409, "idempotency_key_reused")
    theirs = shared.ask("POST", "/api/tasks", key="tasks:write", json={"title": "once"}, headers=headers)
    assert theirs.json()["id"] != answers[0].json()["id"]
    too_long = shared.ask("POST", "/api/tasks", json={"title": "x"}, headers={"Idempotency-Key": "k" * 201})
    assert fields(too_long) == {"Idempotency-Key"}
    drain(shared)


def test_every_write_takes_an_idempotency_key(shared: ControlPlane) -> None:
    """Said twice it is done once and answered the same; another request under the key is refused."""
    ended = shared.add("once ended")
    path = f"/api/tasks/{ended['id']}"

    def twice(method: str, path: str, key: str, code: int, **kwargs: Any) -> httpx.Response:
        headers = {"Idempotency-Key": key}
        one, two = (shared.ask(method, path, headers=headers, **kwargs) for _ in range(2))
        assert (one.status_code, one.text) == (two.status_code, two.text)
        assert one.headers.get("etag") == two.headers.get("etag")
        assert one.status_code == code, one.text
        return one

    twice("PUT", path, "w-put", 200, json={"title": "once edited"})
    twice("POST", "/api/tasks/assign", "w-assign", 200, json={"task_ids": [ended["id"]], "orchestrator": "vp-b"})
    twice("POST", f"{path}/cancel", "w-cancel", 200, json={"reason": "enough"})
    again = twice("POST", f"{path}/retry", "w-retry", 201, json={})
    assert again.headers["location"] == f"/api/tasks/{again.json()['id']}"
    assert shared.json("GET", "/api/tasks?q=once edited")["pagination"]["total"] == 2
    reused = shared.ask("POST", f"{path}/retry", headers={"Idempotency-Key": "w-retry"}, json={"reason": "other"})
    assert problem(reused) == (409, "idempotency_key_reused")
    elsewhere = shared.ask("POST", f"{path}/retry", headers={"Idempotency-Key": "w-cancel"}, json={"reason": "enough"})
    assert problem(elsewhere) == (409, "idempotency_key_reused")
    twice("DELETE", f"/api/tasks/{again.json()['id']}", "w-delete", 204)
    refused = shared.ask("POST", f"{path}/unblock", headers={"Idempotency-Key": "w-unblock"})
    assert problem(refused) == (409, "invalid_transition")
    shared.add("once run", orchestrator="vp-b")
    (grant,) = shared.poll("vp-b")
    of = f"/api/tasks/{grant['task']['id']}"
    twice("POST", f"{of}/progress", "w-progress", 200, json={"token": grant["lease"]["token"], "message": "half"})
    kinds = [event["kind"] for event in shared.json("GET", f"{of}/events")["data"]]
    assert kinds.count("task_progress") == 1
    twice("POST", f"{of}/complete", "w-complete", 200, json={"token": grant["lease"]["token"]})


def test_every_wrong_field_of_a_field_is_told_too(shared: ControlPlane) -> None:
    """Also what only the store can know."""
    usage = {"usd": -1, "input_tokens": "a", "tokens": 2}
    wrong = shared.ask("POST", f"/api/tasks/{NO_TASK}/complete", json={"token": "x", "usage": usage})
    assert fields(wrong) == {"usage.usd", "usage.input_tokens", "usage.tokens"}
    wrong = shared.ask("POST", f"/api/tasks/{NO_TASK}/fail", json={"token": "x\0", "error": {"retryable": 1}})
    assert fields(wrong) == {"token", "error.message", "error.retryable"}
    body = {"title": "x", "orchestrator": "vp-nobody", "depends_on": [NO_TASK]}
    assert fields(shared.ask("POST", "/api/tasks", json=body)) == {"orchestrator", "depends_on[0]"}


def test_what_is_taken_in_can_be_read_by_all(shared: ControlPlane) -> None:
    """The deepest metadata and result, and a time far away, come back as they were from every route."""
    due = "9999-12-31T23:59:59.123457Z"
    task = shared.add("deepest", orchestrator="vp-b", metadata=nested(100), due_at=due)
    assert (task["metadata"], task["due_at"]) == (nested(100), due)
    (grant,) = shared.poll("vp-b")
    path, token = f"/api/tasks/{task['id']}", grant["lease"]["token"]
    too_deep = shared.ask("POST", f"{path}/complete", json={"token": token, "result": nested(101)})
    assert fields(too_deep) == {"result"}
    shared.json("POST", f"{path}/complete", json={"token": token, "result": nested(100)})
    assert shared.json("GET", "/api/tasks?q=deepest")["data"][0]["result"] == nested(100)
    assert shared.json("GET", f"{path}/events")["data"][-1]["data"]["task"]["result"] == nested(100)
    query = {"query": "select result from tasks where title = 'deepest'"}
    assert shared.json("POST", "/api/sql", json=query)["rows"] == [[nested(100)]]


@pytest.mark.parametrize("q", ["Émile", "100% _sure_ /x", "plain words"])
def test_a_text_is_found_as_it_is_written(shared: ControlPlane, q: str) -> None:
    """Letters beyond ASCII too; the signs of LIKE are signs like others."""
    task = shared.add(f"search {q.upper() if q.isascii() else q}")
    found = shared.json("GET", "/api/tasks", params={"q": q, "status": "TODO"})["data"]
    assert [one["id"] for one in found] == [task["id"]]
    drain(shared)


def test_a_list_is_filtered_by_repeated_words_and_by_commas(shared: ControlPlane) -> None:
    """Both forms mean any of them."""
    tag = "filtered"
    for priority in ("CRITICAL", "HIGH", "LOW"):
        shared.add(f"{priority} one", priority=priority, tags=[tag, priority.lower()])

    def titles(query: str) -> set[str]:
        return {task["title"] for task in shared.json("GET", f"/api/tasks?tag={tag}&{query}")["data"]}

    assert titles("priority=HIGH,LOW") == titles("priority=HIGH&priority=LOW") == {"HIGH one", "LOW one"}
    assert titles("tag=high,low&q=LOW") == {"LOW one"}
    assert titles("q=critical") == {"CRITICAL one"}
    assert titles("status=TODO&orchestrator=vp-b") == set()
    assert [t["title"] for t in shared.json("GET", f"/api/tasks?tag={tag}")["data"]] == [
        "CRITICAL one",
        "HIGH one",
        "LOW one",
    ]
    drain(shared)


def test_pages_neither_skip_nor_repeat_while_others_write(shared: ControlPlane) -> None:
    """Every task that was there at the start is seen once."""
    tag = "paged"
    before = [shared.add(f"p{n}", tags=[tag], priority=("HIGH", "LOW")[n % 2])["id"] for n in range(23)]
    seen: list[str] = []
    cursor = ""
    while True:
        page = shared.json("GET", f"/api/tasks?tag={tag}&limit=5&sort=created_at{cursor}")
        seen += [task["id"] for task in page["data"]]
        shared.add("late", tags=[tag], priority="CRITICAL")
        shared.json("POST", f"/api/tasks/{seen[0]}/cancel", code=200 if len(seen) == 5 else 409)
        if page["pagination"]["next_cursor"] is None:
            break
        cursor = f"&cursor={page['pagination']['next_cursor']}"
    assert len(seen) == len(set(seen))
    assert [one for one in seen if one in set(before)] == before
    drain(shared)


def test_an_edit_changes_what_it_names_and_needs_the_version_it_saw(shared: ControlPlane) -> None:
    """412 for an older version; null empties; what is left out stays."""
    task = shared.add("old", discipline="eng", due_at="2030-01-01T00:00:00Z", tags=["a"])
    path = f"/api/tasks/{task['id']}"
    edited = shared.ask("PUT", path, json={"title": "new", "due_at": None}, headers={"If-Match": '"1"'})
    assert edited.status_code == 200
    assert (edited.json()["title"], edited.json()["due_at"], edited.json()["tags"]) == ("new", None, ["a"])
    assert edited.headers["etag"] == f'"{edited.json()["version"]}"' != '"1"'
    assert problem(shared.ask("PUT", path, json={"title": "x"}, headers={"If-Match": '"1"'})) == (412, "stale")
    junk = shared.ask("PUT", path, json={"title": "x"}, headers={"If-Match": "junk"})
    assert problem(junk) == (412, "stale")
    assert junk.json()["detail"].endswith("it is at version 2, got one that it never had; read it again")
    assert shared.ask("PUT", path, json={"title": "y"}, headers={"If-Match": "*"}).json()["title"] == "y"
    assert fields(shared.ask("PUT", path, json={"title": None, "id": "x"})) == {"title", "id"}
    moved = shared.json("PUT", path, json={"orchestrator": "vp-b", "priority": "LOW"})
    assert (moved["orchestrator"], moved["priority"]) == ("vp-b", "LOW")
    assert fields(shared.ask("PUT", path, json={"orchestrator": "vp-nobody"})) == {"orchestrator"}
    assert problem(shared.ask("PUT", f"/api/tasks/{NO_TASK}", json={"title": "x"})) == (404, "not_found")
    drain(shared, "vp-b")


def test_a_failed_edit_changes_nothing(shared: ControlPlane) -> None:
    """Fields and status are one transaction."""
    task = shared.add("whole")
    answer = shared.ask("PUT", f"/api/tasks/{task['id']}", json={"title": "half", "status": "DONE"})
    assert problem(answer) == (409, "invalid_transition")
    assert shared.task(task["id"]) == task
    drain(shared)


def test_a_status_moves_along_the_table_by_a_persons_key(control_plane: ControlPlane) -> None:
    """The 409 names the legal ones; an orchestrator's key may not."""
    control_plane.declare("vp-writer", owner="vp-a", scopes=["tasks:write"])
    control_plane.write()
    control_plane.start()
    path = f"/api/tasks/{control_plane.add()['id']}"
    refused = control_plane.ask("PUT", path, key="vp-writer", json={"status": "BLOCKED"})
    assert problem(refused) == (403, "forbidden")
    blocked = control_plane.json("PUT", path, json={"status": "BLOCKED"})
    assert (blocked["status"], blocked["blocked_reason"]) == ("BLOCKED", "manual")
    wrong = control_plane.ask("PUT", path, json={"status": "DONE"})
    assert problem(wrong) == (409, "invalid_transition")
    assert "TODO, CANCELLED" in wrong.json()["detail"]
    assert control_plane.json("PUT", path, json={"status": "TODO"})["status"] == "TODO"
    assert control_plane.json("PUT", path, json={"status": "CANCELLED"})["status"] == "CANCELLED"


def test_delete_cancels_and_purge_removes_what_has_ended(shared: ControlPlane) -> None:
    """Purging needs admin, and a final task."""
    path = f"/api/tasks/{shared.add()['id']}"
    assert problem(shared.ask("DELETE", f"{path}?purge=true")) == (409, "not_final")
    assert shared.ask("DELETE", path).status_code == 204
    assert shared.json("GET", path)["status"] == "CANCELLED"
    assert problem(shared.ask("DELETE", path)) == (409, "invalid_transition")
    assert problem(shared.ask("DELETE", f"{path}?purge=true", key="tasks:write")) == (403, "missing_scope")
    assert shared.ask("DELETE", f"{path}?purge=true").status_code == 204
    assert problem(shared.ask("GET", path)) == (404, "not_found")


def test_assigning_answers_for_each_task(shared: ControlPlane) -> None:
    """200 when all moved, 207 when some could not; a running one is taken from its holder."""
    one, two, ended = (shared.add(f"assign {n}") for n in range(3))
    shared.json("POST", f"/api/tasks/{ended['id']}/cancel")
    held = {grant["task"]["id"]: grant["lease"]["token"] for grant in shared.poll("vp-a", limit=50)}
    assert {one["id"], two["id"]} <= held.keys()
    mixed = shared.json(
        "POST",
        "/api/tasks/assign",
        code=207,
        json={"task_ids": [one["id"], ended["id"], NO_TASK], "orchestrator": "vp-b", "reason": "better there"},
    )
    assert [(r["id"], r["ok"], r.get("error", {}).get("code")) for r in mixed["results"]] == [
        (one["id"], True, None),
        (ended["id"], False, "final"),
        (NO_TASK, False, "not_found"),
    ]
    assert (shared.task(one["id"])["orchestrator"], shared.task(one["id"])["status"]) == ("vp-b", "TODO")
    late = shared.ask("POST", f"/api/tasks/{one['id']}/complete", json={"token": held[one["id"]]})
    assert problem(late) == (409, "lease_lost")
    all_moved = {"task_ids": [two["id"]], "orchestrator": "vp-b"}
    assert shared.json("POST", "/api/tasks/assign", json=all_moved)["results"] == [{"id": two["id"], "ok": True}]
    assert fields(shared.ask("POST", "/api/tasks/assign", json={"task_ids": [], "orchestrator": "vp-b"})) == {
        "task_ids"
    }
    unknown = {"task_ids": [two["id"]], "orchestrator": "vp-nobody"}
    assert fields(shared.ask("POST", "/api/tasks/assign", json=unknown)) == {"orchestrator"}
    drain(shared)
    drain(shared, "vp-b")


def test_poll_claims_and_complete_ends(shared: ControlPlane) -> None:
    """The lease's token fences; completing twice answers the same; another token is 409."""
    task = shared.add("work")
    answer = shared.ask("GET", "/api/tasks/poll?orchestrator=vp-a&lease_s=120")
    assert answer.headers["cache-control"] == "no-store"
    (grant,) = answer.json()["data"]
    assert (grant["task"]["id"], grant["task"]["status"], grant["lease"]["attempt"]) == (task["id"], "IN_PROGRESS", 1)
    lease = datetime.fromisoformat(grant["lease"]["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=100) < lease <= timedelta(seconds=120)
    path, token = f"/api/tasks/{task['id']}", grant["lease"]["token"]
    for verb, body in (
        ("heartbeat", {}),
        ("complete", {"result": 1}),
        ("fail", {"error": {"message": "x"}}),
        ("release", {}),
        ("progress", {"message": "x"}),
    ):
        refused = shared.ask("POST", f"{path}/{verb}", json={"token": UNKNOWN_TOKEN, **body})
        assert problem(refused) == (409, "lease_lost"), verb
        missing = shared.ask("POST", f"/api/tasks/{NO_TASK}/{verb}", json={"token": token, **body})
        assert problem(missing) == (404, "not_found"), verb
    beaten = shared.json("POST", f"{path}/heartbeat", json={"token": token, "lease_s": 300})
    assert beaten["lease"]["expires_at"] > grant["lease"]["expires_at"]
    shared.json("POST", f"{path}/progress", json={"token": token, "message": "half way"})
    body = {"token": token, "result": {"answer": 42}, "usage": {"input_tokens": 3, "usd": 0.5}}
    done = shared.json("POST", f"{path}/complete", json=body)
    assert (done["status"], done["result"]) == ("DONE", {"answer": 42})
    assert shared.json("POST", f"{path}/complete", json=body) == done
    events = shared.json("GET", f"{path}/events")
    kinds = [event["kind"] for event in events["data"]]
    assert kinds == ["task_created", "task_claimed", "task_progress", "task_done"]
    assert events["data"][-1]["data"]["usage"]["input_tokens"] == 3
    assert {event["actor"] for event in events["data"]} == {
        k for k, v in shared.declared.items() if v["scopes"] == ["admin"]
    }


def test_events_come_in_pages(shared: ControlPlane) -> None:
    """In order, each once."""
    task = shared.add()
    for n in range(4):
        shared.json("PUT", f"/api/tasks/{task['id']}", json={"title": f"t{n}"})
    first = shared.json("GET", f"/api/tasks/{task['id']}/events?limit=3")
    assert first["pagination"]["total"] == 5
    rest = shared.json("GET", f"/api/tasks/{task['id']}/events?limit=3&cursor={first['pagination']['next_cursor']}")
    assert rest["pagination"]["next_cursor"] is None
    sequence = [event["seq"] for event in first["data"] + rest["data"]]
    assert sequence == sorted(set(sequence))
    assert len(sequence) == 5
    assert problem(shared.ask("GET", f"/api/tasks/{NO_TASK}/events")) == (404, "not_found")
    drain(shared)


def test_more_events_than_are_read_at_once_come_all(shared: ControlPlane) -> None:
    """The pages end where the events do."""
    task = shared.add(orchestrator="vp-b")
    (grant,) = shared.poll("vp-b")
    path, token = f"/api/tasks/{task['id']}", grant["lease"]["token"]
    headers = {"Authorization": f"Bearer {shared.keys['admin']}"}
    with httpx.Client(base_url=shared.url, headers=headers) as client, ThreadPoolExecutor(16) as pool:
        body = {"token": token, "message": "still at it"}
        told = pool.map(lambda _: client.post(f"{path}/progress", json=body).status_code, range(1_000))
        assert set(told) == {200}
        seen, cursor, total = 0, "0", 0
        while cursor is not None:
            page = client.get(f"{path}/events", params={"limit": 100, "cursor": cursor}).json()
            seen, cursor, total = (
                seen + len(page["data"]),
                page["pagination"]["next_cursor"],
                page["pagination"]["total"],
            )
    assert (seen, total) == (1_002, 1_002)
    shared.json("POST", f"{path}/complete", json={"token": token})


def test_a_failed_task_is_tried_again_and_then_waits_for_a_person(shared: ControlPlane) -> None:
    """After its backoff, by whoever polls; `retry` redrives it."""
    task = shared.add("fragile", max_attempts=2)
    path = f"/api/tasks/{task['id']}"
    for attempt in (1, 2):
        (grant,) = shared.poll("vp-a", wait=10)
        assert grant["lease"]["attempt"] == attempt
        failed = shared.json(
            "POST", f"{path}/fail", json={"token": grant["lease"]["token"], "error": {"message": "no luck"}}
        )
        assert failed["error"]["message"] == "no luck"
    assert (failed["status"], failed["blocked_reason"]) == ("BLOCKED", "attempts_exhausted")
    assert shared.json("POST", f"{path}/retry")["status"] == "TODO"
    (grant,) = shared.poll("vp-a")
    final = {"token": grant["lease"]["token"], "error": {"message": "never", "retryable": False}}
    assert shared.json("POST", f"{path}/fail", json=final)["status"] == "BLOCKED"
    assert shared.json("POST", f"{path}/unblock", json={"reason": "try"})["status"] == "TODO"
    (grant,) = shared.poll("vp-a")
    released = shared.json("POST", f"{path}/release", json={"token": grant["lease"]["token"]})
    assert released["status"] == "TODO"
    drain(shared)


def test_retry_of_an_ended_task_makes_a_new_one(shared: ControlPlane) -> None:
    """201, and it names its parent."""
    task = shared.add("again", tags=["t"])
    assert problem(shared.ask("POST", f"/api/tasks/{task['id']}/retry")) == (409, "invalid_transition")
    shared.json("POST", f"/api/tasks/{task['id']}/cancel", json={"reason": "no"})
    again = shared.json("POST", f"/api/tasks/{task['id']}/retry", code=201)
    assert again["id"] != task["id"]
    assert (again["parent"], again["title"], again["tags"], again["status"]) == (task["id"], "again", ["t"], "TODO")
    drain(shared)


def test_a_dependency_holds_a_task_until_it_is_done(shared: ControlPlane) -> None:
    """The poller of the waiting task's orchestrator is woken by the end of the other."""
    first = shared.add("first")
    second = shared.add("second", orchestrator="vp-b", depends_on=[first["id"]])
    assert (second["status"], second["blocked_reason"]) == ("BLOCKED", "dependency")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shared.poll, "vp-b", wait=15)
        drain(shared)
        (grant,) = waiting.result()
    assert grant["task"]["id"] == second["id"]
    cycle = shared.ask("PUT", f"/api/tasks/{first['id']}", json={"depends_on": [second["id"]]})
    assert cycle.status_code == 409
    shared.json("POST", f"/api/tasks/{second['id']}/complete", json={"token": grant["lease"]["token"]})


def test_a_cycle_of_dependencies_is_refused(shared: ControlPlane) -> None:
    """With the path."""
    first = shared.add("first")
    second = shared.add("second", depends_on=[first["id"]])
    answer = shared.ask("PUT", f"/api/tasks/{first['id']}", json={"depends_on": [second["id"]]})
    assert problem(answer) == (409, "dependency_cycle")
    assert first["id"] in answer.json()["detail"]
    shared.json("POST", f"/api/tasks/{second['id']}/cancel")
    drain(shared)


def test_a_poller_that_waits_gets_the_task_that_comes(shared: ControlPlane) -> None:
    """And an empty line says why it is empty."""
    assert shared.json("POST", "/api/tasks/poll", json={"orchestrator": "vp-a"}) == {
        "data": [],
        "reason": "no task is ready",
    }
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shared.poll, "vp-a", wait=30)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        task = shared.add("awaited")
        (grant,) = waiting.result(timeout=5)
    assert grant["task"]["id"] == task["id"]
    shared.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})


def test_a_task_for_later_wakes_its_poller_when_it_is_time(shared: ControlPlane) -> None:
    """Not before."""
    at = datetime.now(UTC) + timedelta(seconds=1)
    task = shared.add("later", available_at=at.isoformat())
    assert shared.poll("vp-a") == []
    (grant,) = shared.poll("vp-a", wait=20)
    assert grant["task"]["id"] == task["id"]
    assert datetime.now(UTC) >= at
    shared.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})


def test_many_pollers_never_get_the_same_task(shared: ControlPlane) -> None:
    """Each task once, none left."""
    ids = {shared.add(f"shared {n}")["id"] for n in range(30)}

    def take(_: int) -> list[str]:
        taken: list[str] = []
        while grants := shared.poll("vp-a", limit=2):
            taken += [grant["task"]["id"] for grant in grants]
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [task for many in pool.map(take, range(6)) for task in many]
    assert len(taken) == len(ids)
    assert set(taken) == ids
    for task in ids:
        shared.json("POST", f"/api/tasks/{task}/cancel")


def test_a_poller_that_hangs_up_takes_nothing_with_it(shared: ControlPlane) -> None:
    """The next one gets the task, at its first attempt."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{shared.url}/api/tasks/poll",
            json={"orchestrator": "vp-b", "wait": 30},
            headers={"Authorization": f"Bearer {shared.keys['admin']}"},
            timeout=0.3,
        )
    until(lambda: '"status":499' in shared.log, "the server saw the poller go")
    task = shared.add("still there", orchestrator="vp-b")
    (grant,) = shared.poll("vp-b", wait=10)
    assert (grant["task"]["id"], grant["lease"]["attempt"]) == (task["id"], 1)
    shared.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("wait=61", "wait"),
        ("wait=-1", "wait"),
        ("wait=nan", "wait"),
        ("limit=51", "limit"),
        ("limit=0", "limit"),
        ("lease_s=4", "lease_s"),
        ("lease_s=3601", "lease_s"),
        ("waits=1", "waits"),
    ],
)
def test_a_poll_has_limits(shared: ControlPlane, query: str, field: str) -> None:
    """422 with the field."""
    assert fields(shared.ask("GET", f"/api/tasks/poll?{query}", key="vp-a")) == {field}


def test_a_persons_poll_must_say_for_whom(shared: ControlPlane) -> None:
    """A person is no orchestrator, and neither is everybody."""
    assert fields(shared.ask("POST", "/api/tasks/poll", json={})) == {"orchestrator"}
    assert fields(shared.ask("POST", "/api/tasks/poll", json={"orchestrator": "vp-nobody"})) == {"orchestrator"}


def test_sql_answers_with_what_has_just_been_committed(shared: ControlPlane) -> None:
    """Read-only, with parameters; what it can't answer is 422."""
    task = shared.add("counted")
    query = {"query": "select kind, actor from events where task = ? order by seq", "params": [task["id"]]}
    answer = shared.json("POST", "/api/sql", json=query)
    assert answer["columns"] == ["kind", "actor"]
    assert [row[0] for row in answer["rows"]] == ["task_created"]
    for wrong in ("select * from nowhere", "delete from events", "select 1; select 2", "select * from '/etc/passwd'"):
        assert problem(shared.ask("POST", "/api/sql", json={"query": wrong})) == (422, "query_invalid"), wrong
    drain(shared)


def test_a_history_that_cant_be_opened_is_told_until_it_can(control_plane: ControlPlane) -> None:
    """503 with what to do; tasks go on, and nothing of them is missing afterwards."""
    control_plane.start()
    query = {"query": "select count(*) from tasks"}
    control_plane.add()
    assert control_plane.json("POST", "/api/sql", json=query)["rows"] == [[1]]
    file = control_plane.state / "history.duckdb"
    file.unlink()
    file.write_bytes(b"not a database either" * 1_000)
    answer = control_plane.ask("POST", "/api/sql", json=query)
    assert problem(answer) == (503, "unavailable")
    assert "move it (and its .wal) away" in answer.json()["detail"]
    control_plane.add()
    file.unlink()
    assert control_plane.json("POST", "/api/sql", json=query)["rows"] == [[2]]


def test_an_error_inside_tells_nothing_outside(control_plane: ControlPlane) -> None:
    """500 with a request id that the log has, with the reason."""
    control_plane.start()
    control_plane.add()
    with sqlite3.connect(control_plane.state / "store.sqlite") as stranger:
        stranger.execute("UPDATE tasks SET metadata = '{'")
    answer = control_plane.ask("GET", "/api/tasks")
    assert problem(answer) == (500, "internal")
    assert str(control_plane.home) not in answer.text
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert f'"request failed","request_id":"{answer.json()["request_id"]}"' in control_plane.log
