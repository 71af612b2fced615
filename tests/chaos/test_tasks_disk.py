"""A disk that is full, and a database file that is damaged: said plainly, nothing half done, no answer taken back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from living_fleet import until
from serving import ControlPlane

DISK_MB = 24
TASKS = 300
REFUSED_S = 30.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root only")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def on_small_disk(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ControlPlane, Path]]:
    """A control plane whose state, and nothing else, stands on the small disk."""
    monkeypatch.setenv("FLEET_STATE", str(small_disk / "state"))
    plane = ControlPlane(tmp_path / "home").start()
    yield plane, small_disk / "filler"
    plane.close()


def fill(filler: Path) -> None:
    """Leave no room at all."""
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_a_full_disk_refuses_what_it_cannot_keep_and_loses_nothing_it_kept(
    on_small_disk: tuple[ControlPlane, Path],
) -> None:
    """507 `store_full` for writes; reads go on; room made, all goes on by itself; each answer was the truth."""
    plane, filler = on_small_disk
    kept = [plane.add(f"before {n}", orchestrator="vp-a")["id"] for n in range(5)]
    running = plane.poll("vp-a", limit=1, lease_s=600)[0]
    fill(filler)
    refused: list[Any] = []
    for number in range(200):
        answer = plane.ask(
            "POST",
            "/api/tasks",
            json={"title": f"full {number}", "orchestrator": "vp-a", "description": "x" * 50_000},
            headers={"Idempotency-Key": f"full-{number}"},
        )
        if answer.status_code == 201:
            kept.append(answer.json()["id"])
            fill(filler)
            continue
        refused.append((number, answer))
        if len(refused) == 3:
            break
    assert len(refused) == 3, "the disk was never full"
    for _, answer in refused:
        assert answer.status_code == 507, answer.text
        assert answer.json()["code"] == "store_full"
        assert answer.headers["Content-Type"].startswith("application/problem+json")
    done = {"token": running["lease"]["token"], "result": "y" * 200_000}
    report = plane.ask("POST", f"/api/tasks/{running['task']['id']}/complete", json=done)
    assert report.status_code in (200, 507), report.text
    listed = plane.json("GET", "/api/tasks?limit=100&sort=created_at")
    assert [task["id"] for task in listed["data"]] == kept, "reads go on, and tell of what was answered alone"
    assert plane.ask("GET", "/healthz", key=None).status_code == 200

    filler.unlink()
    number = refused[0][0]
    body = {"title": f"full {number}", "orchestrator": "vp-a", "description": "x" * 50_000}

    def again() -> str:
        answer = plane.ask("POST", "/api/tasks", json=body, headers={"Idempotency-Key": f"full-{number}"})
        assert answer.status_code in (201, 507), answer.text
        return answer.json()["id"] if answer.status_code == 201 else ""

    kept.append(until(again, "it writes again", 15))
    assert plane.json("POST", f"/api/tasks/{running['task']['id']}/complete", json=done)["status"] == "DONE"
    assert plane.stop() == 0
    plane.start()
    listed = plane.json("GET", "/api/tasks?limit=100&sort=created_at")["data"]
    assert [task["id"] for task in listed] == kept
    for task in kept:
        kinds = [event["kind"] for event in plane.json("GET", f"/api/tasks/{task}/events?limit=100")["data"]]
        assert kinds[0] == "task_created"
        assert kinds.count("task_created") == 1
    until(lambda: _created_in_history(plane) == len(kept), "history has them all, once", 15)


def _created_in_history(plane: ControlPlane) -> int:
    query = {"query": "select count(*) from events where kind = 'task_created'"}
    answer = plane.ask("POST", "/api/sql", json=query)
    return int(answer.json()["rows"][0][0]) if answer.status_code == 200 else -1


def test_a_store_that_fills_up_while_many_write_answers_each_of_them_the_truth(
    on_small_disk: tuple[ControlPlane, Path],
) -> None:
    """Writers go on until nothing fits any more: what got a 201 is there, what did not is not."""
    plane, filler = on_small_disk
    filler.write_bytes(b"\0" * (DISK_MB - 12 << 20))
    answers: dict[str, int] = {}
    for number in range(400):
        body = {"title": f"t{number}", "orchestrator": "vp-a", "description": "z" * 90_000}
        answers[body["title"]] = status = plane.ask("POST", "/api/tasks", json=body).status_code
        assert status in (201, 507)
        if list(answers.values()).count(507) == 5:
            break
    else:
        raise AssertionError("the disk was never full")
    filler.unlink()
    until(lambda: plane.ask("POST", "/api/tasks", json={"title": "room"}).status_code == 201, "it writes again", 15)
    found: set[str] = set()
    cursor = ""
    while cursor is not None:
        page = plane.json("GET", f"/api/tasks?limit=100&sort=created_at{cursor and '&cursor=' + cursor}")
        found |= {task["title"] for task in page["data"]}
        cursor = page["pagination"]["next_cursor"]
    assert found - {"room"} == {title for title, status in answers.items() if status == 201}


def flipped(file: Path) -> None:
    """A few kilobytes in the middle are other bytes."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 2 - 100)
        old = opened.read(6000)
        opened.seek(size // 2 - 100)
        opened.write(bytes(byte ^ 0xA5 for byte in old))


def truncated(file: Path) -> None:
    """The last third is gone."""
    os.truncate(file, file.stat().st_size * 2 // 3)


def wrong_header(file: Path) -> None:
    """It begins like something else."""
    with file.open("r+b") as opened:
        opened.write(b"PK\x03\x04 not a database")


def no_database(file: Path) -> None:
    """Text."""
    file.write_text("this was a database once\n" * 1000)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store file with some hundred tasks in it, cleanly closed."""
    plane = ControlPlane(tmp_path_factory.mktemp("filled") / "home").start()
    try:
        for _ in range(TASKS // 100):
            ids = [plane.add(f"t{n}", orchestrator="vp-a", description="d" * 2000)["id"] for n in range(25)]
            for task in ids[:5]:
                plane.json("POST", f"/api/tasks/{task}/cancel")
        assert plane.stop() == 0
        content = (plane.state / "store.sqlite").read_bytes()
        wal = plane.state / "store.sqlite-wal"
        assert not wal.exists() or wal.stat().st_size == 0
        return content
    finally:
        plane.close()


@pytest.mark.parametrize("damage", [flipped, truncated, wrong_header, no_database], ids=lambda one: one.__name__)
def test_a_damaged_store_is_not_served(tmp_path: Path, filled: bytes, damage: Callable[[Path], None]) -> None:
    """`fleet serve` ends with exit code 1 and the cure, and leaves the file as it is for whoever looks at it."""
    plane = ControlPlane(tmp_path / "home")
    plane.state.mkdir(mode=0o700)
    file = plane.state / "store.sqlite"
    file.write_bytes(filled)
    damage(file)
    left = file.read_bytes()
    fleet = Path(sys.executable).with_name("fleet")
    process = subprocess.Popen(
        [fleet, "serve"], cwd=plane.home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=REFUSED_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it serves a damaged store: {process.communicate()[0]}") from None
    assert process.returncode == 1, said
    assert "store.sqlite" in said
    assert "fleet store restore" in said, said
    assert "Traceback" not in said
    assert file.read_bytes() == left


def test_an_undamaged_store_is_served(tmp_path: Path, filled: bytes) -> None:
    """The same file without the damage: so it is the damage that is refused."""
    plane = ControlPlane(tmp_path / "home")
    plane.state.mkdir(mode=0o700)
    (plane.state / "store.sqlite").write_bytes(filled)
    try:
        plane.start()
        assert plane.json("GET", "/api/tasks?limit=1")["pagination"]["total"] == TASKS // 100 * 25
    finally:
        plane.close()
