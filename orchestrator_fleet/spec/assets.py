"""The files that travel with a bundle: what runners name, and the fleet's own templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from orchestrator_fleet.errors import Diagnostic, SpecInvalid
from orchestrator_fleet.spec.diagnose import Locator
from orchestrator_fleet.spec.folder import MAX_LOOKED_AT, Folder, TooMany
from orchestrator_fleet.spec.model import CommandRunner, Orchestrator

MAX_ASSETS = 200
MAX_ASSET_BYTES = 4 << 20
MAX_ASSETS_BYTES = 32 << 20
MAX_TEMPLATES = 50
MAX_TEMPLATE_BYTES = 256 << 10
TEMPLATES = "templates"
_PATH_LIKE = re.compile(r"(\./)?[\w.@+][\w.@+ -]*(/[\w.@+ -]+)+")


def collect_assets(
    folder: Folder, orchestrators: Mapping[str, Orchestrator], locator: Locator
) -> tuple[dict[str, bytes], list[Diagnostic]]:
    """Path -> bytes of each file that a runner's argv or `files` name, and what is wrong with them."""
    collector = _Collector(folder, locator)
    for name, orchestrator in orchestrators.items():
        runner = orchestrator.runner
        if isinstance(runner, CommandRunner):
            at = ("orchestrators", name, "runner")
            for number, element in enumerate(runner.command):
                collector.argv(element, (*at, "command", number))
            for number, pattern in enumerate(runner.files):
                collector.glob(pattern, (*at, "files", number))
    return collector.assets, collector.problems


class _Collector:
    """Reads each file once, however many runners name it."""

    def __init__(self, folder: Folder, locator: Locator) -> None:
        self.assets: dict[str, bytes] = {}
        self.problems: list[Diagnostic] = []
        self._folder, self._locator = folder, locator
        self._bytes = 0
        self._is_file: dict[str, bool] = {}
        self._globs: dict[str, tuple[str, ...]] = {}
        self._full = False

    def argv(self, element: str, at: tuple[str | int, ...]) -> None:
        """An element of argv: a file of the folder travels; what looks like one and is not there is an error."""
        if element.startswith(("/", "-")):
            return
        pure = PurePosixPath(element)
        if ".." in pure.parts:
            if _PATH_LIKE.fullmatch(element) or element.startswith("../"):
                self._problem(at, f"{element} leaves the fleet folder", "keep what runs inside it, or name it from /")
            return
        if any(part.startswith(".") for part in pure.parts):
            if self._folder.is_file(element):
                self._problem(at, f"{element} is hidden, and so does not travel", "keep it under another name")
            return
        if element not in self._is_file:
            self._is_file[element] = self._folder.is_file(element)
        if self._is_file[element]:
            self._take(str(pure), at)
        elif _PATH_LIKE.fullmatch(element) and not self._folder.exists(element) and self._means_a_file(pure):
            self._problem(at, f"no {element} in the fleet folder", self._folder.near(str(pure)))

    def _means_a_file(self, pure: PurePosixPath) -> bool:
        """`scripts/lint` with a folder scripts, or `x/lint.py`, but not `origin/main` or `text/plain`."""
        return bool(pure.suffix) or self._folder.exists(pure.parts[0])

    def glob(self, pattern: str, at: tuple[str | int, ...]) -> None:
        """A pattern of `files`: every file that matches travels."""
        if pattern not in self._globs:
            try:
                self._globs[pattern] = self._folder.expand(pattern)
            except TooMany:
                self._problem(at, f"{pattern} looks at more than {MAX_LOOKED_AT} names", "start it with a folder")
                self._globs[pattern] = ()
                return
            if not self._globs[pattern]:
                self._problem(at, f"no file matches {pattern}", self._folder.near(pattern))
        for path in self._globs[pattern]:
            self._take(path, at)

    def _take(self, path: str, at: tuple[str | int, ...]) -> None:
        if path in self.assets or self._full:
            return
        if len(self.assets) >= MAX_ASSETS:
            self._full = True
            self._problem(at, f"more than {MAX_ASSETS} files would travel", "narrow the patterns")
            return
        try:
            data = self._folder.read(path, max_bytes=MAX_ASSET_BYTES)
        except SpecInvalid as refused:
            self._problem(at, f"{path} {refused.diagnostics[0].problem}", refused.diagnostics[0].hint)
            return
        self._bytes += len(data)
        if self._bytes > MAX_ASSETS_BYTES:
            self._full = True
            limit = MAX_ASSETS_BYTES >> 20
            self._problem(at, f"the files that would travel are over {limit} MiB", "install big files on the machines")
            return
        self.assets[path] = data

    def _problem(self, at: tuple[str | int, ...], problem: str, advice: str) -> None:
        self.problems.append(self._locator.diagnostic(at, problem, advice))


def read_templates(folder: Folder) -> tuple[dict[str, str], list[Diagnostic]]:
    """File name -> text of `templates/*.j2`, each checked for its syntax; and what is wrong with them."""
    names = folder.expand(f"{TEMPLATES}/*.j2")
    templates, problems = dict[str, str](), list[Diagnostic]()
    if len(names) > MAX_TEMPLATES:
        problem = f"has {len(names)} templates, the limit is {MAX_TEMPLATES}"
        return {}, [Diagnostic(file=TEMPLATES, problem=problem, hint="take some out")]
    for path in names:
        try:
            text = folder.read_text(path, max_bytes=MAX_TEMPLATE_BYTES)
        except SpecInvalid as refused:
            problems.extend(refused.diagnostics)
            continue
        problems.extend(_template_problems(text, file=path))
        templates[PurePosixPath(path).name] = text
    return templates, problems


def _template_problems(text: str, *, file: str) -> list[Diagnostic]:
    import jinja2.sandbox  # noqa: PLC0415 - 50 ms, only for fleets with templates of their own

    try:
        jinja2.sandbox.SandboxedEnvironment().parse(text)
    except jinja2.TemplateSyntaxError as error:
        problem = f"is no Jinja template: {str(error.message).rstrip('.')}"
        return [Diagnostic(file=file, line=error.lineno, column=1, problem=problem, hint="see the Jinja documentation")]
    except RecursionError:
        return [Diagnostic(file=file, problem="is nested too deeply", hint="write it flatter")]
    return []
