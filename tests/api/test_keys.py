"""Keys of orchestrators over HTTP: generated, rotated and revoked, in force at once and declared in git."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from peer import dialled, hello
from serving import ControlPlane, until
from websockets.exceptions import InvalidStatus

from orchestrator_fleet import keys
from orchestrator_fleet.wire import link as wire

Answer = dict[str, Any]


def git(plane: ControlPlane, *words: str) -> str:
    """Git, in the fleet folder, as a person of no configuration."""
    who = ("-c", "user.name=me", "-c", "user.email=me@example.invalid", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(plane.home), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def in_git(plane: ControlPlane) -> ControlPlane:
    """Put the fleet under git, as a person would."""
    (plane.home / ".gitignore").write_text(".fleet/\nserve.log\n")
    git(plane, "init", "-q", "-b", "main")
    git(plane, "add", "-A")
    git(plane, "commit", "-q", "-m", "A fleet")
    return plane


@pytest.fixture
def plane(control_plane: ControlPlane) -> ControlPlane:
    """In git, with an orchestrator that has no key; not started."""
    control_plane.orchestrators["vp-new"] = "eng"
    control_plane.declare("keys:write", owner="person:clerk", scopes=["keys:write", "tasks:read", "tasks:work"])
    control_plane.declare("vp-a:keys", owner="vp-a", scopes=["keys:write", "tasks:read", "tasks:work"])
    control_plane.write()
    return in_git(control_plane)


@pytest.fixture
def served(plane: ControlPlane) -> ControlPlane:
    """The same, running."""
    return plane.start()


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def create(plane: ControlPlane, vp: str = "vp-new", *, code: int = 201, **asked: Any) -> Answer:
    made: Answer = plane.json("POST", f"/api/vps/{vp}/api-key", code=code, **asked)
    return made


def rotate(plane: ControlPlane, vp: str = "vp-new", **asked: Any) -> Answer:
    made: Answer = plane.json("POST", f"/api/vps/{vp}/api-key/rotate", **asked)
    return made


def status_with(plane: ControlPlane, text: str) -> int:
    """What a key is answered."""
    answer = httpx.get(f"{plane.url}/api/tasks", headers={"Authorization": f"Bearer {text}"}, timeout=20)
    return answer.status_code


def reason_of(plane: ControlPlane, text: str) -> str | None:
    """Why a key is not valid; None when it is."""
    found = plane.json("POST", "/api/vps/validate", key=None, json={"api_key": text})
    return None if found["valid"] else found["reason"]


def declared(plane: ControlPlane) -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load((plane.home / "fleet.yaml").read_text())["keys"]
    return section


def events(plane: ControlPlane, kind: str) -> list[dict[str, Any]]:
    """Events of this kind, oldest first."""
    query = "select actor, orchestrator, data::varchar from events where kind = ? order by id"
    rows = plane.json("POST", "/api/sql", json={"query": query, "params": [kind]})["rows"]
    return [{"actor": actor, "orchestrator": vp, "data": json.loads(data)} for actor, vp, data in rows]


def test_a_new_key_works_at_once_and_is_a_commit(served: ControlPlane) -> None:
    """By its caller, of one entry; its text is in the answer and nowhere else."""
    before, head = declared(served), git(served, "rev-parse", "HEAD")
    asked = {
        "name": "deploy bot",
        "scopes": ["tasks:work", "tasks:read"],
        "expires_in_days": 30,
        "reason": "CI needs it",
    }
    made = create(served, key="keys:write", json=asked)
    assert status_with(served, made["key"]) == 200
    assert (made["scopes"], made["in_force"]) == (["tasks:read", "tasks:work"], True)
    assert re.fullmatch(keys.KEY_PATTERN, made["key"])
    left = datetime.fromisoformat(made["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=29.9) < left <= timedelta(days=30)
    after = declared(served)
    new = after.pop(made["id"])
    assert after == before
    _, secret = keys.parse(made["key"]) or ("", "")
    assert (new["owner"], new["name"], keys.matches(secret, new["sha256"])) == ("vp-new", "deploy bot", True)
    assert made["commit"] == git(served, "rev-parse", "HEAD")
    assert git(served, "rev-parse", "HEAD~1") == head
    assert git(served, "status", "--porcelain") == ""
    author, subject, body = git(served, "log", "-1", "--format=%an%x00%s%x00%b").split("\0")
    assert author == "person:clerk"
    assert subject == f"Create key {made['id']} of vp-new: deploy bot, until {made['expires_at'][:10]}"
    assert "CI needs it" in body
    store = b"".join(path.read_bytes() for path in served.state.glob("store.sqlite*"))
    assert secret.encode() not in store
    assert secret not in served.log
    assert secret not in git(served, "log", "-p")
    (event,) = events(served, "key_created")
    assert (event["orchestrator"], event["data"]["key"]) == ("vp-new", made["id"])
    assert (event["data"]["commit"], event["data"]["reason"]) == (made["commit"], "CI needs it")
    assert served.declared[event["actor"]]["owner"] == "person:clerk"


def test_there_is_one_key_unless_it_is_rotated(served: ControlPlane) -> None:
    """409 while one is active; none of another orchestrator's counts, nor one that is revoked."""
    made = create(served)
    refused = served.ask("POST", "/api/orchestrators/vp-new/api-key", json={})
    assert problem(refused) == (409, "key_exists")
    assert made["id"] in refused.json()["detail"]
    served.json("DELETE", "/api/vps/vp-new/api-key")
    assert create(served)["id"] != made["id"]


