"""The fleet's files, edited by a program: entries of fleet.yaml and its includes, and new files.

    standing (what is declared now) ─▶ draft (which files, and what each would hold) ─▶ checked as a whole ─▶ written

`entry` edits one text, `exchange` puts it in a file's place. Nothing touches the disk before the whole fleet is sound
with it. `fleet key` writes here into a person's work tree; what the API declares is committed, by `reconcile.declare`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from orchestrator_fleet.errors import Diagnostic, FleetError, Invalid, SpecInvalid
from orchestrator_fleet.spec import exchange
from orchestrator_fleet.spec.entry import new_text, with_entry
from orchestrator_fleet.spec.folder import Folder, decode
from orchestrator_fleet.spec.load import MAX_INCLUDED_FILES, load_fleet, read_trees
from orchestrator_fleet.spec.model import Fleet
from orchestrator_fleet.spec.yaml_tree import ListNode, MappingNode, ScalarNode, is_null, plain

LOCK_TIMEOUT_S = 10.0
LOCK_RETRY_S = 0.05
_BOM = "\ufeff".encode()
_SPECIAL = "*?["

Section = Literal["orchestrators", "keys"]
Raw = dict[str, Any]
Keeps = Callable[[str], bool]


class Busy(FleetError):
    """Another edit of this fleet takes too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One entry of one section as it is to read, or None to take it out.

    Plain values as in fleet.yaml, defaults not merged. What keeps its value keeps its lines, comments and quoting.
    """

    section: Section
    name: str
    value: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file that is not there yet, such as a charter; `path` is inside the fleet folder."""

    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an edit comes to: the entry as written before and after; None where there was none, or is none now."""

    section: Section
    name: str
    before: Raw | None
    after: Raw | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is declared now: the checked fleet, each entry as it is written, and the trees of all its files."""

    fleet: Fleet
    entries: dict[Section, dict[str, Raw]]
    trees: Sequence[MappingNode]


@dataclass(slots=True)
class Draft:
    """Files of a fleet as they are and as they would be, by path inside its folder; None where there is none.

    `charters` are those that it would name, and does not name now.
    """

    before: dict[str, bytes | None] = field(default_factory=dict)
    after: dict[str, bytes | None] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    charters: tuple[str, ...] = ()

    def puts(self, folder: Path) -> list[exchange.Put]:
        """What is to be put where; links are followed."""
        return [
            exchange.Put(path=(folder / name).resolve(), before=self.before[name], after=after)
            for name, after in sorted(self.after.items())
        ]


def standing(path: Path) -> Standing:
    """What the fleet at `path` (its fleet.yaml) declares now; raises SpecInvalid."""
    fleet = load_fleet(path)
    entries: dict[Section, dict[str, Raw]] = {section: {} for section in get_args(Section)}
    trees = read_trees(Folder(path.parent), path.name, problems=[])
    for tree in trees:
        for section, known in entries.items():
            written = tree.child(section)
            if isinstance(written, MappingNode):
                known.update({name: plain(entry.node) or {} for name, entry in written.entries.items()})
    return Standing(fleet=fleet, entries=entries, trees=trees)


def drafted(path: Path, edits: Sequence[Edit | NewFile], *, now: Standing, keeps: Keeps | None = None) -> Draft:
    """What the files would hold instead of what stands there now, checked as a whole. Touches no disk.

    `keeps` says of a path whether git keeps what stands there: new entries then go where it does, and into a file of
    their own where an `include` provides for that, so that changes of different entries never touch one file.
    Without it a new entry goes to the first file that has its section.

    Raises SpecInvalid when the fleet would be unsound, NotEditable, Invalid for a path, FileExistsError.
    """
    draft, seen = Draft(), set[tuple[str, str]]()
    for edit in edits:
        if isinstance(edit, NewFile):
            _add_file(path.parent, draft, edit)
        elif (edit.section, edit.name) in seen:
            raise ValueError(f"{edit.section}.{edit.name}: edited twice in one step")
        else:
            seen.add((edit.section, edit.name))
            changed = Folder(path.parent, instead=draft.after)
            trees = read_trees(changed, path.name, problems=[]) if draft.after else now.trees
            _edit(path, draft, edit, keeps, trees)
    for name in [name for name, after in draft.after.items() if after == draft.before[name]]:
        del draft.before[name], draft.after[name]
    if draft.after:
        named = load_fleet(path, instead=draft.after).charters
        draft.charters = tuple(sorted(set(named) - set(now.fleet.charters)))
    return draft


def add_key(
    path: Path, *, key_id: str, owner: str, sha256: str, scopes: Sequence[str], created: str, expires: str | None
) -> Path:
    """Add a key to the fleet at `path` (its fleet.yaml); the file that was edited.

    That is the file whose `keys` section is first among fleet.yaml and its includes, else fleet.yaml itself.
    `created` and `expires` are RFC 3339. Raises SpecInvalid when the fleet is not sound, before or with the
    key, and FleetError when the file cannot be edited; the file is then as it was.
    """
    value: Raw = {"owner": owner, "sha256": sha256, "scopes": list(scopes), "created": created}
    if expires is not None:
        value["expires"] = expires

    def make(now: Standing) -> list[Edit]:
        if key_id in now.entries["keys"]:
            problem = "is there already"
            at = Diagnostic(file=path.name, path=f"keys.{key_id}", problem=problem, hint="make another key")
            raise SpecInvalid([at])
        return [Edit(section="keys", name=key_id, value=value)]

    return edit_files(path, make)[0]


