"""The git repository that a fleet's files are kept in: what is committed there, and one more commit.

Commits are made by plumbing, over an index of their own, so that nobody's index or work tree is in the way; the hooks
that `git commit` would run are run. Every refusal is a Conflict that says the cure.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator_fleet.errors import Conflict

GIT_TIMEOUT_S = 30.0
HOOK_TIMEOUT_S = 120.0
MAX_DIFF_CHARS = 256 << 10
MAX_NAMED = 8
MAX_WORDS = 600
MAX_SUBJECT = 200
PATHS_AT_ONCE = 500
NO_COMMIT: Final = "0" * 40
COMMITTER: Final = "fleet serve"
_UNDER_WAY = {
    "MERGE_HEAD": "a merge",
    "CHERRY_PICK_HEAD": "a cherry-pick",
    "REVERT_HEAD": "a revert",
    "rebase-merge": "a rebase",
    "rebase-apply": "a rebase",
}
_OURS_TO_PASS = ("GIT_CONFIG", "GIT_EXEC_PATH", "GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY")  # not: which repository
_QUIET = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_PAGER": "cat", "GIT_LITERAL_PATHSPECS": "1"}
_OPTIONS = (
    "-c",
    "core.quotepath=off",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "i18n.commitEncoding=UTF-8",
    "-c",
    "gc.auto=0",
)
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
_CRUD = re.compile(r"[<>\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """Who a commit is by."""

    name: str
    email: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A file as git keeps it."""

    mode: str
    id: str


class _Failed(Exception):
    """A git command said no; with its last words."""


