"""What is tested: test functions by folder, what they assert, and modules that no test names."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import PurePosixPath

from report import Report, Work, plural, run


def agent(work: Work) -> Report:
    """Count the tests in scope, and the modules outside of tests that none of them imports."""
    tests: Counter[str] = Counter()
    empty: list[str] = []
    imported: set[str] = set()
    modules: set[str] = set()
    for path, tree, _ in work.modules():
        place = PurePosixPath(path)
        if not (place.name.startswith("test_") or "tests" in place.parts):
            if place.name != "__init__.py":
                modules.add(".".join(place.with_suffix("").parts))
            continue
        imported |= _imports(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                tests[str(place.parent)] += 1
                if not _checks(node):
                    empty.append(f"{path}:{node.lineno}: {node.name} asserts nothing")
    unseen = sorted(module for module in modules if module not in imported and module.rpartition(".")[0])
    return Report(
        headline=f"{plural(tests.total(), 'test')} in {plural(len(tests), 'folder')}; {len(empty)} assert nothing, "
        f"{plural(len(unseen), 'module')} not imported by any test",
        numbers={"tests": tests.total(), "by_folder": dict(sorted(tests.items())), "modules": len(modules)},
        findings=[*empty, *(f"{module}: no test imports it" for module in unseen)],
    )


def _imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _checks(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a test can fail other than by accident: it asserts, expects an exception, or calls a checker."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert | ast.With | ast.AsyncWith):
            return True
        if isinstance(inner, ast.Call) and "assert" in ast.unparse(inner.func):
            return True
    return False


if __name__ == "__main__":
    run(agent)
