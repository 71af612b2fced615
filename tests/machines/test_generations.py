"""Generations on a real disk: what is refused, what is mended, and what happens when it is full."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_fleet import Machine, control_only, end, local_machine, staging

from orchestrator_fleet.render.bundle import Bundle, bundle
from orchestrator_fleet.wire.documents import encode, sha256
from orchestrator_fleet.wire.machine import Stage, Switch


def control(files: dict[str, bytes], **more: dict[str, str]) -> Bundle:
    return bundle(target="control-plane", fleet="tiny", files=files, programs=more.get("programs", {}))


@pytest.mark.parametrize(
    "path", ["../x", "/etc/x", "a/../../x", "a//b", "a/./b", "", "a\0b", "manifest.json", "x" * 2000]
)
def test_a_path_that_leads_elsewhere_is_refused(machine: Machine, path: str) -> None:
    """Nothing is written outside the generation, or over its manifest."""
    manifest = encode({"target": "m1", "fleet": "tiny", "files": {path: sha256(b"x")}, "programs": {}, "protected": []})
    machine.lease()
    refusal = machine.refused(
        Stage(token=machine.token, digest=sha256(manifest), manifest=manifest, blobs={sha256(b"x"): b"x"})
    )
    assert "wanted a plain path inside the generation" in refusal.problem
    assert machine.look().generations == ()


def test_a_program_name_that_is_a_path_is_refused(machine: Machine) -> None:
    """Names become file names."""
    what = control({}, programs={"../x": "1"})
    machine.lease()
    assert "wanted one of lower case letters" in machine.refused(staging(what, machine.token)).problem


def test_a_file_and_a_folder_of_one_name_are_refused_and_nothing_is_left(machine: Machine) -> None:
    """The disk can't have both."""
    what = control({"a": b"1", "a/b": b"2"})
    machine.lease()
    assert machine.refused(staging(what, machine.token)).code == "failed"
    assert list(machine.layout.generations.iterdir()) == []


def test_changes_by_hand_are_seen_and_mended_by_staging_again(machine: Machine) -> None:
    """Edited, removed, replaced by a link or a folder, and added: all as the manifest says again."""
    what = control({"a/one": b"1", "a/two": b"2", "three": b"3", "four": b"4"})
    machine.bring(what)
    folder = machine.layout.generation(what.digest)
    (folder / "a/one").write_text("edited")
    (folder / "a/two").unlink()
    (folder / "three").unlink()
    (folder / "three").symlink_to("/etc/hostname")
    (folder / "four").unlink()
    (folder / "four").mkdir()
    (folder / "four/inner").write_text("x")
    (folder / "extra").write_text("x")
    seen = machine.look()
    assert seen.drifted == ("a/one", "three")
    assert seen.missing == ("a/two", "four")
    assert seen.foreign == ("extra", "four/inner")
    assert machine.refused(Switch(token=machine.token, digest=what.digest)).code == "not_staged"
    machine.stage(what)
    seen = machine.look(documents=True)
    assert (seen.drifted, seen.missing, seen.foreign) == ((), (), ())
    assert seen.documents == dict(what.files)


@pytest.mark.parametrize("content", [b"{}", b"", None])
def test_a_manifest_changed_by_hand_is_drift_and_mended(machine: Machine, content: bytes | None) -> None:
    """It is not believed: its own hash is the generation's name."""
    what = control({"one": b"1"})
    machine.bring(what)
    folder = machine.layout.generation(what.digest)
    (folder / "extra").write_text("x")
    if content is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_bytes(content)
    seen = machine.look()
    assert seen.manifest == b""
    assert seen.drifted + seen.missing == ("manifest.json",)
    machine.stage(what)
    seen = machine.look()
    assert seen.manifest == what.manifest_bytes
    assert seen.foreign == ()