def test_a_rotation_changes_only_its_own_lines(served: ControlPlane) -> None:
    """The new key has the old one's scopes, name and length of life; the old one works for the overlap."""
    old = create(served, json={"name": "bot", "scopes": ["tasks:work"], "expires_in_days": 10})
    new = rotate(served, json={"overlap_s": 3600, "reason": "it is spring"})
    assert [status_with(served, one["key"]) for one in (old, new)] == [403, 403]  # good, but may not read tasks
    assert (new["previous"], new["scopes"]) == ({"id": old["id"]}, ["tasks:work"])
    entries = declared(served)
    assert entries[new["id"]]["name"] == "bot"
    life = [_at(entries[one["id"]], "expires") - _at(entries[one["id"]], "created") for one in (old, new)]
    assert life[0] == life[1]
    ends = datetime.fromisoformat(new["previous_revoked_at"])
    assert timedelta(seconds=3590) < ends - datetime.now(UTC) <= timedelta(seconds=3600)
    assert _at(entries[old["id"]], "revoked") == ends
    changed = [line for line in git(served, "show", "--format=", "-U0").splitlines() if re.match(r"[-+][^-+]", line)]
    assert all(old["id"] in line or new["id"] in line or line.startswith("+ ") for line in changed), changed
    assert git(served, "log", "-1", "--format=%s").startswith(f"Rotate key {old['id']} of vp-new to {new['id']}")
    (event,) = events(served, "key_rotated")
    assert (event["data"]["key"], event["data"]["previous"]) == (new["id"], {"id": old["id"]})


def _at(entry: dict[str, Any], field: str) -> datetime:
    """A time of an entry, which the YAML parser may have read as one."""
    at = datetime.fromisoformat(str(entry[field]))
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def test_without_overlap_the_old_key_ends_at_once(served: ControlPlane) -> None:
    """And so does one that was ending, later."""
    first = create(served)
    second = rotate(served, json={"overlap_s": 3600})
    third = rotate(served)
    assert [status_with(served, one["key"]) for one in (first, second, third)] == [401, 401, 200]
    assert third["previous"] == {"id": second["id"]}
    assert [reason_of(served, one["key"]) for one in (first, second, third)] == ["revoked", "revoked", None]


