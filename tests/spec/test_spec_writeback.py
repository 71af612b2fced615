"""Adding a key to fleet.yaml: every byte that was there stays, and only a sound fleet is written."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from orchestrator_fleet.errors import FleetError, SpecInvalid
from orchestrator_fleet.spec import exchange, writeback
from orchestrator_fleet.spec.entry import NotEditable, with_entry
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.writeback import add_key

SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
KEY = {
    "key_id": "k-7f3a9c21",
    "owner": "person:me",
    "sha256": SHA,
    "scopes": ["tasks:work", "admin"],
    "created": "2026-11-20T09:00:00Z",
    "expires": None,
}
FIELDS = {name: KEY[name] for name in ("owner", "sha256", "scopes", "created")}
CASES = sorted((Path(__file__).parent / "writeback").iterdir())
CHANGES_A_LINE = {"one-line-keys", "json", "json-empty-keys", "empty-braces", "no-line-end-at-the-end"}


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_a_key_is_added_exactly_there(case: Path):
    """before.yaml becomes after.yaml, to the byte."""
    before = (case / "before.yaml").read_bytes().decode()
    after = with_entry(before, file="fleet.yaml", section="keys", name="k-7f3a9c21", value=FIELDS)
    assert after == (case / "after.yaml").read_bytes().decode()


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in CHANGES_A_LINE], ids=lambda path: path.name
)
def test_only_lines_are_added(case: Path):
    """Taking the new lines out gives the old file back."""
    before = (case / "before.yaml").read_bytes().decode().split("\n")
    after = iter((case / "after.yaml").read_bytes().decode().split("\n"))
    assert all(line in after for line in before)


@pytest.mark.parametrize(
    "text", ["keys: &k {}\nx: *k\n", "x: &k {k-00000001: {owner: a}}\nkeys: *k\n", "keys: [a]\n", "keys: a\n"]
)
def test_where_there_is_no_place_the_lines_are_shown(text: str):
    """A person can still put them there."""
    with pytest.raises(NotEditable, match="write it by hand:\nkeys:\n  k-7f3a9c21:\n    owner: person:me\n"):
        with_entry(text, file="fleet.yaml", section="keys", name="k-7f3a9c21", value=FIELDS)


@pytest.mark.parametrize(
    ("owner", "written"),
    [("person:me", "person:me"), ("vp-eng", "vp-eng"), ("yes", '"yes"'), ("a: b", '"a: b"'), ("é", "é")],
)
def test_values_are_quoted_where_other_readers_would_see_another_type(owner: str, written: str):
    """YAML 1.1 readers take `yes` for true."""
    after = with_entry("version: 1\n", file="x", section="keys", name="k-7f3a9c21", value={**FIELDS, "owner": owner})
    assert f"    owner: {written}\n" in after


def test_a_hash_of_digits_alone_is_quoted():
    """Another reader would make a number of it."""
    after = with_entry(
        "version: 1\n", file="x", section="keys", name="k-7f3a9c21", value={**FIELDS, "sha256": "1" * 64}
    )
    assert f'sha256: "{"1" * 64}"' in after


def test_the_fleet_has_the_key_afterwards(write_fleet):
    """The file's mode stays, and nothing else is left in the folder."""
    path = write_fleet("# the end\n")
    before = path.read_text()
    path.chmod(0o640)
    names = {entry.name for entry in path.parent.iterdir()}
    assert add_key(path, **{**KEY, "expires": "2027-02-20T00:00:00Z"}) == path
    key = load_fleet(path).file.keys["k-7f3a9c21"]
    assert (key.owner, key.sha256, key.scopes) == ("person:me", SHA, ["tasks:work", "admin"])
    assert key.expires is not None
    assert path.read_text().startswith(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert {entry.name for entry in path.parent.iterdir()} == names


def test_keys_in_an_included_file_get_the_key_there(write_fleet):
    """People keep keys together."""
    path = write_fleet(
        "include: [fleet.d/*.yaml]\n", files={"fleet.d/a.yaml": "limits: []\n", "fleet.d/k.yaml": "keys:\n"}
    )
    before = path.read_bytes()
    assert add_key(path, **KEY) == path.parent / "fleet.d/k.yaml"
    assert path.read_bytes() == before
    assert "k-7f3a9c21" in load_fleet(path).file.keys


def test_a_link_stays_a_link(write_fleet):
    """What it leads to is edited."""
    path = write_fleet()
    path.rename(path.with_name("real.yaml"))
    path.symlink_to("real.yaml")
    add_key(path, **KEY)
    assert path.is_symlink()
    assert "k-7f3a9c21" in path.with_name("real.yaml").read_text()


def test_a_byte_order_mark_stays(write_fleet):
    """It was there; somebody's editor wants it."""
    path = write_fleet(head="\ufeffversion: 1\nfleet: acme\n")
    add_key(path, **KEY)
    assert path.read_bytes().startswith(b"\xef\xbb\xbfversion: 1\n")
    assert path.read_bytes().count(b"\xef\xbb\xbf") == 1


@pytest.mark.parametrize("change", [{"owner": "vp-nobody"}, {"scopes": ["everything"]}, {"sha256": "abc"}])
def test_a_key_that_makes_the_fleet_unsound_is_not_written(write_fleet, change):
    """The diagnostics are those of the file as it would be."""
    path = write_fleet()
    before = path.read_bytes()
    with pytest.raises(SpecInvalid, match=r"keys\.k-7f3a9c21\."):
        add_key(path, **{**KEY, **change})
    assert path.read_bytes() == before


def test_an_unsound_fleet_is_not_edited(write_fleet):
    """First things first."""
    path = write_fleet("x: 1\n")
    with pytest.raises(SpecInvalid, match="unknown key"):
        add_key(path, **KEY)


def test_the_same_id_twice_is_refused(write_fleet):
    """An id names one key for ever."""
    path = write_fleet()
    add_key(path, **KEY)
    with pytest.raises(SpecInvalid, match=r"keys\.k-7f3a9c21: is there already"):
        add_key(path, **{**KEY, "sha256": "ab" * 32})


def test_two_editors_at_once_lose_nothing(write_fleet):
    """Each waits for the other and reads what it wrote."""
    path = write_fleet()
    ids = [f"k-{number:08x}" for number in range(8)]
    threads = [
        threading.Thread(target=add_key, args=(path,), kwargs={**KEY, "key_id": key_id, "sha256": f"{number:064x}"})
        for number, key_id in enumerate(ids)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(load_fleet(path).file.keys) == ids


def test_an_editor_that_never_lets_go_is_named(write_fleet, monkeypatch):
    """The wait has an end."""
    path = write_fleet()
    monkeypatch.setattr(writeback, "LOCK_TIMEOUT_S", 0.1)
    holder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(FleetError, match="another edit has held it"):
            add_key(path, **KEY)
    finally:
        os.close(holder)


def test_a_folder_that_is_not_there_is_said(tmp_path):
    """A person reads a sentence, not a traceback."""
    with pytest.raises(FleetError, match="cannot be opened: No such file or directory"):
        add_key(tmp_path / "nowhere/fleet.yaml", **KEY)


def test_a_file_that_cannot_be_written_is_said(write_fleet, monkeypatch):
    """As on a read-only disk; the fleet is as it was."""
    path = write_fleet()
    before = path.read_bytes()

    def no_room(_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(exchange, "lay", no_room)
    with pytest.raises(FleetError, match="cannot be written: Read-only file system"):
        add_key(path, **KEY)
    assert path.read_bytes() == before
