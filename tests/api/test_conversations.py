"""What orchestrators say to each other and to people, and their status updates: over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import ControlPlane
from test_tasks import NO_TASK, fields, problem

SAY = "/api/vps/vp-a/conversations/initiate"
TALKS = "/api/vps/vp-a/conversations"
STATUS = "/api/vps/vp-a/status"


def say(plane: ControlPlane, content: str, *, sender: str = "vp-a", to: str = "vp-b", **given: Any) -> dict[str, Any]:
    path = f"/api/vps/{sender}/conversations/initiate"
    answer: dict[str, Any] = plane.json("POST", path, code=201, json={"to": to, "content": content, **given})
    return answer


def test_a_message_waits_for_whoever_it_is_to(shared: ControlPlane) -> None:
    """In its inbox, under the message's id; taken there, it is delivered."""
    said = say(shared, "could you look at this")
    talk, message = said["conversation"], said["message"]
    assert (talk["from"], talk["to"], talk["task"]) == ("vp-a", "vp-b", None)
    assert (message["conversation"], message["state"], message["delivered_at"]) == (talk["id"], "waiting", None)
    assert shared.declared[message["by"]]["owner"] == "person:me"
    (notice,) = shared.json("GET", "/api/vps/vp-b/inbox", key="vp-b")["data"]
    assert (notice["id"], notice["data"]["content"]) == (message["id"], "could you look at this")
    shared.json("POST", "/api/vps/vp-b/inbox/seen", key="vp-b", json={"ids": [notice["id"]]})
    seen = shared.json("GET", f"/api/vps/vp-b/conversations/{talk['id']}", key="vp-b")
    assert seen["conversation"] == talk
    (told,) = seen["data"]
    assert (told["state"], told["content"]) == ("delivered", "could you look at this")
    assert told["delivered_at"] > told["at"]
    assert seen["pagination"] == {"limit": 20, "total": 1, "next_cursor": None}


def test_two_talk_in_a_thread(shared: ControlPlane) -> None:
    """Each with its own key, in order, in pages; Location is where it stands."""
    answer = shared.ask("POST", SAY, key="vp-a", json={"to": "vp-b", "content": "thread 0"})
    assert answer.status_code == 201
    talk = answer.json()["conversation"]
    assert answer.headers["location"] == f"{TALKS}/{talk['id']}"
    for number in range(1, 5):
        sender, to = ("vp-b", "vp-a") if number % 2 else ("vp-a", "vp-b")
        body = {"to": to, "content": f"thread {number}", "thread": talk["id"]}
        path = f"/api/orchestrators/{sender}/conversations/initiate"
        shared.json("POST", path, code=201, key=sender, json=body)
    read, cursor = [], None
    while True:
        page = shared.json(
            "GET", answer.headers["location"], params={"limit": 2, **({"cursor": cursor} if cursor else {})}
        )
        read += page["data"]
        if (cursor := page["pagination"]["next_cursor"]) is None:
            break
    assert [one["content"] for one in read] == [f"thread {number}" for number in range(5)]
    assert [one["from"] for one in read] == ["vp-a", "vp-b", "vp-a", "vp-b", "vp-a"]
    assert page["conversation"]["updated_at"] == read[-1]["at"]


@pytest.mark.parametrize(("to", "kept"), [("human:me", "human:me"), ("person:me", "human:me"), ("#ops", "#ops")])
def test_what_is_said_to_people_is_kept_with_its_event(shared: ControlPlane, to: str, kept: str) -> None:
    """Whoever brings it to them reads it there."""
    task = shared.add("asks", orchestrator="vp-a")
    said = say(shared, f"hello {to}", to=to, task=task["id"])
    message = said["message"]
    assert (message["to"], message["state"], message["delivered_at"]) == (kept, "sent", None)
    event = shared.json("GET", f"/api/tasks/{task['id']}/events")["data"][-1]
    assert event["kind"] == "message_sent"
    assert event["data"]["message"] == {**message, "task": task["id"]}
    listed = shared.json("GET", TALKS, params={"with": to})["data"]
    assert said["conversation"] in listed
    assert {one["to"] for one in listed} == {kept}
    shared.json("POST", f"/api/tasks/{task['id']}/cancel")