def test_what_has_no_key_can_not_be_rotated_or_revoked(served: ControlPlane) -> None:
    """404, as for an orchestrator that is not there."""
    head = git(served, "rev-parse", "HEAD")
    for method, path in (("POST", "/api/vps/vp-new/api-key/rotate"), ("DELETE", "/api/vps/vp-new/api-key")):
        assert problem(served.ask(method, path)) == (404, "not_found")
        assert problem(served.ask(method, path.replace("vp-new", "vp-none"))) == (404, "not_found")
    assert problem(served.ask("POST", "/api/vps/vp-none/api-key")) == (404, "not_found")
    assert git(served, "rev-parse", "HEAD") == head


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("", {"scopes": ["tasks:all"]}, "scopes[0]"),
        ("", {"scopes": []}, "scopes"),
        ("", {"expires_in_days": 0}, "expires_in_days"),
        ("", {"name": "a\0b"}, "name"),
        ("", {"owner": "vp-b"}, "owner"),
        ("/rotate", {"overlap_s": 604_801}, "overlap_s"),
        ("/rotate", {"overlap_s": -1}, "overlap_s"),
        ("/rotate", {"overlap_s": "1"}, "overlap_s"),
    ],
)
def test_what_is_wrong_is_named(shared: ControlPlane, path: str, body: dict[str, Any], field: str) -> None:
    """By its field."""
    answer = shared.ask("POST", f"/api/vps/vp-a/api-key{path}", json=body)
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]


def test_a_key_gives_what_it_has(served: ControlPlane) -> None:
    """Neither a new key nor a rotated one has a scope that its maker lacks; admin gives all."""
    refused = served.ask("POST", "/api/vps/vp-new/api-key", key="keys:write", json={"scopes": ["tasks:read", "admin"]})
    assert problem(refused) == (403, "missing_scope")
    assert "admin" in refused.json()["detail"]
    strong = create(served, json={"scopes": ["fleet:write"]})
    assert problem(served.ask("POST", "/api/vps/vp-new/api-key/rotate", key="keys:write")) == (403, "missing_scope")
    assert status_with(served, strong["key"]) == 403
    assert served.json("DELETE", "/api/vps/vp-new/api-key", key="keys:write")["revoked"] == [strong["id"]]


def test_an_orchestrators_key_makes_keys_for_it_alone(served: ControlPlane) -> None:
    """Its own it may rotate; it can't ask even whether another has one."""
    for vp in ("vp-b", "vp-new", "vp-none"):
        assert problem(served.ask("POST", f"/api/vps/{vp}/api-key", key="vp-a:keys")) == (403, "forbidden")
    new = rotate(served, "vp-a", key="vp-a:keys", json={"overlap_s": 60})
    assert status_with(served, new["key"]) == 200
    assert git(served, "log", "-1", "--format=%an") == "vp-a"