class Repository:
    """The repository that a folder stands in. Raises Conflict `no_git` where there is none with a commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.top = self.folder
        asked = [argument for name in _UNDER_WAY for argument in ("--git-path", name)]
        hooks = [argument for name in ("pre-commit", "commit-msg") for argument in ("--git-path", f"hooks/{name}")]
        try:
            said = self._git("rev-parse", "--show-toplevel", "--absolute-git-dir", *asked, *hooks, cwd=self.folder)
        except _Failed as failed:
            cure = "`git init` there and commit the fleet's files, or set control_plane.writes: refuse"
            raise Conflict("no_git", f"{folder}: is not in a git work tree ({failed}); {cure}") from None
        top, self._git_dir, *paths = said.split("\n")
        self.top = Path(top)
        self._under_way = {self.folder / path: what for path, what in zip(paths, _UNDER_WAY.values(), strict=False)}
        try:
            self.head()
        except Conflict:
            raise Conflict("no_git", f"{top}: has no commit yet; commit the fleet's files first") from None

    # What is there

    def head(self) -> str:
        """The commit that is checked out."""
        return self._asked("rev-parse", "--verify", "HEAD^{commit}")

    def on_a_branch(self) -> bool:
        """Whether HEAD is a branch's; commits on a detached one are lost with the next checkout."""
        return self._says_yes("symbolic-ref", "--quiet", "HEAD")

    def index_lock(self) -> Path | None:
        """The lock of the index, while another git command holds it (or one that was killed left it)."""
        lock = Path(self._git_dir, "index.lock")
        return lock if lock.exists() else None

    def under_way(self) -> str | None:
        """What somebody is in the middle of: a merge, say."""
        return next((what for path, what in self._under_way.items() if path.exists()), None)

    def inside(self, path: Path) -> str | None:
        """The name that git has for a file, links followed; None outside of the repository, or in git's own folder."""
        real = path.resolve()
        if not real.is_relative_to(self.top) or real.is_relative_to(self._git_dir):
            return None
        name = str(real.relative_to(self.top))
        return None if name == "." or ".git" in name.lower().split("/") else name

    def changed(self) -> list[str]:
        """Tracked files of the folder that differ from HEAD, in the index or on disk."""
        said = self._asked(
            "status", "--porcelain=v1", "-z", "--untracked-files=no", "--no-renames", "--ignore-submodules=dirty",
            "--", ".", cwd=self.folder,
        )  # fmt: skip
        return [entry[3:] for entry in said.split("\0") if entry]

    def untracked(self, names: Iterable[str]) -> list[str]:
        """Those of these files that are on disk, not tracked, and not ignored either."""
        return [
            name
            for some in _in_parts(sorted(set(names)))
            for name in self._asked("ls-files", "-z", "--others", "--exclude-standard", "--", *some).split("\0")
            if name
        ]

    def ignored(self, name: str) -> bool:
        """Whether git would leave such a file out."""
        return self._says_yes("check-ignore", "--quiet", "--", f"./{name}", env={"GIT_LITERAL_PATHSPECS": "0"})

    def blobs(self, commit: str, names: Sequence[str]) -> dict[str, Blob]:
        """Those of these files that a commit has."""
        found = {}
        for some in _in_parts(names):
            for entry in self._asked("ls-tree", "-z", "--full-tree", commit, "--", *some).split("\0"):
                if entry:
                    about, _, name = entry.partition("\t")
                    mode, kind, blob = about.split(" ")
                    if kind == "blob":
                        found[name] = Blob(mode=mode, id=blob)
        return found

    def blob_id(self, name: str, data: bytes, *, keep: bool = False) -> str:
        """The id that git gives a file's bytes, as its filters make them; `keep` also stores them."""
        write = ("-w",) if keep else ()
        return self._asked("hash-object", *write, "--path", name, "--stdin", data=data)

    def holds(self, commit: str) -> bool:
        """Whether HEAD is this commit, or came after it; not where the repository has lost it."""
        has = self._says_yes("cat-file", "-e", commit)
        return has and self._says_yes("merge-base", "--is-ancestor", commit, "HEAD")

    def diff(self, base: str, commit: str) -> str:
        """What a commit changes, as a patch of at most MAX_DIFF_CHARS."""
        text = self._asked("diff", "--no-color", "--no-ext-diff", "--no-textconv", base, commit, "--")
        return f"{text}\n" if len(text) <= MAX_DIFF_CHARS else f"{text[:MAX_DIFF_CHARS]}\n... and more\n"

    # One more commit

    def commit(
        self, base: str, blobs: Mapping[str, Blob | None], *, author: Author, message: str, committer_email: str
    ) -> str:
        """A commit of these files (None: gone) on top of `base`; nothing points at it yet. Runs the hooks."""
        with tempfile.TemporaryDirectory(prefix="fleet-declare-") as scratch:
            env = {
                "GIT_INDEX_FILE": f"{scratch}/index",
                "GIT_AUTHOR_NAME": _named(author.name) or "unknown",
                "GIT_AUTHOR_EMAIL": _named(author.email) or "unknown@fleet.invalid",
                "GIT_COMMITTER_NAME": COMMITTER,
                "GIT_COMMITTER_EMAIL": committer_email,
                "GIT_EDITOR": ":",
            }
            self._asked("read-tree", base, env=env)
            self._into_index(blobs, env=env)
            tree = self._asked("write-tree", env=env)
            text = Path(scratch) / "message"
            text.write_text(_clean(message), encoding="utf-8")
            self._hooks(env, text)
            if self._asked("write-tree", env=env) != tree:
                problem = "a hook changed what is to be committed"
                raise Conflict("hook_failed", f"{self.top}: {problem}; let it check, or leave the fleet's files alone")
            return self._asked("commit-tree", tree, "-p", base, "-F", str(text), env=env)

    def advance(self, base: str, commit: str, *, why: str) -> None:
        """Make `commit` HEAD if that is still `base`; raises Conflict `head_moved`."""
        try:
            self._git("update-ref", "-m", _one_line(why), "HEAD", commit, base)
        except _Failed as failed:
            if self.head() != base:
                problem = f"HEAD moved from {base[:10]} to {self.head()[:10]} while the edit was made"
                raise Conflict("head_moved", f"{self.top}: {problem}; try again") from None
            raise Conflict("git_failed", f"{self.top}: the commit can't be made HEAD: {failed}") from None

    def branch(self, name: str, commit: str) -> None:
        """Make a branch that is not there yet."""
        self._asked("update-ref", "-m", "fleet: proposed", f"refs/heads/{name}", commit, NO_COMMIT)

    def restage(self, base: str, commit: str, names: Sequence[str]) -> None:
        """Let the index have these files as `commit` has them, where it has them as in `base`; others' are left."""
        before, after = self.blobs(base, names), self.blobs(commit, names)
        staged = self._staged(names)
        stale = {name: after.get(name) for name in names if staged.get(name) == before.get(name) != after.get(name)}
        if stale:
            self._into_index(stale, env={})
        with contextlib.suppress(_Failed):  # exit code 1 says that other files differ
            self._git("update-index", "-q", "--refresh")

    def after_commit(self) -> None:
        """Run the post-commit hook; what it says changes nothing any more."""
        with contextlib.suppress(_Failed):
            self._git("hook", "run", "--ignore-missing", "post-commit", timeout_s=HOOK_TIMEOUT_S)

    def _staged(self, names: Sequence[str]) -> dict[str, Blob]:
        found = {}
        for some in _in_parts(names):
            for entry in self._asked("ls-files", "-z", "--stage", "--", *some).split("\0"):
                if entry:
                    about, _, name = entry.partition("\t")
                    mode, blob, _ = about.split(" ")
                    found[name] = Blob(mode=mode, id=blob)
        return found

    def _into_index(self, blobs: Mapping[str, Blob | None], *, env: Mapping[str, str]) -> None:
        lines = [
            f"{blob.mode} {blob.id}\t{name}\0" if blob is not None else f"0 {NO_COMMIT}\t{name}\0"
            for name, blob in blobs.items()
        ]
        self._asked("update-index", "-z", "--index-info", env=env, data="".join(lines).encode())

    def _hooks(self, env: Mapping[str, str], message: Path) -> None:
        runs = {"pre-commit": (), "prepare-commit-msg": (str(message), "message"), "commit-msg": (str(message),)}
        with contextlib.suppress(_Failed):  # so that a hook's `git diff` sees what differs, not what was not looked at
            self._git("update-index", "-q", "--refresh", env=env)
        for hook, arguments in runs.items():
            try:
                self._git("hook", "run", "--ignore-missing", hook, "--", *arguments, env=env, timeout_s=HOOK_TIMEOUT_S)
            except _Failed as failed:
                words = str(failed) or "it said nothing"
                raise Conflict("hook_failed", f"{self.top}: the {hook} hook refused the commit: {words}") from None

    # Git

    def _says_yes(self, *arguments: str, env: Mapping[str, str] | None = None) -> bool:
        """What a command answers by its exit code alone; with words to it, it has failed."""
        try:
            self._git(*arguments, env=env)
        except _Failed as failed:
            if str(failed):
                raise Conflict("git_failed", f"{self.top}: git {arguments[0]}: {failed}") from None
            return False
        return True

    def _asked(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        data: bytes = b"",
    ) -> str:
        try:
            return self._git(*arguments, cwd=cwd, env=env, data=data)
        except _Failed as failed:
            raise Conflict("git_failed", f"{self.top}: git {arguments[0]}: {failed}") from None

    def _git(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        data: bytes = b"",
        timeout_s: float = GIT_TIMEOUT_S,
    ) -> str:
        own = {n: value for n, value in os.environ.items() if not n.startswith("GIT_") or n.startswith(_OURS_TO_PASS)}
        plain = arguments[0] != "hook"  # hooks see git as people set it up
        words = {**own, "GIT_TERMINAL_PROMPT": "0", **(_QUIET if plain else {}), **(env or {})}
        try:
            process = subprocess.Popen(
                ["git", *(_OPTIONS if plain else ()), *arguments],
                cwd=cwd or self.top,
                env=words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise _Failed(f"git can't be started: {error.strerror}") from None
        with process:
            try:
                out, err = process.communicate(data, timeout=timeout_s)
            except BaseException as error:
                _end(process)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise _Failed(f"took longer than {timeout_s:.0f} s") from None
                raise
        if process.returncode:
            raise _Failed(_last_words(err or out))
        return out.decode(errors="surrogateescape").removesuffix("\n")


def named(names: Sequence[str]) -> str:
    """Some names for an error: the first of them, and how many more."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all it started: a hook's own children too."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(said: bytes) -> str:
    text = " ".join(said.decode(errors="replace").split())
    return text if len(text) <= MAX_WORDS else f"...{text[-MAX_WORDS:]}"


def _clean(message: str) -> str:
    """One line of subject, then the rest, in text that git keeps."""
    subject, _, body = _CONTROL.sub(" ", message.replace("\r\n", "\n")).partition("\n")
    text = f"{_one_line(subject)}\n\n{body.strip()}\n" if body.strip() else f"{_one_line(subject)}\n"
    return text.encode(errors="replace").decode()


def _one_line(text: str) -> str:
    words = " ".join(_CONTROL.sub(" ", text).split())[:MAX_SUBJECT].strip()
    return words.encode(errors="replace").decode() or "Change the fleet"


def _named(text: str) -> str:
    """Without what git's author lines can't hold."""
    return _CRUD.sub("", text).strip().encode(errors="replace").decode()


def _in_parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), PATHS_AT_ONCE):
        yield names[start : start + PATHS_AT_ONCE]
