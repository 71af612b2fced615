"""The one way in: fleet.yaml, its includes, charters, templates and assets -> a checked Fleet.

    read -> join includes -> merge defaults -> shapes (pydantic) -> references -> charters, assets, templates

Each step reports all it finds and passes on what is sound, so that one run names everything that is wrong.
Files are named relative to the folder of fleet.yaml.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator_fleet.errors import Diagnostic, SpecInvalid
from orchestrator_fleet.spec import assets, charters, merge, references
from orchestrator_fleet.spec.diagnose import Locator, validate
from orchestrator_fleet.spec.folder import MAX_LOOKED_AT, MAX_YAML_BYTES, Folder, TooMany
from orchestrator_fleet.spec.model import Charter, Fleet, FleetFile
from orchestrator_fleet.spec.yaml_tree import (
    Entry,
    ListNode,
    MappingNode,
    Node,
    Place,
    Scalar,
    ScalarNode,
    kind,
    parse,
    tree_of,
)

MAX_DIAGNOSTICS = 100
MAX_INCLUDED_FILES = 1_000
MAX_INCLUDED_BYTES = 16 << 20
_STAND_INS: dict[str, Scalar] = {"version": 1, "fleet": "unnamed"}
_AFTER_ALL_FILES = "…"  # sorts after every file name
GIVEN = Place(file="given", line=0, column=0)  # where `entries` stand

Entries = Mapping[str, Mapping[str, Any]]


def load_fleet(
    path: Path, *, instead: Mapping[str, bytes | None] | None = None, entries: Entries | None = None
) -> Fleet:
    """Read and check a fleet; raises SpecInvalid with every diagnostic (MAX_DIAGNOSTICS of them) at once.

    What would be, if: `instead` maps paths inside the fleet folder to bytes to use in place of the file's, or to None
    for a file that is to go. `entries` has, by section and name, values to use in place of those written (or beside
    them), and None for what goes.
    """
    folder, problems = Folder(path.parent, instead=instead), list[Diagnostic]()
    _refuse_no_file(folder, path)
    main, *included = read_trees(folder, path.name, problems=problems)
    tree, found = merge.with_includes(main, included)
    problems += found
    tree = _with_entries(tree, entries or {})
    tree, found = merge.with_defaults(tree)
    problems += found
    checked = validate(FleetFile, tree, stand_ins=_STAND_INS)
    problems += checked.problems
    fleet = None
    if checked.value is not None:
        declared = references.Declared(
            machines=_names(tree, "machines"), orchestrators=_names(tree, "orchestrators"), mended=checked.mended
        )
        locator = Locator(checked.tree)
        problems += [
            locator.diagnostic(finding.path, finding.problem, finding.hint, key=finding.key)
            for finding in references.check(checked.value, declared=declared)
        ]
        fleet = _with_files(folder, checked.value, locator, problems)
    if problems or fleet is None:
        raise SpecInvalid(_bounded(problems))
    return fleet


def _with_entries(tree: MappingNode, changed: Entries) -> MappingNode:
    """The tree with some entries of its sections replaced, added or taken out."""
    sections = dict(tree.entries)
    for section, values in changed.items():
        written = tree.child(section)
        there = dict(written.entries) if isinstance(written, MappingNode) else {}
        for name, value in values.items():
            if value is None:
                there.pop(name, None)
            else:
                there[name] = Entry(GIVEN, tree_of(value, at=GIVEN))
        key_at = tree.entries[section].key_at if section in tree.entries else GIVEN
        sections[section] = Entry(key_at, MappingNode(key_at, there))
    return MappingNode(tree.at, sections)


def read_trees(folder: Folder, name: str, *, problems: list[Diagnostic]) -> list[MappingNode]:
    """The main file's tree, then those of its included files, each knowing its file's name.

    Raises SpecInvalid when the main file cannot be read; what is wrong with an included one goes to `problems`.
    """
    main = _read_mapping(folder, name)
    return [main, *_read_includes(folder, main, name, problems)]


def _refuse_no_file(folder: Folder, path: Path) -> None:
    if os.path.isdir(path):  # noqa: PTH112 - also False for what no path can be
        raise SpecInvalid(
            [Diagnostic(file=str(path), problem="is a folder, wanted a file", hint="name its fleet.yaml")]
        )
    if not folder.exists(path.name):
        advice = folder.near(path.name) or "`fleet init` writes a first one, -f FILE names another"
        raise SpecInvalid([Diagnostic(file=str(path), problem="does not exist", hint=advice)])


def _read_mapping(folder: Folder, name: str) -> MappingNode:
    tree = parse(folder.read_text(name), file=name)
    if isinstance(tree, MappingNode):
        return tree
    if tree is None or (isinstance(tree, ScalarNode) and tree.value is None):
        raise SpecInvalid([Diagnostic(file=name, problem="is empty", hint="a fleet starts with `version: 1`")])
    problem = f"got {kind(tree)}, wanted a mapping"
    hint = "a fleet starts with `version: 1`"
    raise SpecInvalid([Diagnostic(file=name, line=tree.at.line, column=tree.at.column, problem=problem, hint=hint)])


def _read_includes(folder: Folder, main: MappingNode, main_name: str, problems: list[Diagnostic]) -> list[MappingNode]:
    """The included files in the order of `include`, each glob's sorted; a file that two globs match counts once."""
    patterns = main.child("include")
    trees, seen, total = list[MappingNode](), {main_name}, 0
    for number, item in patterns.items.items() if isinstance(patterns, ListNode) else ():
        for name in _matches(folder, item, f"include[{number}]", problems):
            if name in seen:
                continue
            seen.add(name)
            if len(trees) >= MAX_INCLUDED_FILES or total > MAX_INCLUDED_BYTES:
                limit = f"{MAX_INCLUDED_FILES} files and {MAX_INCLUDED_BYTES >> 20} MiB"
                problems.append(_at(item, f"include[{number}]", f"includes more than {limit}", "join some files"))
                return trees
            try:
                total += len(folder.read(name, max_bytes=MAX_YAML_BYTES))
                trees.append(_read_mapping(folder, name))
            except SpecInvalid as refused:
                problems += refused.diagnostics
    return trees