def test_a_revocation_ends_everything_that_goes_on_with_the_key(served: ControlPlane) -> None:
    """The daemon's link, a long poll, a stream of events, and the next request; then the files say it, in a commit."""
    made = create(served, json={"scopes": ["tasks:work", "tasks:read", "fleet:read"]})
    headers = {"Authorization": f"Bearer {made['key']}"}

    def polled() -> tuple[int, str]:
        answer = httpx.post(f"{served.url}/api/tasks/poll", headers=headers, json={"wait": 30}, timeout=40)
        return problem(answer)

    def followed() -> list[str]:
        with httpx.stream("GET", f"{served.url}/api/events", headers=headers, timeout=40) as answer:
            return list(answer.iter_lines())  # ends without an error

    async def linked() -> tuple[int, str]:
        async with dialled(served, made["key"]) as peer:
            await peer.ask(hello("vp-new"), wire.Welcome)
            return await peer.closed()

    with ThreadPoolExecutor(3) as pool:
        going = [pool.submit(one) for one in (polled, followed, lambda: asyncio.run(linked()))]
        until(lambda: served.json("GET", "/api/vps/vp-new")["status"] == "ONLINE", "the daemon is there")
        time.sleep(0.3)  # the poll and the stream are, too; were they not, they would be refused
        began = time.monotonic()
        told = served.json("DELETE", "/api/vps/vp-new/api-key?reason=leaked")
        poll, stream, closed = (one.result(timeout=10) for one in going)
    assert time.monotonic() - began < 5
    assert poll == (401, "unauthorized")
    assert stream[0].startswith("retry:")
    assert closed == (1008, "its key is revoked")
    assert (told["revoked"], told["committed"], told["problem"]) == ([made["id"]], True, None)
    assert told["commit"] == git(served, "rev-parse", "HEAD")
    assert git(served, "log", "-1", "--format=%s") == f"Revoke key {made['id']} of vp-new"
    assert "leaked" in git(served, "log", "-1", "--format=%b")
    assert declared(served)[made["id"]]["revoked"]
    assert (status_with(served, made["key"]), reason_of(served, made["key"])) == (401, "revoked")
    assert problem(served.ask("DELETE", "/api/vps/vp-new/api-key")) == (404, "not_found")
    (event,) = events(served, "key_revoked")
    assert (event["orchestrator"], event["data"]["key"], event["data"]["reason"]) == ("vp-new", made["id"], "leaked")

    async def again() -> None:
        async with dialled(served, made["key"]):
            raise AssertionError("the door is open")

    with pytest.raises(InvalidStatus):
        asyncio.run(again())


def test_who_revokes_its_own_key_is_answered(served: ControlPlane) -> None:
    """It is good to the end of the request, and no further."""
    told = served.json("DELETE", "/api/vps/vp-a/api-key", key="vp-a:keys")
    assert len(told["revoked"]) == 2  # all that it had
    assert git(served, "log", "-1", "--format=%s").startswith("Revoke 2 keys of vp-a: k-")
    assert served.ask("GET", "/api/tasks", key="vp-a:keys").status_code == 401
    assert served.ask("GET", "/api/tasks", key="vp-a").status_code == 401


def test_a_revocation_that_can_not_be_committed_stands(served: ControlPlane) -> None:
    """Over a restart, and against an older file; once the work tree is clean, asking again commits it."""
    made = create(served)
    file = served.home / "fleet.yaml"
    clean = file.read_text()
    file.write_text(clean + "# a person is at it\n")
    told = served.json("DELETE", "/api/vps/vp-new/api-key")
    assert (told["revoked"], told["committed"], told["commit"]) == ([made["id"]], False, None)
    assert "fleet.yaml" in told["problem"]
    assert status_with(served, made["key"]) == 401
    assert file.read_text() == clean + "# a person is at it\n"
    served.stop()
    served.start()
    assert (status_with(served, made["key"]), reason_of(served, made["key"])) == (401, "revoked")
    assert problem(served.ask("DELETE", "/api/vps/vp-new/api-key")) == (404, "not_found")
    assert problem(served.ask("POST", "/api/vps/vp-new/api-key")) == (409, "dirty_work_tree")
    file.write_text(clean)
    again = served.json("DELETE", "/api/vps/vp-new/api-key")
    assert (again["revoked"], again["committed"], again["problem"]) == ([made["id"]], True, None)
    assert declared(served)[made["id"]]["revoked"]
    git(served, "revert", "--no-edit", "HEAD")
    served.publish()
    time.sleep(1)  # the reverted file is in force
    assert status_with(served, made["key"]) == 401


