"""Declares that are killed at any step, that meet each other, and that meet a person at work."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from git_home import APART, FLEET, GitHome, key, no_vp, vp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator_fleet.errors import Conflict
from orchestrator_fleet.reconcile import declare as declaring
from orchestrator_fleet.reconcile.declare import NewFile, finish
from orchestrator_fleet.reconcile.repository import Repository
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec import exchange

STEPS = [
    (Repository, "commit"),
    (Repository, "advance"),
    (Repository, "_into_index"),
    (Repository, "after_commit"),
    (exchange, "_rename"),
    (exchange, "lay"),
    (declaring, "_write_intent"),
    (Path, "unlink"),
]
EDITS = (NewFile(path="charters/c.md", text="Be.\n"), vp("vp-c", charter="charters/c.md"), no_vp("vp-b"))
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from git_home import GitHome, vp
home = GitHome.__new__(GitHome)
home.top, home.under = Path(sys.argv[2]), "."
for name in sys.argv[3:]:
    home.declare(vp(name), subject=f"Add {name}")
"""


@dataclass
class Dying:
    """Kills its process at a step. Every step counts twice: before it is done, and after."""

    left: int

    def at(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The step, counted."""

        def counted(*given: Any, **more: Any) -> Any:
            self.count()
            said = real(*given, **more)
            self.count()
            return said

        return counted

    def count(self) -> None:
        """One less to live."""
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def dying_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a process of its own that is killed at this step; whether there was such a step."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            dying = Dying(step)
            for owner, name in STEPS:
                setattr(owner, name, dying.at(getattr(owner, name)))
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def leftovers(home: GitHome) -> list[Path]:
    """What should be gone when all is done."""
    intent = State(home.file).dir / declaring.INTENT
    return [*home.home.rglob(".*.declaring*"), *([intent] if intent.exists() else [])]


def steps() -> Iterator[int]:
    """0, 1, 2 and so on."""
    yield from range(500)


def test_a_declare_killed_at_any_step_is_finished_or_never_was(tmp_path: Path):
    """The next one finds either, never half; then it does its own work."""
    both = set()
    for step in steps():
        home = GitHome(tmp_path / f"home{step}")
        before = home.head()
        died = dying_at(step, lambda home=home: home.declare(*EDITS, subject="The one that dies"))
        finish(home.file)
        assert home.status() == "", step
        assert leftovers(home) == [], step
        there = home.head() != before
        assert home.subjects() == ["A fleet", *(["The one that dies"] if there else [])], step
        assert ("vp-c" in home.loaded().orchestrators, (home.home / "charters/c.md").exists()) == (there, there), step
        both.add(there)
        if step % 7 == 0 or not died:
            home.declare(vp("vp-d"), subject="The next")
            assert (home.status(), home.subjects()[-1]) == ("", "The next")
        if not died:
            assert both == {True, False}
            return
    pytest.fail("it never came to its end")


def test_what_a_person_does_after_a_kill_is_theirs(tmp_path: Path):
    """Whatever they made of the files in between is not touched, and nothing of the commit is lost."""
    for step in steps():
        home = GitHome(tmp_path / f"home{step}")
        died = dying_at(step, lambda home=home: home.declare(vp("vp-c"), subject="The one that dies"))
        theirs = home.file.read_text() + "# mine\n"
        home.file.write_text(theirs)
        finish(home.file)
        assert home.file.read_text() == theirs, step
        assert leftovers(home) == [], step
        assert home.git("diff", "--name-only", "HEAD") == "fleet.yaml", step
        if not died:
            return
    pytest.fail("it never came to its end")


def test_an_intent_of_nonsense_is_dropped(tmp_path: Path):
    """A file that somebody else put there, say."""
    home = GitHome(tmp_path / "home")
    intent = State(home.file).dir / declaring.INTENT
    intent.parent.mkdir()
    intent.write_bytes(b'{"base": 1')
    home.declare(vp("vp-c"))
    assert leftovers(home) == []


def test_a_commit_that_was_taken_back_since_is_not_done_again(tmp_path: Path):
    """Killed with HEAD moved; then a person reset it away."""
    for step in steps():
        home = GitHome(tmp_path / f"home{step}")
        before = home.head()
        died = dying_at(step, lambda home=home: home.declare(*EDITS))
        home.git("reset", "-q", "--hard", before)
        finish(home.file)
        assert (home.head(), home.status(), leftovers(home)) == (before, "", []), step
        assert home.file.read_text() == FLEET
        if not died:
            return
    pytest.fail("it never came to its end")


def test_declares_at_once_all_land(tmp_path: Path):
    """In processes of their own, on one file; each is a commit on top of the other's."""
    home = GitHome(tmp_path / "home")
    names = [f"vp-x{number}" for number in range(9)]
    argv = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(home.top)]
    children = [subprocess.Popen([*argv, *names[start::3]], stderr=subprocess.PIPE) for start in range(3)]
    for child in children:
        _, err = child.communicate(timeout=100)
        assert child.returncode == 0, err.decode()
    assert sorted(home.subjects()[1:]) == [f"Add {name}" for name in names]
    assert home.git("rev-list", "--merges", "HEAD") == ""
    assert set(names) <= home.loaded().orchestrators.keys()
    assert home.status() == ""


