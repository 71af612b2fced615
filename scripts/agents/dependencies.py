"""Declared dependencies: which there are, how they are bounded, and which are declared but never imported."""

from __future__ import annotations

import ast
import re

from report import Report, Work, name_of, plural, run

IMPORTED_AS = {
    "pyyaml": "yaml",
    "rich-click": "rich_click",
    "common-expression-language": "cel",
    "import-linter": "importlinter",
    "prometheus-client": "prometheus_client",
    "psycopg": "psycopg",
    "pytest-timeout": "pytest_timeout",
    "pytest-xdist": "xdist",
}


def agent(work: Work) -> Report:
    """Read pyproject.toml and hold it against the imports in scope and what is installed."""
    project, installed = work.project(), work.installed()
    wanted = list(project.get("dependencies", []))
    optional = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    imported = _imported(work)
    unbounded = [line for line in wanted if not re.search(r"[<>=~!]", line)]
    unseen = [line for line in wanted if _module(line) not in imported]
    return Report(
        headline=f"{plural(len(wanted), 'dependency')} and {len(optional)} optional; {len(unbounded)} without a bound, "
        f"{len(unseen)} not imported by name",
        numbers={
            "dependencies": len(wanted),
            "optional": len(optional),
            "python": project.get("requires-python", ""),
            "installed": {name: installed[name].version for name in sorted(map(name_of, wanted)) if name in installed},
        },
        findings=[
            *(f"{line}: no lower bound" for line in unbounded),
            *(f"{line}: declared, never imported by name (a plug-in, or not needed)" for line in unseen),
        ],
    )


def _imported(work: Work) -> set[str]:
    names: set[str] = set()
    for _, tree, _ in work.modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names


def _module(requirement: str) -> str:
    name = name_of(requirement)
    return IMPORTED_AS.get(name, name.replace("-", "_"))


if __name__ == "__main__":
    run(agent)