def test_a_staging_that_broke_off_is_begun_anew(machine: Machine) -> None:
    """What it left is not taken for content, and goes with the next prune."""
    what = control({"one": b"1"})
    machine.lease()
    half = machine.layout.generations / f".staging-{what.digest}"
    half.mkdir()
    (half / "stale").write_text("x")
    machine.stage(what)
    assert sorted(p.name for p in machine.layout.generation(what.digest).iterdir()) == ["manifest.json", "one"]
    assert not half.exists()


def test_a_script_keeps_its_place_as_a_command(machine: Machine) -> None:
    """A file with a first line of its own can be run; no other can, and none is readable by others."""
    what = control({"assets/run": b"#!/bin/sh\n", "assets/data": b"x"})
    machine.bring(what)
    folder = machine.layout.generation(what.digest) / "assets"
    assert ((folder / "run").stat().st_mode & 0o777) == 0o700
    assert ((folder / "data").stat().st_mode & 0o777) == 0o600


def test_a_link_that_names_nothing_of_ours_counts_as_none(machine: Machine) -> None:
    """And is replaced by the next switch."""
    what = control_only()
    machine.bring(what)
    for target in ("generations/" + "0" * 64, "/etc", "generations/../generations/" + what.digest):
        machine.layout.current.unlink()
        machine.layout.current.symlink_to(target)
        assert machine.look().current is None
    machine.switch(what)
    assert machine.look().current == what.digest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False, timeout=10
    )
    if mounted.returncode != 0:
        message = "NOT TESTED: a full disk, as no file system can be mounted here (needs root)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=10)


def test_a_full_disk_refuses_cleanly_and_leaves_the_current_generation(small_disk: Path) -> None:
    """The reason is in the refusal, nothing half-staged is left, and a smaller one still fits."""
    machine = local_machine(small_disk / "m1")
    first = control({"one": b"1"})
    machine.bring(first)
    large = control({"large": os.urandom(400_000)})
    refusal = machine.refused(staging(large, machine.token))
    assert "No space left on device" in refusal.problem
    seen = machine.look()
    assert (seen.current, seen.generations) == (first.digest, (first.digest,))
    assert [path.name for path in machine.layout.generations.iterdir()] == [first.digest]
    second = control({"two": b"2"})
    machine.bring(second)
    assert machine.look().last_good == second.digest
    end(machine)


def test_kill_at_every_change_of_a_folder_leaves_one_whole_generation(tmp_path: Path) -> None:
    """Wherever staging and switching are broken off, what is current is whole, and doing it again gets there."""
    script = """
import os, pathlib, signal, sys
sys.path.insert(0, sys.argv[3])
from tiny_fleet import local_machine
from test_generations import control
die_at, done = int(sys.argv[2]), 0
real = {"rename": os.rename, "mkdir": os.mkdir, "symlink": os.symlink}
def dying(name):
    def call(*args, **kwargs):
        global done
        done += 1
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args, **kwargs)
    return call
os.rename, os.mkdir, os.symlink = dying("rename"), dying("mkdir"), dying("symlink")
machine = local_machine(pathlib.Path(sys.argv[1]))
machine.bring(control({"a": b"new", "b/c": b"new"}))
print("all", done)
"""
    old, new = control({"a": b"old"}), control({"a": b"new", "b/c": b"new"})
    for die_at in range(1, 200):
        root = tmp_path / str(die_at)
        machine = local_machine(root)
        machine.bring(old)
        done = subprocess.run(
            [sys.executable, "-c", script, str(root), str(die_at), str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        seen = machine.look()
        assert seen.current in (old.digest, new.digest)
        assert (seen.drifted, seen.missing, seen.foreign) == ((), (), ())
        if "all" in done.stdout:
            assert die_at > 8, "the points to die at were not found"
            break
        assert done.returncode == -9, done.stderr
        machine.bring(new)
        assert machine.look().last_good == new.digest
    else:
        raise AssertionError("it never got through")