def test_without_git_a_key_is_revoked_and_none_is_made(shared: ControlPlane) -> None:
    """What needs a commit is refused with the cure; what must not wait for one does not."""
    assert problem(shared.ask("POST", "/api/vps/vp-b/api-key/rotate")) == (409, "no_git")
    assert shared.ask("GET", "/api/tasks", key="vp-b").status_code == 200
    told = shared.json("DELETE", "/api/vps/vp-b/api-key")
    assert (len(told["revoked"]), told["committed"]) == (1, False)
    assert "git" in told["problem"]
    assert shared.ask("GET", "/api/tasks", key="vp-b").status_code == 401
    assert problem(shared.ask("DELETE", "/api/vps/vp-b/api-key")) == (404, "not_found")
    assert problem(shared.ask("POST", "/api/vps/vp-b/api-key")) == (409, "no_git")


def _writes(plane: ControlPlane, how: str) -> None:
    file = plane.home / "fleet.yaml"
    file.write_text(file.read_text().replace("control_plane: {", f"control_plane: {{writes: {how}, "))
    git(plane, "commit", "-q", "-a", "-m", f"Let the API {how}")


def test_a_proposed_key_works_once_it_is_merged(plane: ControlPlane) -> None:
    """202 with a branch; nothing in force changes but what is revoked."""
    _writes(plane, "propose")
    plane.start()
    head = git(plane, "rev-parse", "HEAD")
    made = create(plane, code=202)
    assert (made["in_force"], status_with(plane, made["key"])) == (False, 401)
    assert git(plane, "rev-parse", "HEAD") == head
    assert made["id"] in made["diff"]
    git(plane, "merge", "-q", "--ff-only", made["branch"])
    plane.publish()
    assert status_with(plane, made["key"]) == 200
    told = plane.json("DELETE", "/api/vps/vp-new/api-key")
    assert (told["revoked"], told["committed"], status_with(plane, made["key"])) == ([made["id"]], False, 401)
    assert told["branch"] in told["problem"]
    assert problem(plane.ask("DELETE", "/api/vps/vp-new/api-key")) == (404, "not_found")
    git(plane, "merge", "-q", "--ff-only", told["branch"])
    assert declared(plane)[made["id"]]["revoked"]


def test_where_writes_are_refused_only_a_revocation_goes_through(plane: ControlPlane) -> None:
    """And the files stay as they are."""
    _writes(plane, "refuse")
    plane.start()
    for path in ("/api/vps/vp-new/api-key", "/api/vps/vp-b/api-key/rotate"):
        assert problem(plane.ask("POST", path)) == (409, "writes_refused")
    told = plane.json("DELETE", "/api/vps/vp-b/api-key")
    assert (told["committed"], plane.ask("GET", "/api/tasks", key="vp-b").status_code) == (False, 401)
    assert git(plane, "status", "--porcelain") == ""


def test_the_same_request_gets_the_same_key_again(served: ControlPlane) -> None:
    """Though its text is kept nowhere; another caller or another body is another request."""
    same = {"headers": {"Idempotency-Key": "one"}, "json": {"name": "bot"}}
    first = create(served, key="keys:write", **same)
    assert create(served, key="keys:write", **same) == first
    other = {**same, "json": {"name": "other"}}
    refused = served.ask("POST", "/api/vps/vp-new/api-key", key="keys:write", **other)
    assert problem(refused) == (409, "idempotency_key_reused")
    assert problem(served.ask("POST", "/api/vps/vp-new/api-key", key="admin", **same)) == (409, "key_exists")
    turned = rotate(served, headers={"Idempotency-Key": "two"})
    assert rotate(served, headers={"Idempotency-Key": "two"}) == turned
    assert status_with(served, turned["key"]) == 200
    ended = served.json("DELETE", "/api/vps/vp-new/api-key", headers={"Idempotency-Key": "three"})
    assert served.json("DELETE", "/api/vps/vp-new/api-key", headers={"Idempotency-Key": "three"}) == ended
    store = b"".join(path.read_bytes() for path in served.state.glob("store.sqlite*"))
    for made in (first, turned):
        _, secret = keys.parse(made["key"]) or ("", "")
        assert secret.encode() not in store
    assert len(git(served, "log", "--format=%h").splitlines()) == 4