def test_conversations_are_listed(shared: ControlPlane) -> None:
    """Newest first, in pages; of one who takes part alone."""
    made = [say(shared, f"list {number}", to="#list")["conversation"]["id"] for number in range(3)]
    first = shared.json("GET", TALKS, params={"with": "#list", "limit": 2}, key="vp-a")
    assert ([one["id"] for one in first["data"]], first["pagination"]["total"]) == (made[:0:-1], 3)
    cursor = first["pagination"]["next_cursor"]
    rest = shared.json("GET", TALKS, params={"with": "#list", "limit": 2, "cursor": cursor})
    assert ([one["id"] for one in rest["data"]], rest["pagination"]["next_cursor"]) == ([made[0]], None)
    assert shared.json("GET", "/api/vps/vp-b/conversations", params={"with": "#list"})["data"] == []
    assert problem(shared.ask("GET", f"/api/vps/vp-b/conversations/{made[0]}")) == (404, "not_found")
    for wrong in ("x", "0", "cnv-", "\0"):
        assert problem(shared.ask("GET", TALKS, params={"cursor": wrong})) == (422, "invalid")
    assert problem(shared.ask("GET", TALKS, params={"with_": "vp-b"})) == (422, "invalid")
    for unknown in ("cnv-none", "initiated", "\0"):
        path = f"{TALKS}/{unknown}".replace("\0", "%00")
        assert problem(shared.ask("GET", path)) == (404, "not_found")


def test_what_makes_no_sense_is_refused_by_field(shared: ControlPlane) -> None:
    """Everything at once; nothing is kept."""
    talk = say(shared, "sense")["conversation"]
    other = say(shared, "sense too", sender="vp-b", to="#b")["conversation"]
    before = shared.json("GET", TALKS)["pagination"]["total"]
    cases: list[tuple[Any, set[str]]] = [
        ({}, {"to", "content"}),
        ({"to": "vp-a", "content": "x"}, {"to"}),
        ({"to": "vp-none", "content": "x"}, {"to"}),
        ({"to": "@me", "content": ""}, {"to", "content"}),
        ({"to": "vp-b\n", "content": "x"}, {"to"}),
        ({"to": "#ops\n", "content": "x"}, {"to"}),
        ({"to": "vp-b", "content": "\0"}, {"content"}),
        ({"to": "vp-b", "content": "x" * 20_001}, {"content"}),
        ({"to": "vp-b", "content": "x", "tasks": 1}, {"tasks"}),
        ({"to": "vp-b", "content": "x", "task": NO_TASK, "thread": "cnv-none"}, {"task", "thread"}),
        ({"to": "vp-b", "content": "x", "thread": other["id"]}, {"thread"}),
        ({"to": "human:me", "content": "x", "thread": talk["id"]}, {"to"}),
        ({"to": 1, "content": []}, {"to", "content"}),
    ]
    for body, named in cases:
        refused = shared.ask("POST", SAY, json=body)
        assert problem(refused) == (422, "invalid"), body
        assert fields(refused) == named, body
    assert problem(shared.ask("POST", SAY, content=b"{", headers={"Content-Type": "application/json"})) == (
        400,
        "malformed_json",
    )
    assert problem(shared.ask("POST", SAY.replace("vp-a", "vp-none"), json={"to": "vp-b", "content": "x"})) == (
        404,
        "not_found",
    )
    assert shared.json("GET", TALKS)["pagination"]["total"] == before


def test_the_same_again_is_a_conflict(shared: ControlPlane) -> None:
    """It names the earlier one; with the request's own key again it is answered again."""
    headers = {"Idempotency-Key": "said-once"}
    body = {"to": "vp-b", "content": "ping"}
    first = shared.ask("POST", SAY, json=body, headers=headers)
    again = shared.ask("POST", SAY, json=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    refused = shared.ask("POST", "/api/vps/vp-b/conversations/initiate", json={"to": "vp-a", "content": "ping"})
    assert problem(refused) == (409, "duplicate_message")
    assert first.json()["message"]["id"] in refused.json()["detail"]


def test_many_say_the_same_at_once(shared: ControlPlane) -> None:
    """One is heard."""
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(shared.ask, "POST", SAY, json={"to": "vp-b", "content": "now!"}) for _ in range(16)]
        assert sorted(one.result().status_code for one in asked) == [201] + [409] * 15


