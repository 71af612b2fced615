"""Edit fleet.yaml the way a careful person would: lines are added, every other byte stays as it was.

The YAML parser's marks say where a text goes. What comes out must read as the old values and the new ones and
nothing else, and the whole fleet must be sound with it, before the file is replaced in one rename. Where there
is no such place (keys behind an alias, say) the file is left alone and the error shows the lines to add by hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator_fleet.errors import Diagnostic, FleetError, SpecInvalid
from orchestrator_fleet.spec.folder import Folder, decode
from orchestrator_fleet.spec.load import load_fleet, read_trees
from orchestrator_fleet.spec.yaml_tree import MappingNode, is_null, parse, plain

LOCK_TIMEOUT_S = 10.0
LOCK_RETRY_S = 0.05
DEFAULT_INDENT = 2
_BOM = "\ufeff"
_PLAIN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9._@/-]*(:[A-Za-z0-9._@/-]+)*")
_OTHER_TYPE = re.compile(r"(?i)true|false|null|yes|no|on|off|y|n")
_PLAIN_HASH = re.compile(r"(?=[0-9a-f]*[a-df])[0-9a-f]+")
_PLAIN_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T[0-9:.]+(Z|[+-]\d{2}:\d{2})")
_Loader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

_Fields = dict[str, str | list[str]]


def add_key(
    path: Path, *, key_id: str, owner: str, sha256: str, scopes: Sequence[str], created: str, expires: str | None
) -> Path:
    """Add a key to the fleet at `path` (its fleet.yaml); the file that was edited.

    That is the file whose `keys` section is first among fleet.yaml and its includes, else fleet.yaml itself.
    `created` and `expires` are RFC 3339. Raises SpecInvalid when the fleet is not sound, before or with the
    key, and FleetError when the file cannot be edited; the file is then as it was.
    """
    fields: _Fields = {"owner": owner, "sha256": sha256, "scopes": list(scopes), "created": created}
    if expires is not None:
        fields["expires"] = expires
    with _lock(path.parent):
        fleet = load_fleet(path)
        name = _file_for_keys(path)
        if key_id in fleet.file.keys:
            problem = "is there already"
            raise SpecInvalid([Diagnostic(file=name, path=f"keys.{key_id}", problem=problem, hint="make another key")])
        target = path.parent / name
        before = target.read_bytes()
        after = with_key(decode(before, file=name), file=name, key_id=key_id, fields=fields)
        data = (_BOM if before.startswith(_BOM.encode()) else "").encode() + after.encode()
        load_fleet(path, instead={name: data})
        try:
            _replace(target, before=before, after=data)
        except OSError as error:
            raise FleetError(f"{target}: cannot be written: {error.strerror}; check who may write there") from None
    return target


def with_key(text: str, *, file: str, key_id: str, fields: _Fields) -> str:
    """The text of a YAML file with one more entry under `keys`; raises FleetError where there is no place for it."""
    by_hand = "\n".join(["keys:", *_block(key_id, fields, indent=DEFAULT_INDENT, step=DEFAULT_INDENT)])
    old, root = parse(text, file=file), yaml.compose(text, Loader=_Loader)
    keys = old.child("keys") if isinstance(old, MappingNode) else None
    editable = is_null(keys) or isinstance(keys, MappingNode)
    if isinstance(old, MappingNode) and isinstance(root, yaml.MappingNode) and editable:
        wanted = plain(old)
        wanted["keys"] = {**(wanted.get("keys") or {}), key_id: fields}
        after = _inserted(text, root, key_id, fields)
        with contextlib.suppress(SpecInvalid):
            new = parse(after, file=file)
            if new is not None and plain(new) == wanted:
                return after
    raise FleetError(f"{file}: found no place to add a key and leave all else as it is; add it by hand:\n{by_hand}")


def _file_for_keys(path: Path) -> str:
    trees = read_trees(Folder(path.parent), path.name, problems=[])
    return next((tree.at.file for tree in trees if "keys" in tree.entries), path.name)


def _inserted(text: str, root: yaml.MappingNode, key_id: str, fields: _Fields) -> str:
    lines = text.split("\n")
    ending = "\r" if lines[0].endswith("\r") else ""
    step = _step(root)
    section = next(((key, value) for key, value in root.value if key.value == "keys"), None)
    if section is None:
        if root.flow_style:
            return _into_flow(lines, root, f"keys: {{{_flow(key_id, fields)}}}")
        column = root.start_mark.column
        new = [" " * column + "keys:", *_block(key_id, fields, indent=column + step, step=step)]
        at = _end_of_document(lines)
        blank = [""] if at and lines[at - 1].strip() else []
        return _into_lines(lines, at, [*blank, *new], ending=ending)
    key, keys = section
    one_line = keys.start_mark.line == keys.end_mark.line
    if isinstance(keys, yaml.MappingNode) and keys.flow_style and (keys.value or root.flow_style or not one_line):
        return _into_flow(lines, keys, _flow(key_id, fields))
    if isinstance(keys, yaml.MappingNode) and keys.value:
        column = keys.value[0][0].start_mark.column
        first = keys.value[0][1]
        if isinstance(first, yaml.MappingNode) and first.value and not first.flow_style:
            step = first.value[0][0].start_mark.column - column
        new = _block(key_id, fields, indent=column, step=step)
        return _into_lines(lines, _last_line(keys) + 1, new, ending=ending)
    start, end = keys.start_mark, keys.end_mark
    if one_line:  # nothing, null or {} behind the key: it goes, a comment after it stays
        line = lines[start.line]
        lines[start.line] = (line[: start.column].rstrip() + line[end.column :]) if end.column > start.column else line
    new = _block(key_id, fields, indent=key.start_mark.column + step, step=step)
    return _into_lines(lines, start.line + 1, new, ending=ending)


def _step(root: yaml.MappingNode) -> int:
    """The file's own indentation: the first block mapping inside the root tells."""
    for _, value in root.value:
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            return max(int(value.value[0][0].start_mark.column) - int(root.start_mark.column), 1)
    return DEFAULT_INDENT