def test_of_many_at_once_one_makes_a_key(served: ControlPlane) -> None:
    """The others are told that there is one; with one Idempotency-Key all get the same."""

    def ask(number: int) -> tuple[int, str]:
        answer = served.ask("POST", "/api/vps/vp-new/api-key")
        return answer.status_code, answer.json().get("code", str(number))

    with ThreadPoolExecutor(6) as pool:
        answers = sorted(pool.map(ask, range(6)))
    assert [status for status, _ in answers] == [201] + [409] * 5
    assert {code for _, code in answers[1:]} == {"key_exists"}
    served.json("DELETE", "/api/vps/vp-new/api-key")
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: create(served, headers={"Idempotency-Key": "same"}), range(6)))
    assert len({one["key"] for one in made}) == 1


def test_a_key_is_good_all_the_while_it_is_rotated(served: ControlPlane) -> None:
    """Whoever validates meanwhile never sees neither key work."""
    chain = [create(served)]
    stop, seen = asyncio.Event(), list[str | None]()

    def validate() -> None:
        while not stop.is_set():
            text = chain[-1]["key"]
            answer = served.ask("POST", "/api/vps/validate", key=None, json={"api_key": text})
            if answer.status_code == 200:
                seen.append(None if answer.json()["valid"] else answer.json()["reason"])

    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(validate)
        for _ in range(4):
            chain += [rotate(served, json={"overlap_s": 60})]
        stop.set()
        checking.result(timeout=20)
    assert seen
    assert set(seen) == {None}
    assert all(status_with(served, one["key"]) == 200 for one in chain)


@pytest.mark.parametrize("when", ["at the commit", "at any moment", "at any moment again"])
def test_a_control_plane_that_is_killed_loses_no_key(plane: ControlPlane, when: str) -> None:
    """Asked again, the same request gets a key that works, and there is one of it."""
    plane.start()
    head, asked = git(plane, "rev-parse", "HEAD"), {"headers": {"Idempotency-Key": "one"}}
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(plane.ask, "POST", "/api/vps/vp-new/api-key", **asked)
        if when == "at the commit":
            branch = plane.home / ".git/refs/heads/main"
            until(lambda: branch.read_text().strip() not in ("", head), "it is committed")
        else:
            time.sleep(random.uniform(0.02, 1.0))  # noqa: S311 - any moment will do
        plane.stop(signal.SIGKILL)
        with suppress(httpx.TransportError):
            asking.result(timeout=20)
    plane.start()
    made = create(plane, **asked)
    assert status_with(plane, made["key"]) == 200
    mine = [one for one in declared(plane).values() if one["owner"] == "vp-new" and not one.get("revoked")]
    assert len(mine) == 1
    assert git(plane, "status", "--porcelain") == ""
    assert git(plane, "rev-parse", "HEAD~1") == head


def test_a_rotation_that_was_cut_off_is_told_again(plane: ControlPlane) -> None:
    """With the key that it made; the old one is as revoked as it would have been."""
    plane.start()
    old, asked = create(plane), {"headers": {"Idempotency-Key": "one"}}
    branch = plane.home / ".git/refs/heads/main"
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(plane.ask, "POST", "/api/vps/vp-new/api-key/rotate", **asked)
        until(lambda: branch.read_text().strip() not in ("", old["commit"]), "it is committed")
        plane.stop(signal.SIGKILL)
        with suppress(httpx.TransportError):
            asking.result(timeout=20)
    plane.start()
    new = rotate(plane, **asked)
    assert (new["previous"], new["scopes"]) == ({"id": old["id"]}, old["scopes"])
    assert datetime.fromisoformat(new["previous_revoked_at"]) <= datetime.now(UTC)
    assert [status_with(plane, one["key"]) for one in (old, new)] == [401, 200]
    assert [event["data"]["key"] for event in events(plane, "key_revoked")] == [old["id"]]
    assert rotate(plane, **asked) == new