def test_an_orchestrator_speaks_for_itself_alone(shared: ControlPlane) -> None:
    """Whoever else is named, and whether there is such a one, it is refused alike; a reader says nothing."""
    body = {"to": "vp-b", "content": "in another's name"}
    for path in ("vp-b/conversations/initiate", "vp-none/conversations/initiate"):
        assert problem(shared.ask("POST", f"/api/vps/{path}", key="vp-a", json=body)) == (403, "missing_scope")
    for path in ("vp-b/status", "vp-none/status"):
        refused = shared.ask("POST", f"/api/vps/{path}", key="vp-a", json={"message": "x"})
        assert problem(refused) == (403, "missing_scope")
    for key in ("tasks:read", "fleet:read"):
        assert problem(shared.ask("POST", SAY, key=key, json=body)) == (403, "missing_scope")
        assert problem(shared.ask("POST", STATUS, key=key, json={"message": "x"})) == (403, "missing_scope")
    for path in (TALKS, STATUS):
        assert problem(shared.ask("GET", path, key="tasks:read")) == (403, "missing_scope")
        assert shared.ask("GET", path, key="fleet:read").status_code == 200
        assert problem(shared.ask("GET", path, key=None)) == (401, "unauthorized")


def test_a_status_update_is_kept_and_shown(shared: ControlPlane) -> None:
    """It changes no status; with what runs now, newest first."""
    task = shared.add("runs", orchestrator="vp-a")
    (grant,) = shared.poll("vp-a", lease_s=600)
    told = {"message": "half way", "kind": "progress", "task": task["id"], "channel": "#ops"}
    posted = [
        shared.json("POST", STATUS, code=201, key="vp-a", json=told),
        shared.json("POST", "/api/orchestrators/vp-a/status", code=201, json={"message": "all quiet"}),
    ]
    assert {name: posted[0][name] for name in told} == told
    assert (posted[1]["kind"], posted[1]["task"], posted[1]["channel"]) == ("info", None, None)
    assert shared.declared[posted[0]["by"]]["owner"] == "vp-a"
    event = shared.json("GET", f"/api/tasks/{task['id']}/events")["data"][-1]
    assert (event["kind"], event["data"]["update"], event["data"]["task"]["status"]) == (
        "status_posted",
        posted[0],
        "IN_PROGRESS",
    )
    shown = shared.json("GET", f"{STATUS}?limit=1")
    assert (shown["status"], shown["updates"]) == ("OFFLINE", [posted[1]])
    assert shown["status_reason"]
    assert [one["task"] for one in shown["current"]] == [task["id"]]
    rest = shared.json("GET", f"{STATUS}?cursor={shown['next_cursor']}")
    assert (rest["updates"], rest["next_cursor"]) == ([posted[0]], None)
    shared.json("POST", f"/api/tasks/{task['id']}/complete", json={"token": grant["lease"]["token"]})
    assert shared.json("GET", STATUS)["current"] == []


def test_a_wrong_status_update_is_refused_by_field(shared: ControlPlane) -> None:
    """Of another's task, too."""
    theirs = shared.add("theirs", orchestrator="vp-b")
    cases: list[tuple[Any, set[str]]] = [
        ({}, {"message"}),
        ({"message": "", "kind": "happy"}, {"message", "kind"}),
        ({"message": "\0", "channel": ""}, {"message", "channel"}),
        ({"message": "x", "status": "BUSY"}, {"status"}),
        ({"message": "x", "task": NO_TASK}, {"task"}),
        ({"message": "x", "task": theirs["id"]}, {"task"}),
    ]
    for body, named in cases:
        refused = shared.ask("POST", STATUS, json=body)
        assert problem(refused) == (422, "invalid"), body
        assert fields(refused) == named, body
    assert problem(shared.ask("POST", STATUS.replace("vp-a", "vp-none"), json={"message": "x"})) == (404, "not_found")
    assert problem(shared.ask("GET", STATUS.replace("vp-a", "vp-none"))) == (404, "not_found")
    assert problem(shared.ask("GET", f"{STATUS}?cursor=x")) == (422, "invalid")
    shared.json("POST", f"/api/tasks/{theirs['id']}/cancel")
