"""Bundles: what stands in them, that they name no place, and that they are the same everywhere."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
from builders import command, fleet, fleets, full_fleet
from hypothesis import given, settings

from orchestrator_fleet.render import program
from orchestrator_fleet.render.assets import travelling
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.wire.documents import ControlDoc, OrchestratorDoc, RunnerDoc, sha256

DIGESTS = (
    "from builders import full_fleet; from orchestrator_fleet.render.fleet import render; d = render(full_fleet());"
)
PRINT = "import json; print(json.dumps([d.control.digest, *(b.digest for b in d.machines.values())]))"


def test_a_machines_bundle_has_these_files() -> None:
    """One program and three documents an orchestrator, the files its runner names, supervisord's own."""
    spec = fleet(machines=1, assets={"work.py": b"1", "lib/a.py": b"2", "other.py": b"3"})
    bundle = render(spec).machines["m1"]
    assert sorted(bundle.files) == [
        "assets/work.py",
        "orchestrators/vp-1/charter.md",
        "orchestrators/vp-1/orchestrator.json",
        "orchestrators/vp-1/settings.json",
        "programs/vp-1.conf",
        "supervisord.conf",
    ]
    assert bundle.digest == sha256(bundle.manifest_bytes)
    assert {path: sha256(data) for path, data in bundle.files.items()} == bundle.manifest.files


def test_digests_are_the_same_in_every_process() -> None:
    """Whatever the hash seed, the time zone and the locale."""
    outputs = set()
    for seed, zone in (("0", "UTC"), ("1234", "Asia/Tokyo")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS + PRINT], env=env, capture_output=True, text=True, timeout=60, check=True
        )
        outputs.add(done.stdout)
    here = render(full_fleet())
    assert [json.loads(output) for output in outputs] == [
        [here.control.digest, *(bundle.digest for bundle in here.machines.values())]
    ]


def test_the_order_of_the_file_does_not_change_a_byte() -> None:
    """Machines and orchestrators are a mapping, not a list."""
    one = fleet(orchestrators={"vp-1": {}, "vp-2": {}, "vp-3": {}})
    other = fleet(machines={"m2": {}, "m1": {}}, orchestrators={"vp-3": {}, "vp-2": {}, "vp-1": {}})
    assert render(one) == render(other)


@settings(max_examples=50, deadline=None)
@given(fleets(protect=True))
def test_equal_specs_are_equal_bundles_and_all_is_said_once(spec) -> None:
    """Rendering has no memory, everybody is placed once, and the control plane knows where."""
    desired = render(spec)
    assert desired == render(spec)
    placed = [(name, machine) for machine, bundle in desired.machines.items() for name in bundle.manifest.programs]
    assert sorted(name for name, _ in placed) == sorted(spec.file.orchestrators)
    control = msgspec.json.decode(desired.control.files["control.json"], type=ControlDoc)
    assert control.placements == dict(placed)
    for name, machine in placed:
        files = desired.machines[machine].files
        doc = msgspec.json.decode(files[f"orchestrators/{name}/orchestrator.json"], type=OrchestratorDoc)
        assert (doc.name, doc.machine, doc.charter_version) == (name, machine, control.charters[name])
        assert doc.spec == control.spec["orchestrators"][name]
        assert {path: sha256(files[f"assets/{path}"]) for path in doc.assets} == doc.assets


def test_argv_that_names_a_file_that_travels_is_relocated() -> None:
    """Other words stay as they are, also when they look like paths."""
    runner = command("python3", "./lib/../lib/a.py", "lib/a.py", "/bin/sh", "nothing.py")
    spec = fleet(machines=1, orchestrators={"vp-1": {"runner": runner}}, assets={"lib/a.py": b""})
    document = render(spec).machines["m1"].files["orchestrators/vp-1/orchestrator.json"]
    doc = msgspec.json.decode(document, type=OrchestratorDoc)
    assert doc.runner.command == ("python3", "./lib/../lib/a.py", "{assets}/lib/a.py", "/bin/sh", "nothing.py")


def test_globs_take_in_files_and_folders() -> None:
    """`*` stays within a folder, `**` does not, a folder means all in it."""
    assets = ["a.py", "lib/a.py", "lib/deep/b.py", "docs/x.md"]
    taken = {glob: travelling(argv=[], globs=[glob], assets=assets) for glob in ("*.py", "lib/*.py", "lib", "**/*.py")}
    assert taken == {
        "*.py": ("a.py",),
        "lib/*.py": ("lib/a.py",),
        "lib": ("lib/a.py", "lib/deep/b.py"),
        "**/*.py": ("a.py", "lib/a.py", "lib/deep/b.py"),
    }
    assert travelling(argv=["./a.py", "b.py"], globs=[], assets=assets) == ("a.py",)


def test_supervisords_files_name_no_place() -> None:
    """All paths come from the environment of who starts it; sessions are left alone when a daemon stops."""
    runner = RunnerDoc(type="command", command=("true",))
    parser = configparser.RawConfigParser()
    parser.read_string(program.conf(name="vp-1", program=program.digest(name="vp-1", runner=runner)))
    section = dict(parser["program:vp-1"])
    assert section["command"] == '"%(ENV_FLEET_PYTHON)s" -m orchestrator_fleet.daemon vp-1'
    assert section["environment"] == f'FLEET_PROGRAM="{program.digest(name="vp-1", runner=runner)}"'
    assert (section["stopasgroup"], section["killasgroup"], section["startsecs"]) == ("false", "false", "0")
    parser.read_string(program.SUPERVISORD)
    assert parser["unix_http_server"]["file"] == "%(ENV_FLEET_SOCKET)s"
    paths = [line for line in program.SUPERVISORD.splitlines() if "=/" in line]
    assert paths == []


def test_percent_signs_are_doubled_for_supervisord(monkeypatch) -> None:
    """Supervisord expands what it reads; a version may hold anything."""
    monkeypatch.setattr(program, "__version__", "1%0")
    assert program.conf(name="vp-1", program="d").startswith("; orchestrator_fleet 1%%0\n")


def test_a_runtime_of_another_version_and_another_runner_are_another_program(monkeypatch) -> None:
    """The digest covers what must restart a daemon, and who it is."""
    runner = RunnerDoc(type="command", command=("true",))
    digests = {
        program.digest(name="vp-1", runner=runner),
        program.digest(name="vp-2", runner=runner),
        program.digest(name="vp-1", runner=RunnerDoc(type="command", command=("false",))),
        program.digest(name="vp-1", runner=RunnerDoc(type="command", command=("true",), secrets={"A": "env:A"})),
    }
    monkeypatch.setattr(program, "__version__", "99.0")
    digests.add(program.digest(name="vp-1", runner=runner))
    assert len(digests) == 5


def test_those_that_are_protected_stand_in_the_manifest() -> None:
    """So that a plan knows it without the spec that said so."""
    spec = fleet(machines=1, orchestrators={"vp-1": {"protect": True}, "vp-2": {}})
    assert render(spec).machines["m1"].manifest.protected == ("vp-1",)
