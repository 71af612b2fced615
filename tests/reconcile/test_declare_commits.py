"""Declared state as commits: what is committed, by whom, and every refusal, after which all is as it was."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from git_home import APART, FLEET, GitHome, key, no_key, no_vp, vp

from orchestrator_fleet.errors import Conflict, Invalid, NotFound, SpecInvalid
from orchestrator_fleet.reconcile import declare as declaring
from orchestrator_fleet.reconcile import repository
from orchestrator_fleet.reconcile.declare import Edit, NewFile, finish
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec import exchange, writeback


@pytest.fixture
def home(tmp_path: Path) -> GitHome:
    """A fleet of two, in a repository of its own."""
    return GitHome(tmp_path / "home")


def refused(home: GitHome, code: str, *edits: Edit | NewFile, **more: object) -> str:
    """Declare, be refused, and find HEAD, the index and the files as they were; the words of it."""
    before = (home.head(), home.status(), home.file.read_bytes())
    with pytest.raises(Conflict) as conflict:
        home.declare(*(edits or [vp("vp-c")]), **more)
    assert conflict.value.code == code, str(conflict.value)
    assert (home.head(), home.status(), home.file.read_bytes()) == before
    assert not list(home.home.rglob(".*.declaring"))
    assert not (State(home.file).dir / declaring.INTENT).exists()
    return str(conflict.value)


def test_a_change_is_a_commit_of_exactly_that(home: GitHome):
    """By the caller, with the words given; files, index and HEAD agree afterwards."""
    before = home.head()
    done = home.declare(
        make=lambda now: [vp("vp-a", {**(now.raw("orchestrators", "vp-a") or {}), "sessions": {"max": 4}})],
        subject=lambda changes: f"Change {changes[0].name}: {changes[0].before.keys() ^ changes[0].after.keys()}",
        body="For the fair.\n\nFleet-Key: k-00000001\n",
    )
    assert (done.commit, done.branch, done.files, done.changed) == (home.head(), None, ("fleet.yaml",), True)
    assert home.status() == ""
    assert home.git("rev-parse", "HEAD^") == before
    assert home.git("log", "-1", "--format=%an|%ae|%cn|%ce") == (
        "person:me|person.me@acme.invalid|fleet serve|fleet@acme.invalid"
    )
    assert home.git("log", "-1", "--format=%B") == (
        "Change vp-a: {'sessions'}\n\nFor the fair.\n\nFleet-Key: k-00000001"
    )
    assert home.git("log", "-1", "--format=%(trailers:key=Fleet-Key,valueonly)") == "k-00000001"
    assert [
        line for line in done.diff.split("\n") if line.startswith(("+", "-")) and line[:3] not in ("+++", "---")
    ] == ["+    sessions: {max: 4}"]
    assert home.loaded().orchestrators["vp-a"].sessions.max == 4
    assert done.changes[0].after == {"charter": "charters/a.md", "discipline": "engineering", "sessions": {"max": 4}}


def test_what_reads_so_already_is_no_commit(home: GitHome):
    """Asking twice is asking once."""
    home.declare(vp("vp-c"))
    before = home.head()
    done = home.declare(vp("vp-c"), subject="Again")
    assert (done.commit, done.changed, done.files, done.diff, done.changes) == (before, False, (), "", ())
    assert home.head() == before
    assert not home.declare(no_vp("vp-nobody"), no_key("k-0000dead")).changed


def test_several_edits_are_one_commit(home: GitHome):
    """An orchestrator, its charter and its key; and out again."""
    home.declare(NewFile(path="charters/c/deep.md", text="Be.\n"), vp("vp-c", charter="charters/c/deep.md"))
    done = home.declare(key("k-00000002", "vp-c"), key("k-00000003", "vp-c"))
    assert [change.name for change in done.changes] == ["k-00000002", "k-00000003"]
    assert (home.home / "charters/c/deep.md").read_text() == "Be.\n"
    home.declare(no_vp("vp-c"), no_key("k-00000002"), no_key("k-00000003"))
    assert home.file.read_text() == FLEET
    assert home.status() == ""


def test_the_files_mode_stays_and_new_ones_are_ordinary(home: GitHome):
    """As an editor would leave it."""
    home.file.chmod(0o640)
    home.declare(NewFile(path="charters/c.md", text="Be.\n"), vp("vp-c", charter="charters/c.md"))
    assert stat.S_IMODE(home.file.stat().st_mode) == 0o640
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((home.home / "charters/c.md").stat().st_mode) == 0o666 & ~mask


def test_proposed_is_a_branch_and_nothing_else(home: GitHome):
    """HEAD, index and files stay; what is on the branch can be merged."""
    before = home.head()
    done = home.declare(vp("vp-c"), subject='Add "VP" of C!', propose=True)
    assert done.branch == f"fleet/add-vp-of-c-{done.commit[:8]}"
    assert (home.head(), home.status(), home.file.read_text()) == (before, "", FLEET)
    assert home.git("rev-parse", done.branch, f"{done.branch}^").split() == [done.commit, before]
    assert "+  vp-c: {charter: charters/a.md}" in done.diff
    home.git("merge", "-q", done.branch)
    assert "vp-c" in home.loaded().orchestrators


# Where a new entry goes


def test_an_include_that_provides_for_it_gives_each_a_file_of_its_own(tmp_path: Path):
    """A key goes to its owner's; what is empty and says nothing else goes away."""
    home = GitHome(tmp_path / "home", fleet=APART)
    assert home.declare(vp("vp-c")).files == ("fleet.d/vp-c.yaml",)
    assert (home.home / "fleet.d/vp-c.yaml").read_text() == "orchestrators:\n  vp-c:\n    charter: charters/a.md\n"
    assert home.declare(key("k-00000002", "vp-c")).files == ("fleet.d/vp-c.yaml",)
    assert home.declare(key("k-00000003", "service:ci")).files == ("fleet.d/ci.yaml",)
    assert home.declare(vp("vp-a", discipline="x")).files == ("fleet.yaml",)
    assert home.declare(no_vp("vp-c"), no_key("k-00000002")).files == ("fleet.d/vp-c.yaml",)
    assert not (home.home / "fleet.d/vp-c.yaml").exists()
    assert home.status() == ""