def _last_line(node: yaml.Node) -> int:
    """The number (from 0) of the last line that a node's own text stands on, comments after it left out."""
    while isinstance(node, yaml.CollectionNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    ends_before_line = node.end_mark.column == 0 and node.end_mark.line > node.start_mark.line
    return int(node.end_mark.line) - (1 if ends_before_line else 0)


def _end_of_document(lines: list[str]) -> int:
    """Where a line at the end goes: before the `...` that ends a document, else after the last line."""
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].rstrip() == "...":
            return number
        if lines[number].strip() and not lines[number].lstrip().startswith("#"):
            break
    return len(lines) - 1 if not lines[-1] else len(lines)


def _into_lines(lines: list[str], at: int, new: list[str], *, ending: str) -> str:
    at = min(at, len(lines))
    before, after = lines[:at], lines[at:] or [""]
    if before and ending and not before[-1].endswith(ending):
        before[-1] += ending  # the file's last line had no line end
    return "\n".join([*before, *(line + ending for line in new), *after])


def _into_flow(lines: list[str], node: yaml.MappingNode, entry: str) -> str:
    line, column = node.end_mark.line, node.end_mark.column - 1
    head = "\n".join([*lines[:line], lines[line][:column]])
    written = head.rstrip()
    space = head[len(written) :]
    comma = "" if not node.value or written.endswith(",") else ","
    gap = "" if written.endswith("{") else " "
    return "\n".join([f"{written}{comma}{gap}{entry}{space}{lines[line][column:]}", *lines[line + 1 :]])


def _block(key_id: str, fields: _Fields, *, indent: int, step: int) -> list[str]:
    inner = " " * (indent + step)
    return [f"{' ' * indent}{key_id}:", *(f"{inner}{name}: {_value(value)}" for name, value in fields.items())]


def _flow(key_id: str, fields: _Fields) -> str:
    return f"{key_id}: {{{', '.join(f'{name}: {_value(value)}' for name, value in fields.items())}}}"


def _value(value: str | list[str]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    plain_text = _PLAIN_TEXT.fullmatch(value) and not _OTHER_TYPE.fullmatch(value)
    if plain_text or _PLAIN_HASH.fullmatch(value) or _PLAIN_TIME.fullmatch(value):
        return value
    return json.dumps(value)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One editor of a fleet at a time; raises FleetError after LOCK_TIMEOUT_S."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FleetError(f"{folder}: cannot be opened: {error.strerror}; name the folder of a fleet.yaml") from None
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise FleetError(f"{folder}: another edit has held it for {LOCK_TIMEOUT_S:.0f} s; try again")
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


def _replace(path: Path, *, before: bytes, after: bytes) -> None:
    """Put new bytes in a file's place at once and durably, mode and owner kept, if it is still as it was read."""
    target = path.resolve()
    seen = target.stat()
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(after)
            file.flush()
            os.fchmod(file.fileno(), seen.st_mode & 0o7777)
            with contextlib.suppress(PermissionError):  # only root gives files to others
                os.fchown(file.fileno(), seen.st_uid, seen.st_gid)
            os.fsync(file.fileno())
        _refuse_changed(target, before)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refuse_changed(path: Path, before: bytes) -> None:
    if path.read_bytes() != before:
        raise FleetError(f"{path}: changed while the key was added; try again")