def edit_files(path: Path, make: Callable[[Standing], Sequence[Edit]]) -> list[Path]:
    """Edit the files of a person's work tree by what stands there; the edited files in the order of the edits.

    Nothing is committed.

    Raises what `make`, `standing` and `drafted` raise, and FleetError when a file can't be written; nothing is then
    changed.
    """
    with lock(path.parent):
        now = standing(path)
        draft = drafted(path, make(now), now=now)
        puts = draft.puts(path.parent)
        write(puts)
    return [path.parent / name for name in draft.after]


def write(puts: Sequence[exchange.Put]) -> None:
    """Put all of them in place, or none; raises EditedMeanwhile, or FleetError when the disk says no."""
    done: list[exchange.Put] = []
    at = Path()
    try:
        for put in puts:
            at = put.path
            exchange.lay(put)
        for put in puts:
            at = put.path
            exchange.swap(put)
            done.append(put)
    except BaseException as error:
        for put in reversed(done):
            with contextlib.suppress(exchange.EditedMeanwhile, OSError):  # somebody has it in hand: theirs
                exchange.undo(put)
        if isinstance(error, OSError):
            raise FleetError(f"{at}: cannot be written: {error.strerror}; check who may write there") from None
        raise
    finally:
        for put in puts:
            with contextlib.suppress(OSError):
                exchange.clear(put)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One editor of a fleet at a time; raises Busy after LOCK_TIMEOUT_S."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FleetError(f"{folder}: cannot be opened: {error.strerror}; name the folder of a fleet.yaml") from None
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise Busy(f"{folder}: another edit has held it for {LOCK_TIMEOUT_S:.0f} s; try again")
            time.sleep(LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _edit(path: Path, draft: Draft, edit: Edit, keeps: Keeps | None, trees: Sequence[MappingNode]) -> None:
    name = _file_of(edit, trees, keeps)
    now = draft.after[name] if name in draft.after else exchange.read(path.parent / name)
    draft.before.setdefault(name, now)
    written = next((tree for tree in trees if _names(tree, edit.section, edit.name)), None)
    before = None if written is None else _value(written, edit)
    if now is None:
        if edit.value is None:
            return
        text = new_text(section=edit.section, name=edit.name, value=edit.value)
    elif edit.value is None and before is None:
        return
    else:
        text = with_entry(decode(now, file=name), file=name, section=edit.section, name=edit.name, value=edit.value)
    data = (_BOM if now is not None and now.startswith(_BOM) else b"") + text.encode()
    if data == now:
        return
    bare = edit.value is None and keeps is not None and name != path.name
    draft.after[name] = None if bare and _says_nothing(path, draft, name, data) else data
    draft.changes.append(
        Change(
            section=edit.section,
            name=edit.name,
            before=before,
            after=None if edit.value is None else dict(edit.value),
        )
    )


def _file_of(edit: Edit, trees: Sequence[MappingNode], keeps: Keeps | None) -> str:
    """Where an entry stands, or belongs."""
    main = trees[0].at.file
    for tree in trees:
        if _names(tree, edit.section, edit.name):
            return tree.at.file
    if keeps is not None:
        own = _own_file(edit, trees[0], keeps)
        room = len(trees) <= MAX_INCLUDED_FILES
        if own is not None and (room or any(tree.at.file == own for tree in trees)):
            return own
    for tree in trees:
        if edit.section in tree.entries and (keeps is None or keeps(tree.at.file)):
            return tree.at.file
    return main


def _own_file(edit: Edit, main: MappingNode, keeps: Keeps) -> str | None:
    """`fleet.d/<name>.yaml` where an include says `fleet.d/*.yaml` and git keeps it."""
    owner = str((edit.value or {}).get("owner", ""))
    word = edit.name if edit.section == "orchestrators" else owner.rpartition(":")[2]
    patterns = main.child("include")
    for item in patterns.items.values() if isinstance(patterns, ListNode) else ():
        pattern = str(item.value) if isinstance(item, ScalarNode) else ""
        folder, name = str(PurePosixPath(pattern).parent), PurePosixPath(pattern).name
        one_star = name.count("*") == 1 and not any(mark in name.replace("*", "") + folder for mark in _SPECIAL)
        if one_star and word and keeps(own := str(PurePosixPath(folder) / name.replace("*", word))):
            return own
    return None


def _names(tree: MappingNode, section: str, name: str) -> bool:
    written = tree.child(section)
    return isinstance(written, MappingNode) and name in written.entries


def _value(tree: MappingNode, edit: Edit) -> Raw:
    written = tree.child(edit.section)
    node = written.child(edit.name) if isinstance(written, MappingNode) else None
    return dict(plain(node) or {}) if node is not None else {}


def _says_nothing(path: Path, draft: Draft, name: str, data: bytes) -> bool:
    """Whether an included file holds nothing any more, no comment either, so that it can go."""
    if b"#" in data:
        return False
    trees = read_trees(Folder(path.parent, instead={**draft.after, name: data}), path.name, problems=[])
    tree = next((tree for tree in trees if tree.at.file == name), None)
    return tree is not None and all(
        is_null(entry.node) or (isinstance(entry.node, MappingNode) and not entry.node.entries)
        for entry in tree.entries.values()
    )


def _add_file(folder: Path, draft: Draft, new: NewFile) -> None:
    """Refuses what would leave the folder, and names that begin with a dot: git's and our own folders do."""
    pure = PurePosixPath(new.path)
    odd = pure.is_absolute() or not pure.parts or any(not part.isprintable() for part in pure.parts)
    if (
        odd
        or "\\" in new.path
        or any(part.startswith(".") for part in pure.parts)
        or not Folder(folder).is_inside(new.path)
    ):
        raise Invalid([("path", f"got {new.path!r}, wanted a path inside the fleet folder, no part starting with .")])
    name = str(pure)
    if name in draft.after or os.path.lexists(folder / name):
        raise FileExistsError(f"{name}: is there already; name a file that is not")
    draft.before[name], draft.after[name] = None, new.text.encode()
