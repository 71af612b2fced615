"""`fleet vp say`, `inbox` and `status` against a real control plane."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Run, run_in

sys.path.insert(0, str(Path(__file__).parent.parent / "api"))

from serving import ControlPlane


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """It runs; nobody's daemon is there."""
    running = ControlPlane(tmp_path_factory.mktemp("talk") / "home").start()
    yield running
    running.close()


@pytest.fixture
def fleet(plane: ControlPlane) -> Run:
    """`fleet vp ...` of that control plane, with the admin's key."""
    run = run_in(plane.home)
    return lambda *args, **given: run("vp", *args, FLEET_URL=plane.url, FLEET_KEY=plane.keys["admin"], **given)


def test_what_is_said_is_in_the_others_inbox(fleet: Run) -> None:
    """One line of it for people, all of it for programs; control characters stay away from terminals."""
    said = fleet("say", "vp-a", "vp-b", "first\nof \x1b[31mtwo").stdout
    assert said.startswith("msg-")
    assert "  waiting  vp-a to vp-b in cnv-" in said
    talk = said.split()[-1]
    again = json.loads(fleet("say", "vp-a", "vp-b", "second", "--thread", talk, "--json").stdout)
    assert again["conversation"]["id"] == talk
    told = fleet("inbox", "vp-b").stdout.splitlines()
    assert [line.split()[0] for line in told] == ["notice", said.split()[0], again["message"]["id"]]
    assert told[1].endswith("message  vp-a  -     first of [31mtwo")
    listed = json.loads(fleet("inbox", "vp-b", "--limit", "1", "--json").stdout)
    assert ([one["id"] for one in listed["data"]], listed["total"]) == ([said.split()[0]], 2)
    assert "1 of 2" in fleet("inbox", "vp-b", "--limit", "1").stderr


def test_what_is_said_to_people_is_sent(fleet: Run) -> None:
    """By either name of a person."""
    assert "  sent  vp-a to human:me in " in fleet("say", "vp-a", "person:me", "look").stdout


def test_a_refusal_says_which_field(fleet: Run) -> None:
    """In the control plane's own words, with exit code 1."""
    refused = fleet("say", "vp-a", "vp-none", "hello", code=1).stderr
    assert "to: there is no orchestrator vp-none; a person is human:vp-none, a channel #vp-none" in refused
    fleet("say", "vp-a", "vp-b", "ping")
    assert "409 the same was said between vp-a and vp-b" in fleet("say", "vp-a", "vp-b", "ping", code=1).stderr
    assert "wanted an orchestrator's name" in fleet("inbox", "../x", code=64).stderr


def test_a_status_is_shown_and_updates_are_posted(plane: ControlPlane, fleet: Run) -> None:
    """With what runs; the options of an update need its text."""
    task = plane.add("runs", orchestrator="vp-a")["id"]
    plane.poll("vp-a", lease_s=600)
    posted = fleet("status", "vp-a", "--post", "half way", "--kind", "progress", "--task", task).stdout
    assert posted.startswith("upd-")
    assert posted.endswith("  progress  half way\n")
    shown = fleet("status", "vp-a").stdout.splitlines()
    assert shown[0] == "vp-a  OFFLINE: its daemon has never connected"
    assert shown[1].startswith(f"runs {task} since ")
    assert shown[-1].endswith(f"progress  {task}  half way")
    answer = json.loads(fleet("status", "vp-a", "--json").stdout)
    assert [one["message"] for one in answer["updates"]] == ["half way"]
    assert (
        "--kind is of an update; give its text with --post" in fleet("status", "vp-a", "--kind", "info", code=64).stderr
    )