def test_keys_are_listed_with_their_last_use(served: ControlPlane) -> None:
    """In pages, each once, without hashes; what was revoked in the store alone is revoked."""
    listed, cursor, pages = [], "", 0
    while True:
        page = served.json("GET", f"/api/keys?limit=3{cursor}")
        listed += page["data"]
        pages += 1
        if page["pagination"]["next_cursor"] is None:
            break
        cursor = f"&cursor={page['pagination']['next_cursor']}"
    assert pages > 1
    assert {one["id"] for one in listed} == set(served.declared)
    assert len(listed) == len(served.declared) == page["pagination"]["total"]
    assert [(one["owner"], one["id"]) for one in listed] == sorted((one["owner"], one["id"]) for one in listed)
    assert "sha256" not in str(listed)
    assert not any(one["sha256"] in str(listed) for one in served.declared.values())
    mine, *_ = served.json("GET", "/api/keys?owner=vp-b")["data"]
    assert (mine["state"], mine["last_used_at"]) == ("active", None)
    served.ask("GET", "/api/tasks", key="vp-b")
    mine, *_ = served.json("GET", "/api/keys?owner=vp-b")["data"]
    assert datetime.now(UTC) - datetime.fromisoformat(mine["last_used_at"]) < timedelta(seconds=10)
    assert mine["last_used_from"] == "127.0.0.1"
    served.json("DELETE", "/api/vps/vp-b/api-key")
    mine, *_ = served.json("GET", "/api/keys?owner=vp-b")["data"]
    assert mine["state"] == "revoked"
    assert mine["revoked"]
    served.stop()  # writes what was noted
    command = [sys.executable, "-m", "orchestrator_fleet.cli.main", "key", "list", "--json"]
    told = json.loads(subprocess.run(command, cwd=served.home, check=True, capture_output=True, timeout=30).stdout)
    (shown,) = [one for one in told["data"] if one["id"] == mine["id"]]
    assert (shown["state"], shown["last_used_at"]) == ("revoked", mine["last_used_at"])


@pytest.mark.parametrize("cursor", ["x", "k-1.a", "k-00000000", "k-00000000.", "%00", "k-0000000g.x"])
def test_a_cursor_of_another_list_is_refused(shared: ControlPlane, cursor: str) -> None:
    """422 on `cursor`."""
    answer = shared.ask("GET", f"/api/keys?cursor={cursor}")
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "cursor")


@pytest.fixture
def included(control_plane: ControlPlane) -> ControlPlane:
    """A fleet whose keys stand in a file that git does not keep."""
    (control_plane.home / "fleet.d").mkdir()
    file = control_plane.home / "fleet.yaml"
    text, _, rest = file.read_text().partition("keys:\n")
    kept, _, routing = rest.partition("routing:\n")
    file.write_text(text.replace("fleet: test\n", "fleet: test\ninclude: [fleet.d/*.yaml]\n") + "routing:\n" + routing)
    (control_plane.home / "fleet.d/local.yaml").write_text(f"keys:\n{kept}")
    in_git(control_plane)
    git(control_plane, "rm", "-q", "--cached", "fleet.d/local.yaml")
    with (control_plane.home / ".gitignore").open("a") as ignored:
        ignored.write("fleet.d/local.yaml\n")
    git(control_plane, "add", ".gitignore")
    git(control_plane, "commit", "-q", "-m", "Keep this clone's keys out of git")
    return control_plane.start()


def test_a_key_of_this_clone_alone_is_revoked_all_the_same(included: ControlPlane) -> None:
    """The file that is not in git is left to people, who are told."""
    local = Path(included.home / "fleet.d/local.yaml").read_text()
    told = included.json("DELETE", "/api/vps/vp-b/api-key")
    assert (told["committed"], included.ask("GET", "/api/tasks", key="vp-b").status_code) == (False, 401)
    assert "fleet.d/local.yaml" in told["problem"]
    assert Path(included.home / "fleet.d/local.yaml").read_text() == local