@dataclass
class Person:
    """Somebody with an editor and git, at work in the fleet's folder."""

    home: GitHome
    rng: random.Random
    saved: list[str] = field(default_factory=list)

    def add_line(self, line: str) -> None:
        """As editors do: the file with a line more is saved in place or by rename, unless it changed on disk."""
        was, aside = self.home.file.read_bytes(), self.home.home / "edited"
        by_rename = self.rng.random() < 0.5
        if by_rename:
            aside.write_bytes(was + f"{line}\n".encode())
        if self.home.file.read_bytes() != was:
            aside.unlink(missing_ok=True)
            return
        if by_rename:
            aside.replace(self.home.file)
        else:
            self.home.file.write_bytes(was + f"{line}\n".encode())
        self.saved.append(line)


def test_a_person_at_work_loses_nothing(tmp_path: Path):
    """They save and commit as they like; every line they saved is in the history, and every answered change."""
    home = GitHome(tmp_path / "home")
    done, landed, answered, refused = threading.Event(), threading.Event(), list[str](), set[str]()

    def api() -> None:
        for number in itertools.takewhile(lambda _: not done.is_set(), itertools.count()):
            try:
                home.declare(vp(f"vp-x{number}"), subject=f"Add vp-x{number}")
                answered.append(f"vp-x{number}")
                landed.set()
            except Conflict as conflict:
                refused.add(conflict.code)

    api_thread = threading.Thread(target=api)
    api_thread.start()
    person = Person(home, random.Random(7))  # noqa: S311 - the same each time
    try:
        for number in range(25):
            person.add_line(f"# line {number}")
            if person.rng.random() < 0.7:
                home.git("commit", "-qam", f"Line {number}", check=False)
                landed.clear()
                landed.wait(timeout=person.rng.random() * 2)
    finally:
        done.set()
        api_thread.join(timeout=60)
    home.git("commit", "-qam", "The rest", check=False)
    history = home.git("log", "-p", "--format=%s")
    assert [line for line in person.saved if f"+{line}" not in history] == []
    assert [name for name in answered if f"+  {name}: {{charter: charters/a.md}}" not in history] == []
    assert answered
    assert refused <= {"dirty_work_tree", "edited_meanwhile", "head_moved", "git_failed", "fleet_unsound"}


VPS = st.sampled_from(["vp-a", "vp-b", "vp-c", "vp-d", "vp-e"])
SPECS = st.fixed_dictionaries(
    {"charter": st.just("charters/a.md")},
    optional={
        "discipline": st.sampled_from(["engineering", "security"]),
        "labels": st.dictionaries(
            st.sampled_from(["team", "zone", "no"]), st.sampled_from(["a", "yes", "1"]), max_size=3
        ),
        "sessions": st.fixed_dictionaries({"max": st.integers(1, 9)}, optional={"timeout": st.just("10m")}),
        "role": st.sampled_from(["VP: all of it", "it's", "# 1", "Two\nlines"]),
        "escalate_to": st.lists(st.sampled_from(["human:oncall", "human:ada"]), unique=True, max_size=2),
    },
)
CHANGES = st.one_of(
    st.tuples(st.just("write"), VPS, SPECS),
    st.tuples(st.just("remove"), VPS, st.none()),
    st.tuples(st.just("key"), st.sampled_from(["k-00000001", "k-00000002", "k-00000003"]), st.booleans()),
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CHANGES, min_size=1, max_size=7), st.sampled_from([FLEET, APART]))
def test_any_sequence_of_edits_reads_as_a_model_says(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, str, Any]], fleet: str
):
    """The fleet loads after each, and its files say exactly what was asked for."""
    home = GitHome(tmp_path_factory.mktemp("any") / "home", fleet=fleet)
    vps = {"vp-a": {"charter": "charters/a.md", "discipline": "engineering"}, "vp-b": {"charter": "charters/a.md"}}
    keys = {"k-00000001": {"owner": "person:ada", "sha256": "1" * 64, "scopes": ["tasks:read"]}}
    for what, name, value in changes:
        if what == "write":
            vps[name] = value
            home.declare(vp(name, value))
        elif what == "remove" and vps.keys() - {name}:
            vps.pop(name, None)
            home.declare(no_vp(name))
        elif what == "key":
            edit = key(name, "service:ci", **({"revoked": "2026-11-21T09:00:00Z"} if value else {}))
            keys[name] = dict(edit.value or {})
            home.declare(edit)
        stands: list[declaring.Declaration] = []
        home.declare(make=lambda now, stands=stands: stands.append(now) or [])
        assert stands[0].entries == {"orchestrators": vps, "keys": keys}
        assert home.status() == ""