def test_any_of_many_changes_can_be_reverted_alone(tmp_path: Path):
    """Each stands in a file of its own, so no revert meets another change."""
    home = GitHome(tmp_path / "home", fleet=APART)
    commits = {name: home.declare(vp(f"vp-{name}"), subject=f"Add vp-{name}").commit for name in "cdefg"}
    home.declare(vp("vp-d", discipline="x"))
    for name in "ecg":
        home.git("revert", "--no-edit", commits[name])
    assert sorted(home.loaded().orchestrators) == ["vp-a", "vp-b", "vp-d", "vp-f"]


def test_proposals_beside_each_other_merge(tmp_path: Path):
    """Two branches from one HEAD, each with an orchestrator of its own."""
    home = GitHome(tmp_path / "home", fleet=APART)
    branches = [home.declare(vp(f"vp-{name}"), subject=f"Add vp-{name}", propose=True).branch for name in "cd"]
    for branch in branches:
        home.git("merge", "-q", "--no-edit", str(branch))
    assert {"vp-c", "vp-d"} <= home.loaded().orchestrators.keys()


def test_an_ignored_include_gets_nothing(tmp_path: Path):
    """It is this clone's own; what stands there is not edited either."""
    home = GitHome(tmp_path / "home", fleet=APART, files={".gitignore": ".fleet/\nfleet.d/\n"})
    mine = {"k-00000009": {"owner": "person:me", "sha256": "9" * 64, "scopes": ["admin"]}}
    home.write("fleet.d/mine.yaml", f"keys: {json.dumps(mine)}\n")
    assert home.declare(vp("vp-c"), key("k-00000002")).files == ("fleet.yaml",)
    assert "fleet.d/mine.yaml" in refused(home, "not_in_git", no_key("k-00000009"))
    assert "git does not keep" in refused(
        home, "not_in_git", NewFile(path="fleet.d/c.md", text="Be.\n"), vp("vp-d", charter="fleet.d/c.md")
    )


