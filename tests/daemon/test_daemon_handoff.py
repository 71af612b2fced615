"""A real session is ended cleanly before its task changes hands, and what it wrote can be read by the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from living_daemon import NAME, SH, LivingMachine, until
from test_daemon_with_control_plane import Plane

from orchestrator_fleet import keys
from orchestrator_fleet.store.daemon_keys import register_daemon_keys

OTHER = "vp-other"
# Says when it was asked to end, takes its time to, and says that it has.
POLITE = """trap 'echo asked > ../../../asked; sleep 1; echo ended > ../../../ended; exit 0' TERM
echo so far; echo begun > ../../../begun; while :; do sleep 0.05; done"""
DEAF = "trap '' TERM; echo so far; echo begun > ../../../begun; while :; do sleep 0.05; done"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Plane]:
    """A control plane of two orchestrators."""
    plane = Plane(tmp_path / "fleet")
    file = plane.home / "fleet.yaml"
    runner = "runner: {type: command, command: [sh, -c, 'true']}"
    other = f"orchestrators:\n  {OTHER}: {{charter: charters/eng.md, discipline: others, {runner}}}\n"
    file.write_text(file.read_text().replace("orchestrators:\n", other))
    plane.start()
    yield plane
    plane.stop()


@pytest.fixture
def machine(tmp_path: Path, served: Plane) -> Iterator[LivingMachine]:
    """A machine whose daemon's key the control plane knows."""
    machine = LivingMachine(tmp_path / "m01", served.url)
    parsed = keys.parse(machine.key_file.read_text().strip())
    assert parsed is not None
    store = f"sqlite:///{served.home / '.fleet' / 'store.sqlite'}"
    register_daemon_keys(store, [(NAME, "m01", parsed[0], keys.digest(parsed[1]))])
    yield machine
    machine.close()


@pytest.mark.parametrize("script", [POLITE, DEAF], ids=["polite", "deaf"])
def test_the_session_is_gone_when_the_target_gets_the_task(served: Plane, machine: LivingMachine, script: str) -> None:
    """Asked to end first; killed when it does not. What it wrote until then is there by its reference."""
    machine.generation(command=(*SH, script))
    machine.online()
    task = served.http("POST", "/tasks", {"title": "long", "orchestrator": NAME})["id"]
    pid = machine.running(task)
    until((machine.root / "begun").exists, "the session works")
    until(lambda: served.http("GET", f"/tasks/{task}/log")["data"], "its output is kept")
    answer = httpx.post(
        f"{served.url}/api/vps/{NAME}/handoff",
        json={"task": task, "to": OTHER, "notes": "go on", "completion": 50},
        headers={"Authorization": f"Bearer {served.key.text}"},
        timeout=30,
    )
    assert pid not in machine.leftovers()
    one: dict[str, Any] = answer.json()
    assert (answer.status_code, one["state"], one["reason"]) == (200, "accepted", None), answer.text
    assert (machine.root / "ended").exists() is (script == POLITE)
    (claimed,) = served.http("POST", "/tasks/poll", {"orchestrator": OTHER})["data"]
    told = claimed["task"]["handoff"]
    assert (told["from"], told["notes"], told["completion"]) == (NAME, "go on", 50)
    assert (told["transcript"]["machine"], told["transcript"]["session"]) == ("m01", f"{task}.1")
    log = served.http("GET", told["transcript"]["log"].removeprefix("/api"))["data"]
    assert "so far" in "".join(piece["text"] for piece in log)
