"""Which file an entry goes to, and putting files in place without overwriting what somebody saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator_fleet.errors import FleetError, SpecInvalid
from orchestrator_fleet.spec import exchange, writeback
from orchestrator_fleet.spec.exchange import EditedMeanwhile, Put
from orchestrator_fleet.spec.folder import Folder
from orchestrator_fleet.spec.load import load_fleet
from orchestrator_fleet.spec.writeback import Edit, NewFile, drafted, standing, write

NEW = Edit(section="orchestrators", name="vp-new", value={"charter": "charters/cto.md"})
KEY = Edit(section="keys", name="k-00000001", value={"owner": "person:me", "sha256": "a" * 64, "scopes": ["admin"]})


@pytest.mark.parametrize(
    ("include", "files"),
    [
        ("fleet.d/*.yaml", ["fleet.d/me.yaml", "fleet.d/vp-new.yaml"]),
        ("fleet.d/team-*.yaml", ["fleet.d/team-me.yaml", "fleet.d/team-vp-new.yaml"]),
        ("fleet.d/fixed.yaml", ["fleet.yaml"]),
        ("*.d/*.yaml", ["fleet.yaml"]),
        ("fleet.d/**", ["fleet.yaml"]),
        ("fleet.d/[ab]*.yaml", ["fleet.yaml"]),
    ],
)
def test_an_include_with_one_star_provides_a_file_for_each(write_fleet, include: str, files: list[str]):
    """Any other pattern says nothing of where to put one."""
    path = write_fleet(f'include: ["{include}"]\n', files={"fleet.d/fixed.yaml": "limits: []\n"})
    assert sorted(drafted(path, [NEW, KEY], now=standing(path), keeps=lambda _: True).after) == files
    assert sorted(drafted(path, [NEW, KEY], now=standing(path), keeps=lambda name: "/" not in name).after) == [
        "fleet.yaml"
    ]
    assert sorted(drafted(path, [NEW, KEY], now=standing(path)).after) == ["fleet.yaml"]


def test_a_folder_that_is_full_of_files_gets_no_more(write_fleet, monkeypatch: pytest.MonkeyPatch):
    """An include has a limit; the next goes where others are."""
    monkeypatch.setattr(writeback, "MAX_INCLUDED_FILES", 1)
    path = write_fleet("include: [fleet.d/*.yaml]\n", files={"fleet.d/vp-new.yaml": "# its own\nlimits: []\n"})
    assert sorted(drafted(path, [NEW, KEY], now=standing(path), keeps=lambda _: True).after) == [
        "fleet.d/vp-new.yaml",
        "fleet.yaml",
    ]


def test_a_draft_touches_no_disk(write_fleet):
    """It says what would be: files that are not there yet are included, what goes is gone."""
    path = write_fleet("include: [fleet.d/*.yaml]\n")
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    draft = drafted(
        path,
        [
            NewFile(path="charters/new.md", text="New.\n"),
            Edit(section="orchestrators", name="vp-new", value={"charter": "charters/new.md"}),
        ],
        now=standing(path),
        keeps=lambda _: True,
    )
    assert "vp-new" in load_fleet(path, instead=draft.after).file.orchestrators
    assert {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()} == before
    with pytest.raises(SpecInvalid, match=r"no charters/cto\.md"):
        load_fleet(path, instead={"charters/cto.md": None})


@pytest.mark.parametrize(
    "pattern", ["a/*.yaml", "**", "**/*.yaml", "a/**", "a/**/*.yaml", "*/b.yaml", "a/.h*", "a/?.yaml", "x"]
)
def test_a_file_that_is_to_be_matches_as_one_that_is(tmp_path: Path, pattern: str):
    """Globs go by one rule."""
    names = ["a/b.yaml", "a/c/d.yaml", "b.yaml", "a/.hidden.yaml", "a/.git/x.yaml", "x", "a/bb.yaml"]
    real = tmp_path / "real"
    for name in names:
        (real / name).parent.mkdir(parents=True, exist_ok=True)
        (real / name).write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    there = Folder(real).expand(pattern)
    assert Folder(empty, instead=dict.fromkeys(names, b"")).expand(pattern) == there
    assert Folder(real, instead=dict.fromkeys(names, None)).expand(pattern) == ()


def test_what_was_swapped_out_unseen_comes_back(tmp_path: Path):
    """Killed between the exchange and the look at what came out of it, which was somebody's."""
    put = Put(path=tmp_path / "f", before=b"old", after=b"new")
    for before, after in ((b"old", b"new"), (b"old", None)):
        put = Put(path=tmp_path / "f", before=before, after=after)
        put.aside.write_bytes(b"theirs")
        if after is not None:
            put.path.write_bytes(after)
        exchange.resume(put)
        assert put.path.read_bytes() == b"theirs"
        assert not put.aside.exists()
        put.path.unlink()


@pytest.mark.parametrize(("before", "after"), [(b"a", b"b"), (None, b"b"), (b"a", None)])
def test_a_swap_can_be_undone_unless_it_was_edited(tmp_path: Path, before: bytes | None, after: bytes | None):
    """Written, made or taken away."""
    put = Put(path=tmp_path / "f", before=before, after=after)
    if before is not None:
        put.path.write_bytes(before)
    exchange.lay(put)
    exchange.swap(put)
    assert exchange.read(put.path) == after
    exchange.undo(put)
    assert exchange.read(put.path) == before
    put.path.write_bytes(b"theirs")
    exchange.lay(put)
    with pytest.raises(EditedMeanwhile):
        exchange.swap(put)
    assert put.path.read_bytes() == b"theirs"


def test_several_files_are_written_or_none(tmp_path: Path):
    """The second was saved meanwhile, so the first goes back."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"theirs")
    puts = [Put(path=tmp_path / "a", before=b"a", after=b"A"), Put(path=tmp_path / "b", before=b"b", after=b"B")]
    with pytest.raises(FleetError, match="changed while the edit was made"):
        write(puts)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a", "b": b"theirs"}