def _matches(folder: Folder, item: Node, path: str, problems: list[Diagnostic]) -> tuple[str, ...]:
    """Files that one `include` item names. A glob may match nothing; a name must exist."""
    pattern = item.value if isinstance(item, ScalarNode) else None
    if not isinstance(pattern, str) or not pattern or pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        return ()  # the model says what is wrong with it
    try:
        names = folder.expand(pattern)
    except TooMany:
        problem = f"{pattern} looks at more than {MAX_LOOKED_AT} names"
        problems.append(_at(item, path, problem, "start it with a folder"))
        return ()
    if not names and not any(character in pattern for character in "*?["):
        problems.append(_at(item, path, f"no {pattern}", folder.near(pattern)))
    return names


def _with_files(folder: Folder, file: FleetFile, locator: Locator, problems: list[Diagnostic]) -> Fleet:
    read: dict[str, Charter | None] = {}
    for name, orchestrator in file.orchestrators.items():
        path = orchestrator.charter
        if path in read:
            continue
        read[path] = None
        if not folder.exists(path):
            problems.append(
                locator.diagnostic(("orchestrators", name, "charter"), f"no {path}", folder.near(path) or "write it")
            )
            continue
        try:
            read[path] = charters.read_charter(folder, path)
        except SpecInvalid as refused:
            problems += refused.diagnostics
    found_assets, found = assets.collect_assets(folder, file.orchestrators, locator)
    problems += found
    templates, found = assets.read_templates(folder)
    problems += found
    return Fleet(
        file=file,
        charters={path: charter for path, charter in read.items() if charter is not None},
        assets=found_assets,
        templates=templates,
    )


def _names(tree: MappingNode, section: str) -> frozenset[str]:
    node = tree.child(section)
    return frozenset(node.entries) if isinstance(node, MappingNode) else frozenset()


def _at(node: Node, path: str, problem: str, hint: str) -> Diagnostic:
    at = node.at
    return Diagnostic(file=at.file, line=at.line, column=at.column, path=path, problem=problem, hint=hint)


def _bounded(problems: list[Diagnostic]) -> list[Diagnostic]:
    """Sorted, each place's problem once, MAX_DIAGNOSTICS at most and then how many more."""
    ordered = SpecInvalid(problems).diagnostics
    unique = list({(d.file, d.line, d.column, d.problem): d for d in reversed(ordered)}.values())[::-1]
    if len(unique) <= MAX_DIAGNOSTICS:
        return unique
    more = Diagnostic(
        file=_AFTER_ALL_FILES, problem=f"and {len(unique) - MAX_DIAGNOSTICS} more", hint="correct these first"
    )
    return [*unique[:MAX_DIAGNOSTICS], more]
