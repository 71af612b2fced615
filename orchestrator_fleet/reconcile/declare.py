"""The door for declared state: an edit of the fleet's files, as a git commit or as a branch to be merged.

    lock ─▶ finish what a killed one began ─▶ refuse a work tree in use ─▶ what stands there ─▶ `make` ─▶ draft
        ─▶ commit (nothing points at it) ─▶ intent ─▶ laid beside the files ─▶ HEAD ─▶ swapped in ─▶ index ─▶ done

Whoever is killed on the way leaves either nothing but a loose object, or an intent that says all that is to be done:
the next one does it. A person's edit is never overwritten: the files are exchanged, and what comes out must be what was
read; else all goes back, HEAD too. `make` runs under the lock, so that its checks and the edit are one step.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from orchestrator_fleet.errors import Conflict, SpecInvalid
from orchestrator_fleet.reconcile.repository import Author, Blob, Repository, named
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec import exchange
from orchestrator_fleet.spec.entry import NotEditable
from orchestrator_fleet.spec.exchange import EditedMeanwhile, Put
from orchestrator_fleet.spec.model import Charter, FleetFile
from orchestrator_fleet.spec.writeback import (
    Busy,
    Change,
    Draft,
    Edit,
    NewFile,
    Raw,
    Section,
    Standing,
    drafted,
    lock,
    standing,
)

__all__ = ["Author", "Change", "Declaration", "Declared", "Edit", "NewFile", "Section", "declare", "finish"]

INTENT = "declaring.json"
MAX_SLUG = 60
INDEX_WAIT_S, INDEX_RETRY_S = 3.0, 0.1
_NEW_MODE = "100644"


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What stands in the files now, under the lock: it can't change before the edit that is made of it."""

    fleet: FleetFile
    charters: dict[str, Charter]
    commit: str
    entries: dict[Section, dict[str, Raw]]

    def raw(self, section: Section, name: str) -> Raw | None:
        """An entry as it is written, defaults not merged; None where there is none."""
        return self.entries[section].get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What came of it. `changed` is False where all of it read so already: `commit` is then HEAD.

    `diff` is a patch (git's), `files` are names inside the fleet folder, `branch` is set by `propose` alone.
    """

    commit: str
    branch: str | None
    diff: str
    files: tuple[str, ...]
    changed: bool
    changes: tuple[Change, ...]


Make = Callable[[Declaration], Sequence[Edit | NewFile]]
Subject = str | Callable[[Sequence[Change]], str]


def declare(
    fleet_file: Path, *, make: Make, author: Author, subject: Subject, body: str = "", propose: bool = False
) -> Declared:
    """Edit the fleet's files as `make` says of what stands there, and commit that by `author`.

    With `propose` the commit is on a branch of its own, and HEAD and the files stay. Blocks: files, git, hooks.

    Raises what `make` raises; SpecInvalid when the fleet would be unsound with it; Conflict with one of the codes
    fleet_unsound, no_git, dirty_work_tree, head_moved, edited_meanwhile, hook_failed, not_in_git, not_editable,
    file_exists, busy, not_writable, git_failed. Nothing is changed then.
    """
    with _told(fleet_file), lock(fleet_file.parent):
        git = Repository(fleet_file.parent)
        _finish(fleet_file, git)
        base = git.head()
        now = _standing(fleet_file)
        _refuse_in_use(git, fleet_file, now)
        if not propose:
            _refuse_lost(git)
        edits = make(Declaration(fleet=now.fleet.file, charters=now.fleet.charters, commit=base, entries=now.entries))
        draft = _drafted(git, fleet_file, edits, now)
        changes = tuple(draft.changes)
        _refuse_unknown_charters(git, fleet_file, draft)
        if not draft.after:
            return Declared(commit=base, branch=None, diff="", files=(), changed=False, changes=())
        title = subject if isinstance(subject, str) else subject(changes)
        commit = _committed(
            git, fleet_file, draft, base, author=author, message=f"{title}\n\n{body}", fleet=now.fleet.file.fleet
        )
        files, diff, branch = tuple(sorted(draft.after)), git.diff(base, commit), None
        if propose:
            branch = _branch_name(title, commit)
            git.branch(branch, commit)
        else:
            _put_in_place(fleet_file, git, draft.puts(fleet_file.parent), base, commit, why=title)
        return Declared(commit=commit, branch=branch, diff=diff, files=files, changed=True, changes=changes)


def finish(fleet_file: Path) -> bool:
    """Finish what a declare that was killed had begun; whether there was something. `declare` does it itself."""
    if not _intent_file(fleet_file).exists():
        return False
    with _told(fleet_file), lock(fleet_file.parent):
        return _finish(fleet_file, Repository(fleet_file.parent))


@contextlib.contextmanager
def _told(fleet_file: Path) -> Iterator[None]:
    """What the parts below say, as Conflicts."""
    try:
        yield
    except Busy as busy:
        raise Conflict("busy", str(busy)) from None
    except NotEditable as refused:
        raise Conflict("not_editable", str(refused)) from None
    except EditedMeanwhile as edited:
        raise Conflict("edited_meanwhile", str(edited)) from None
    except FileExistsError as there:
        raise Conflict("file_exists", str(there)) from None
    except OSError as error:
        where = error.filename or fleet_file
        problem = f"{where}: cannot be written: {error.strerror}; check who may write there, and the room on the disk"
        raise Conflict("not_writable", problem) from None


def _standing(fleet_file: Path) -> Standing:
    try:
        return standing(fleet_file)
    except SpecInvalid as wrong:
        raise Conflict("fleet_unsound", f"the fleet's files are wrong as they stand; correct them: {wrong}") from None


def _drafted(git: Repository, fleet_file: Path, edits: Sequence[Edit | NewFile], now: Standing) -> Draft:
    try:
        return drafted(fleet_file, edits, now=now, keeps=lambda name: _kept(git, fleet_file, name))
    except SpecInvalid:
        changed = git.changed()
        if changed:  # somebody saves a file just now, and half of it was read: not the caller's doing
            problem = f"{git.top}: changed while the edit was made: {named(changed)}; try again"
            raise Conflict("edited_meanwhile", problem) from None
        raise


# Refusals


def _refuse_in_use(git: Repository, fleet_file: Path, now: Standing) -> None:
    """Refuse where somebody is at work: their half-done edit would be committed with ours."""
    what = git.under_way()
    if what is not None:
        problem = f"{git.top}: {what} is under way there; finish or abort it, and try again"
        raise Conflict("dirty_work_tree", problem)
    changed = git.changed()
    if changed:
        problem = f"{git.top}: not committed: {named(changed)}; commit, stash or restore that, and try again"
        raise Conflict("dirty_work_tree", problem)
    folder = fleet_file.parent
    files = [*(tree.at.file for tree in now.trees), *now.fleet.charters]
    untracked = git.untracked([name for file in files if (name := git.inside(folder / file)) is not None])
    if untracked:
        problem = f"{git.top}: the fleet's files that git does not know: {named(untracked)}; commit them, and try again"
        raise Conflict("dirty_work_tree", problem)


def _refuse_lost(git: Repository) -> None:
    """Refuse where a commit would not stay: nobody's next checkout or commit may undo it unseen."""
    if not git.on_a_branch():
        raise Conflict("detached_head", f"{git.top}: HEAD is on no branch; check one out, and try again")
    until = time.monotonic() + INDEX_WAIT_S
    while (held := git.index_lock()) is not None:
        if time.monotonic() > until:
            cure = "try again when it is done; if none runs, it was killed: remove that file"
            raise Conflict("busy", f"{held}: another git command holds the index; {cure}")
        time.sleep(INDEX_RETRY_S)


def _refuse_unknown_charters(git: Repository, fleet_file: Path, draft: Draft) -> None:
    """Refuse an edit that names a charter which no clone of the commit would have."""
    named_now = [f for f in draft.charters if f not in draft.after]
    inside = [(file, git.inside(fleet_file.parent / file)) for file in named_now]
    unknown = git.untracked([name for _, name in inside if name is not None])
    lost = [file for file, name in inside if name is None or name in unknown or git.ignored(name)]
    if lost:
        raise Conflict("not_in_git", f"{named(lost)}: git does not have it; commit it first, or send `charter_text`")


def _kept(git: Repository, fleet_file: Path, name: str) -> bool:
    inside = git.inside(fleet_file.parent / name)
    return inside is not None and not git.ignored(inside)


def _committed(
    git: Repository, fleet_file: Path, draft: Draft, base: str, *, author: Author, message: str, fleet: str
) -> str:
    """A commit of the draft, that nothing points at yet."""
    names = {file: git.inside(fleet_file.parent / file) for file in draft.after}
    there = git.blobs(base, [name for name in names.values() if name is not None])
    blobs: dict[str, Blob | None] = {}
    for file, name in names.items():
        before, after = draft.before[file], draft.after[file]
        if name is None or git.ignored(name):
            cure = "change it by hand, or move what stands there to a file that git has"
            raise Conflict("not_in_git", f"{file}: git does not keep this file; {cure}")
        known = there.get(name)
        if (None if known is None else known.id) != (None if before is None else git.blob_id(name, before)):
            cure = "commit or restore it, and try again"
            raise Conflict("dirty_work_tree", f"{file}: is not what HEAD has, though git calls it unchanged; {cure}")
        mode = _NEW_MODE if known is None else known.mode
        blobs[name] = None if after is None else Blob(mode=mode, id=git.blob_id(name, after, keep=True))
    email = f"fleet@{fleet}.invalid"
    return git.commit(base, blobs, author=author, message=message, committer_email=email)


def _branch_name(subject: str, commit: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", subject.lower())[:MAX_SLUG].strip("-")
    return f"fleet/{slug or 'change'}-{commit[:8]}"


# The step from old to new


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """One file of an intent; what it holds is in base 64."""

    path: str
    before: str | None
    after: str | None

    @classmethod
    def of(cls, put: Put) -> _File:
        """Of what is to be put."""
        return cls(path=str(put.path), before=_coded(put.before), after=_coded(put.after))

    def put(self) -> Put:
        """The opposite of `of`."""
        return Put(path=Path(self.path), before=_decoded(self.before), after=_decoded(self.after))


class _Intent(msgspec.Struct, frozen=True, kw_only=True):
    """All that is to be done once HEAD is `commit`, and that is to be forgotten while it is not."""

    base: str
    commit: str
    files: list[_File]


def _put_in_place(fleet_file: Path, git: Repository, puts: Sequence[Put], base: str, commit: str, *, why: str) -> None:
    """Make the commit HEAD and the files what it has; all of it or nothing."""
    intent = _intent_file(fleet_file)
    try:
        _write_intent(intent, _Intent(base=base, commit=commit, files=[_File.of(put) for put in puts]))
        for put in puts:
            exchange.lay(put)
        for put in puts:
            exchange.refuse_edited(put)
        git.advance(base, commit, why=f"fleet: {why}")
    except BaseException:
        _forget(intent, puts)
        raise
    _swap_all(git, intent, puts, base, commit)
    done = _restaged(git, puts, base, commit)
    _forget(intent if done else None, puts)
    git.after_commit()


def _swap_all(git: Repository, intent: Path, puts: Sequence[Put], base: str, commit: str) -> None:
    done: list[Put] = []
    try:
        for put in puts:
            exchange.swap(put)
            done.append(put)
    except (EditedMeanwhile, OSError):
        for put in reversed(done):
            with contextlib.suppress(EditedMeanwhile, OSError):  # edited in its turn: theirs
                exchange.undo(put)
        git.advance(commit, base, why="fleet: taken back")
        _forget(intent, puts)
        raise


def _restaged(git: Repository, puts: Sequence[Put], base: str, commit: str) -> bool:
    """Bring the index along, waiting a little for who holds it; if that is long, the next declare does it."""
    names = [name for put in puts if (name := git.inside(put.path)) is not None]
    until = time.monotonic() + INDEX_WAIT_S
    while True:
        try:
            git.restage(base, commit, names)
        except Conflict:
            if time.monotonic() > until:
                return False
            time.sleep(INDEX_RETRY_S)
        else:
            return True


def _finish(fleet_file: Path, git: Repository) -> bool:
    path = _intent_file(fleet_file)
    try:
        intent = msgspec.json.decode(path.read_bytes(), type=_Intent)
    except FileNotFoundError:
        return False
    except (msgspec.MsgspecError, ValueError):
        path.unlink()  # it is replaced by one rename: this is no intent of ours
        return False
    puts = [file.put() for file in intent.files]
    if git.holds(intent.commit):
        for put in puts:
            with contextlib.suppress(EditedMeanwhile):  # somebody works on it: theirs, on top of the commit
                exchange.resume(put)
        if not _restaged(git, puts, intent.base, intent.commit):
            raise Conflict("git_failed", f"{git.top}: another git command holds the index; try again when it is done")
    else:
        _take_back_new_files(git, puts)
    _forget(path, puts)
    return True


def _take_back_new_files(git: Repository, puts: Sequence[Put]) -> None:
    """Files of a commit that somebody reset away before the index knew of them: git left those behind."""
    names = {name: put for put in puts if put.before is None and (name := git.inside(put.path)) is not None}
    for name in git.untracked(names):
        if exchange.read(names[name].path) == names[name].after:
            names[name].path.unlink()


def _forget(intent: Path | None, puts: Sequence[Put]) -> None:
    for put in puts:
        with contextlib.suppress(OSError):
            exchange.clear(put)
    if intent is not None:
        intent.unlink(missing_ok=True)  # last: while it is there, somebody looks after the rest


def _intent_file(fleet_file: Path) -> Path:
    return State(fleet_file).dir / INTENT


def _write_intent(path: Path, intent: _Intent) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{INTENT}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(intent))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _coded(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _decoded(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)
