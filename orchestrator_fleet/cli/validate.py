"""`fleet validate`: every error of the spec at once, then placement, then the routing tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import rich_click as click

from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import Command, place
from orchestrator_fleet.errors import EXIT_DONE, EXIT_FAILED, Diagnostic, SpecInvalid
from orchestrator_fleet.render.fleet import render
from orchestrator_fleet.spec.diagnose import Locator
from orchestrator_fleet.spec.folder import Folder
from orchestrator_fleet.spec.load import load_fleet, read_trees
from orchestrator_fleet.spec.merge import with_includes
from orchestrator_fleet.spec.model import Fleet
from orchestrator_fleet.tasks.routing import Router

# GitHub's workflow commands: what must not stand in a message, and in a property as well.
_MESSAGE = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_PROPERTY = _MESSAGE | str.maketrans({":": "%3A", ",": "%2C"})


@click.command(cls=Command)
@click.option(
    "--format",
    "form",
    type=click.Choice(("text", "json", "github")),
    default="text",
    show_default=True,
    help="github: annotations on the pull request.",
)
def command(*, form: str) -> int:
    """Check fleet.yaml, its includes, charters, placement and routing tests.

    Every error is printed at once, with its line and what to do.
    """
    form = "json" if place().json else form
    file = place().file
    fleet, problems = check(file)
    counts = _counts(fleet) if fleet is not None else {}
    if form == "json":
        output.write_json({"valid": not problems, **counts, "diagnostics": output.diagnostics_json(problems)})
    elif form == "github":
        for problem in problems:
            output.write(f"{github(problem, folder=file.parent)}\n")
    elif problems:
        output.say("\n".join(map(str, problems)), err=True)
    if form != "json" and not problems:
        said = ", ".join(output.count(number, words.replace("_", " ")[:-1]) for words, number in counts.items())
        output.say(f"{file.name}: ok: {said}")
    return EXIT_FAILED if problems else EXIT_DONE


def check(file: Path) -> tuple[Fleet | None, Sequence[Diagnostic]]:
    """The fleet, and all that is wrong with it; no fleet when it can't even be read."""
    try:
        fleet = load_fleet(file)
    except SpecInvalid as invalid:
        return None, invalid.diagnostics
    problems = list[Diagnostic]()
    try:
        render(fleet)
    except SpecInvalid as invalid:
        problems += invalid.diagnostics
    return fleet, [*problems, *_failed_tests(file, fleet)]


def _failed_tests(file: Path, fleet: Fleet) -> list[Diagnostic]:
    """The routing tests that fail, each at what it expects."""
    failed = Router.of_spec(fleet.file.model_dump(mode="json", by_alias=True)).run_tests()
    if not failed:
        return []
    main, *included = read_trees(Folder(file.parent), file.name, problems=[])
    locator = Locator(with_includes(main, included)[0])
    advice = "`fleet route explain` shows what each rule says"
    return [
        locator.diagnostic(("routing", one.rule, "tests", one.number, "expect"), one.problem, advice) for one in failed
    ]


def _counts(fleet: Fleet) -> dict[str, int]:
    file = fleet.file
    return {
        "machines": len(file.machines),
        "orchestrators": len(file.orchestrators),
        "charters": len(fleet.charters),
        "routes": len(file.routing),
        "routing_tests": sum(len(route.tests) for route in file.routing),
        "keys": len(file.keys),
    }


def github(problem: Diagnostic, *, folder: Path) -> str:
    """A diagnostic as a workflow command; the file is named from where the command runs: the repository's root."""
    properties = {"file": os.path.relpath(folder / problem.file)}
    if problem.line:
        properties |= {"line": str(problem.line), "col": str(problem.column)}
    if problem.path:
        properties["title"] = problem.path
    told = ",".join(f"{name}={value.translate(_PROPERTY)}" for name, value in properties.items())
    text = f"{problem.problem}; {problem.hint}" if problem.hint else problem.problem
    return f"::error {told}::{text.translate(_MESSAGE)}"