# Kinds of repositories


def test_a_fleet_below_the_top_of_its_repository(tmp_path: Path):
    """What is changed beside it is nobody's business; paths are git's."""
    home = GitHome(tmp_path / "home", under="ops/fleet")
    (home.top / "README").write_text("x")
    home.git("add", "README")
    done = home.declare(vp("vp-c"))
    assert done.files == ("fleet.yaml",)
    assert "a/ops/fleet/fleet.yaml" in done.diff
    assert home.status() == "A  README"
    assert home.git("show", "--name-only", "--format=", "HEAD") == "ops/fleet/fleet.yaml"


def test_a_detached_head_is_refused(home: GitHome):
    """Its commits are on no branch, and lost with the next checkout."""
    home.git("checkout", "-q", "--detach")
    refused(home, "detached_head")
    assert home.declare(vp("vp-c"), propose=True).branch is not None


def test_an_index_that_somebody_holds_is_waited_for_and_then_refused(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """A commit that the index does not know of would be undone by the next one of a person."""
    monkeypatch.setattr(declaring, "INDEX_WAIT_S", 0.2)
    (home.top / ".git/index.lock").write_text("")
    refused(home, "busy")


def test_a_charter_that_git_does_not_have_is_refused(home: GitHome):
    """No clone of the commit would have it."""
    home.write("charters/new.md", "---\nrole: New\n---\nDo.\n")
    with pytest.raises(Conflict, match="git does not have it") as told:
        home.declare(vp("vp-c", charter="charters/new.md"))
    assert told.value.code == "not_in_git"
    assert home.file.read_text() == FLEET


def test_a_linked_worktree_has_a_head_of_its_own(home: GitHome, tmp_path: Path):
    """Its .git is a file."""
    home.git("worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    before = home.head()
    side = GitHome.__new__(GitHome)
    side.top, side.under = tmp_path / "side", "."
    done = side.declare(vp("vp-c"))
    assert (side.head(), home.head(), side.status()) == (done.commit, before, "")
    side.write("charters/a.md", "changed")
    refused(side, "dirty_work_tree")


def test_a_link_is_followed(tmp_path: Path):
    """What it leads to is committed; the link stays."""
    home = GitHome(tmp_path / "home", files={"real.yaml": FLEET})
    home.file.unlink()
    home.file.symlink_to("real.yaml")
    home.git("commit", "-qam", "A link")
    home.declare(vp("vp-c"))
    assert home.file.is_symlink()
    assert home.git("show", "--name-only", "--format=", "HEAD") == "real.yaml"
    assert home.status() == ""


def test_line_ends_that_git_converts_are_kept_on_both_sides(tmp_path: Path):
    """CRLF in the work tree, LF in the commit, as .gitattributes says."""
    home = GitHome(tmp_path / "home", files={".gitattributes": "*.yaml text eol=crlf\n"})
    home.file.unlink()
    home.git("checkout", "-q", "--", ".")
    assert b"\r\n" in home.file.read_bytes()
    home.declare(vp("vp-c"))
    assert home.file.read_bytes().count(b"\n") == home.file.read_bytes().count(b"\r\n")
    assert "\r" not in home.git("cat-file", "blob", "HEAD:fleet.yaml")
    assert home.status() == ""


def test_a_folder_without_git_is_refused(home: GitHome):
    """With the cure."""
    shutil.rmtree(home.top / ".git")
    with pytest.raises(Conflict, match="git init") as conflict:
        home.declare(vp("vp-c"))
    assert conflict.value.code == "no_git"
    assert home.file.read_text() == FLEET


def test_a_repository_without_a_commit_is_refused(home: GitHome):
    """There is nothing to build on."""
    shutil.rmtree(home.top / ".git")
    home.git("init", "-q")
    with pytest.raises(Conflict, match="has no commit yet") as conflict:
        home.declare(vp("vp-c"))
    assert conflict.value.code == "no_git"


def test_no_git_on_the_machine_is_said(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """In words of ours."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Conflict, match="git can't be started") as conflict:
        home.declare(vp("vp-c"))
    assert conflict.value.code == "no_git"


# Somebody is at work


@pytest.mark.parametrize("how", ["changed", "staged", "deleted", "untracked-charter", "untracked-include", "hidden"])
def test_a_work_tree_in_use_is_refused(tmp_path: Path, how: str):
    """What a person has not committed yet is named, and never committed with ours."""
    home = GitHome(tmp_path / "home", fleet=APART, files={"charters/z.md": "Z.\n", "notes.txt": "n\n"})
    if how == "changed":
        home.write("notes.txt", "more\n")
    elif how == "staged":
        home.write("notes.txt", "more\n")
        home.git("add", "notes.txt")
        home.write("notes.txt", "n\n")
    elif how == "deleted":
        (home.home / "charters/z.md").unlink()
    elif how == "untracked-charter":
        home.write("charters/new.md", "New.\n")
        home.write("fleet.yaml", APART.replace("vp-b: {charter: charters/a.md}", "vp-b: {charter: charters/new.md}"))
        home.git("commit", "-qam", "Half of it")
    elif how == "untracked-include":
        home.write("fleet.d/x.yaml", "limits: []\n")
    else:
        home.git("update-index", "--assume-unchanged", "fleet.yaml")
        home.write("fleet.yaml", APART + "# mine\n")
    text = refused(home, "dirty_work_tree", vp("vp-b", discipline="x"))
    named = {"untracked-charter": "charters/new.md", "untracked-include": "fleet.d/x.yaml", "deleted": "charters/z.md"}
    assert named.get(how, "fleet.yaml" if how == "hidden" else "notes.txt") in text


def test_untracked_files_that_are_not_the_fleets_are_nobodys_business(home: GitHome):
    """A person's notes, say."""
    home.write("notes.txt", "x")
    home.declare(vp("vp-c"))
    assert home.status() == "?? notes.txt"


@pytest.mark.parametrize("what", ["merge", "rebase", "cherry-pick", "revert"])
def test_a_step_under_way_is_refused(home: GitHome, what: str):
    """Also when nothing is in conflict any more."""
    home.git("checkout", "-q", "-b", "side")
    home.write("notes.txt", "side")
    home.git("add", "notes.txt")
    home.git("commit", "-qm", "side")
    side = home.head()
    home.git("checkout", "-q", "main")
    if what == "merge":
        home.write("other.txt", "x")
        home.git("add", "other.txt")
        home.git("commit", "-qm", "other")
        home.git("merge", "-q", "--no-commit", "--no-ff", "side")
    elif what == "rebase":
        home.git("rebase", "-q", "--exec", "false", "HEAD~0", "side", check=False)
        (home.top / ".git/rebase-merge").mkdir(exist_ok=True)
    else:
        name = "CHERRY_PICK_HEAD" if what == "cherry-pick" else "REVERT_HEAD"
        (home.top / ".git" / name).write_text(f"{side}\n")
    assert f"a {what} is under way" in refused(home, "dirty_work_tree")


def test_a_head_that_moves_meanwhile_is_refused(home: GitHome):
    """Somebody committed while the hooks ran."""
    home.hook("pre-commit", "unset GIT_INDEX_FILE; git -c core.hooksPath=/dev/null commit -q --allow-empty -m theirs")
    with pytest.raises(Conflict, match="HEAD moved from") as conflict:
        home.declare(vp("vp-c"))
    assert conflict.value.code == "head_moved"
    assert home.subjects() == ["A fleet", "theirs"]
    assert (home.status(), home.file.read_text()) == ("", FLEET)


def test_a_file_that_is_saved_meanwhile_is_left_as_it_was_saved(home: GitHome):
    """An editor, while the hooks run."""
    home.hook("pre-commit", "echo '# mine' >> fleet.yaml")
    with pytest.raises(Conflict, match="changed while the edit was made") as conflict:
        home.declare(vp("vp-c"))
    assert conflict.value.code == "edited_meanwhile"
    assert home.subjects() == ["A fleet"]
    assert home.file.read_text() == FLEET + "# mine\n"
    assert home.status() == "M fleet.yaml"


@pytest.mark.parametrize("save", ["in place", "by rename"])
def test_a_file_that_is_saved_at_the_last_moment_is_left_as_it_was_saved(
    home: GitHome, monkeypatch: pytest.MonkeyPatch, save: str
):
    """Between the last look and the exchange: the commit is taken back, and the other file too."""
    swapped: list[Path] = []
    real = exchange.swap

    def swap(put: exchange.Put) -> None:
        if put.path == home.file:
            theirs = home.file if save == "in place" else home.file.with_name("theirs")
            theirs.write_text(FLEET + "# mine\n")
            theirs.rename(home.file)
        real(put)
        swapped.append(put.path)

    monkeypatch.setattr(exchange, "swap", swap)
    with pytest.raises(Conflict) as conflict:
        home.declare(NewFile(path="charters/c.md", text="Be.\n"), vp("vp-c", charter="charters/c.md"))
    assert conflict.value.code == "edited_meanwhile"
    assert swapped == [home.home / "charters/c.md"]
    assert not (home.home / "charters/c.md").exists()
    assert home.file.read_text() == FLEET + "# mine\n"
    assert (home.subjects(), home.status()) == (["A fleet"], "M fleet.yaml")
    assert not list(home.home.rglob(".*.declaring"))


def test_a_file_that_appears_meanwhile_is_left(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """Somebody writes the same charter at the last moment."""
    real = exchange.swap

    def swap(put: exchange.Put) -> None:
        put.path.write_text("theirs\n")
        real(put)

    monkeypatch.setattr(exchange, "swap", swap)
    with pytest.raises(Conflict) as conflict:
        home.declare(NewFile(path="charters/c.md", text="Be.\n"))
    assert conflict.value.code == "edited_meanwhile"
    assert (home.home / "charters/c.md").read_text() == "theirs\n"
    assert (home.subjects(), home.status()) == (["A fleet"], "?? charters/c.md")


def test_another_edit_that_takes_too_long_is_said(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """`fleet key create` takes the same lock."""
    monkeypatch.setattr(writeback, "LOCK_TIMEOUT_S", 0.1)
    holder = os.open(home.home, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert "another edit has held it" in refused(home, "busy")
    finally:
        os.close(holder)


# Hooks


def test_a_hook_that_says_no_is_the_last_word(home: GitHome):
    """What it said is in the answer."""
    home.hook("pre-commit", "echo 'no friday changes' >&2; exit 1")
    assert "the pre-commit hook refused the commit: no friday changes" in refused(home, "hook_failed")


def test_hooks_see_what_is_to_be_committed(home: GitHome):
    """The pre-commit hook its index, the commit-msg hook the message, which it may change."""
    home.hook("pre-commit", "git diff --cached --name-only > .fleet-seen; git diff --cached -- '*.yaml' >> .fleet-seen")
    home.hook("commit-msg", 'printf "\\nReviewed-by: nobody\\n" >> "$1"; grep -q "^Change it" "$1"')
    home.hook("post-commit", "git log -1 --format=%s > .fleet-after")
    home.declare(vp("vp-c"))
    assert (home.top / ".fleet-seen").read_text().startswith("fleet.yaml\n")
    assert "+  vp-c: {charter: charters/a.md}" in (home.top / ".fleet-seen").read_text()
    assert home.git("log", "-1", "--format=%B").endswith("Reviewed-by: nobody")
    assert (home.top / ".fleet-after").read_text() == "Change it\n"
    home.hook("commit-msg", "exit 3")
    assert "commit-msg" in refused(home, "hook_failed", vp("vp-d"))


def test_a_hook_that_changes_the_commit_is_refused(home: GitHome):
    """What was checked is what is committed."""
    home.hook("pre-commit", "echo x > extra.txt; git add extra.txt; rm extra.txt")
    assert "a hook changed what is to be committed" in refused(home, "hook_failed")


def test_a_hook_that_never_ends_is_ended(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """With all that it started."""
    monkeypatch.setattr(repository, "HOOK_TIMEOUT_S", 0.5)
    home.hook("pre-commit", "sleep 600 & echo $! > .git/sleeper; sleep 600")
    assert "took longer than" in refused(home, "hook_failed")
    sleeper = int((home.top / ".git/sleeper").read_text())
    stat_file = Path(f"/proc/{sleeper}/stat")
    assert not stat_file.exists() or stat_file.read_text().rpartition(")")[2].split()[0] == "Z"


# What can't be declared


def test_what_make_raises_is_raised(home: GitHome):
    """Its checks are part of the step."""

    def make(now: declaring.Declaration) -> list[Edit]:
        assert now.raw("orchestrators", "vp-b") == {"charter": "charters/a.md"}
        assert now.raw("orchestrators", "vp-z") is None
        assert (now.commit, now.fleet.fleet, list(now.charters)) == (home.head(), "acme", ["charters/a.md"])
        raise NotFound("no vp-z")

    with pytest.raises(NotFound):
        home.declare(make=make)
    assert home.status() == ""


def test_a_fleet_that_is_wrong_already_is_said_as_such(home: GitHome):
    """It is not the caller's doing."""
    home.write("fleet.yaml", FLEET.replace("machines:", "machinas:"))
    home.git("commit", "-qam", "A typo")
    assert "did you mean machines?" in refused(home, "fleet_unsound")


def test_a_fleet_that_would_be_wrong_is_the_callers_doing(home: GitHome):
    """All of it at once, as `fleet validate` says it."""
    before = home.head()
    with pytest.raises(SpecInvalid) as wrong:
        home.declare(vp("vp-c", disciplin="x", charter="charters/none.md"), no_vp("vp-nobody"))
    assert "did you mean discipline?" in str(wrong.value)
    with pytest.raises(SpecInvalid):
        home.declare(no_vp("vp-a"), no_vp("vp-b"))
    assert (home.head(), home.status()) == (before, "")


def test_a_file_that_is_there_is_not_overwritten(home: GitHome):
    """Tracked or not."""
    home.write("charters/mine.md", "x")
    for name in ("charters/a.md", "charters/mine.md", "charters"):
        refused(home, "file_exists", NewFile(path=name, text="Be.\n"))


@pytest.mark.parametrize(
    "path", ["../x.md", "/etc/x.md", ".git/hooks/pre-commit", ".fleet/x", "a/.b", "", ".", "a\\b", "a\nb", "a\0b"]
)
def test_a_path_that_is_no_place_for_a_file_is_refused(home: GitHome, path: str):
    """Git's own folder above all."""
    with pytest.raises(Invalid):
        home.declare(NewFile(path=path, text="#!/bin/sh\n"))
    assert home.status() == ""


def test_a_link_out_of_the_folder_is_no_way_out(home: GitHome, tmp_path: Path):
    """Wherever it leads."""
    (home.home / "out").symlink_to(tmp_path)
    with pytest.raises(Invalid):
        home.declare(NewFile(path="out/x.md", text="x"))
    assert not (tmp_path / "x.md").exists()


def test_where_there_is_no_way_the_lines_are_shown(tmp_path: Path):
    """A person can write them."""
    shared = FLEET.replace("vp-a:\n", "vp-a: &a\n").replace("vp-b: {charter: charters/a.md}", "vp-b: *a")
    home = GitHome(tmp_path / "home", fleet=shared)
    text = refused(home, "not_editable", vp("vp-a", discipline="x"))
    assert "write it by hand:\norchestrators:\n  vp-a:\n    charter: charters/a.md\n    discipline: x\n" in text
    home.declare(vp("vp-b", discipline="x"))
    assert home.loaded().orchestrators["vp-a"].discipline == "engineering"


def test_one_entry_edited_twice_is_our_mistake(home: GitHome):
    """Nobody knows which of the two it would be."""
    with pytest.raises(ValueError, match="edited twice"):
        home.declare(vp("vp-c"), no_vp("vp-c"))


def test_words_of_any_kind_make_a_commit(home: GitHome):
    """What callers write comes from outside: line ends, control characters, half a character, far too long."""
    home.declare(vp("vp-c"), subject="Line\0one\ud800\n" + "x" * 999, body="a\r\nb\x1b[31m\ud800\n\n# no comment\n")
    subject, body = home.git("log", "-1", "--format=%s"), home.git("log", "-1", "--format=%b")
    assert subject.startswith("Line")
    assert len(subject) <= 200
    assert "a\nb" in body
    assert "\x1b" not in body
    assert "# no comment" in body


def test_authors_of_any_kind_make_a_commit(home: GitHome):
    """Git refuses an empty name, and angle brackets."""
    author = declaring.Author(name="<>", email="a\nb <x@y>")
    declaring.declare(home.file, make=lambda _: [vp("vp-c")], author=author, subject="x")
    assert home.git("log", "-1", "--format=%an|%ae") == "unknown|ab x@y"


# The disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_says_no_leaves_all_as_it_was(home: GitHome, monkeypatch: pytest.MonkeyPatch, number: int):
    """Before HEAD moves: all is laid aside first."""
    real = exchange.lay

    def lay(put: exchange.Put) -> None:
        if put.path == home.file:
            raise OSError(number, os.strerror(number), str(put.path))
        real(put)

    monkeypatch.setattr(exchange, "lay", lay)
    text = refused(
        home, "not_writable", NewFile(path="charters/c.md", text="Be.\n"), vp("vp-c", charter="charters/c.md")
    )
    assert os.strerror(number) in text


def test_what_else_git_says_is_passed_on(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """A setting that it can't read, say."""
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.bigFileThreshold")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "not a number")
    with pytest.raises(Conflict, match="bigfilethreshold"):
        home.declare(vp("vp-c"))
    assert home.file.read_text() == FLEET


def _while_held(lock: Path, *edits: Edit) -> tuple[Edit, ...]:
    lock.write_text("")
    return edits


def test_an_index_that_somebody_holds_is_brought_along_by_the_next(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """The commit and the files stand; the intent says what is left to do."""
    monkeypatch.setattr(declaring, "INDEX_WAIT_S", 0.2)
    lock = home.top / ".git/index.lock"
    home.declare(make=lambda _: _while_held(lock, vp("vp-c")))
    lock.unlink()
    assert home.status() == "MM fleet.yaml"
    assert finish(home.file)
    assert home.status() == ""
    assert not finish(home.file)


def test_git_that_fails_over_an_intent_leaves_it_to_the_next(
    home: GitHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """That it did not answer does not mean that the commit was taken back."""
    monkeypatch.setattr(declaring, "INDEX_WAIT_S", 0.2)
    lock = home.top / ".git/index.lock"
    home.declare(make=lambda _: _while_held(lock, vp("vp-c")))
    lock.unlink()
    failing = tmp_path / "bin/git"
    failing.parent.mkdir()
    failing.write_text(
        '#!/bin/sh\ncase "$*" in *merge-base*) echo "fatal: Out of memory" >&2; exit 128;; esac\n'
        f'exec {shutil.which("git")} "$@"\n'
    )
    failing.chmod(0o755)
    with monkeypatch.context() as now:
        now.setenv("PATH", f"{failing.parent}:{os.environ['PATH']}")
        with pytest.raises(Conflict, match="Out of memory"):
            finish(home.file)
    assert finish(home.file)
    assert home.status() == ""


def test_a_file_system_without_exchange_does_as_well(home: GitHome, monkeypatch: pytest.MonkeyPatch):
    """Links take its place."""

    class Without:
        @staticmethod
        def renameat2(*_: object) -> int:
            exchange.ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(exchange, "_libc", Without)
    home.declare(NewFile(path="charters/c.md", text="Be.\n"), vp("vp-c", charter="charters/c.md"))
    home.declare(no_vp("vp-c"))
    assert (home.file.read_text(), home.status()) == (FLEET, "")
    assert not list(home.home.rglob(".*.declaring*"))
