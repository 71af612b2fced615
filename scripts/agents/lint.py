"""Lint findings by syntax tree: unused imports, bare excepts, mutable defaults, comparisons with None."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

from report import Report, Work, plural, run


def agent(work: Work) -> Report:
    """Look at every Python file in scope."""
    found: list[tuple[str, str]] = []
    files = 0
    for path, tree, text in work.modules():
        files += 1
        found += [(rule, f"{path}:{line}: {rule}: {what}") for line, rule, what in _findings(tree, text, path)]
    rules = Counter(rule for rule, _ in found)
    worst = f", most of them {rules.most_common(1)[0][0]}" if rules else ""
    return Report(
        headline=f"{plural(len(found), 'finding')} in {plural(files, 'Python file')}{worst}",
        numbers={"files": files, "by_rule": dict(rules.most_common())},
        findings=[line for _, line in found],
    )


def _findings(tree: ast.Module, text: str, path: str) -> Iterator[tuple[int, str, str]]:
    yield from _unused_imports(tree, text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare-except", "catches everything, also Ctrl-C; name the exception"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if isinstance(default, ast.List | ast.Dict | ast.Set):
                    yield default.lineno, "mutable-default", f"{node.name} shares one value among all calls"
        elif isinstance(node, ast.Compare) and _compares_with_none(node):
            yield node.lineno, "none-comparison", "use `is None`"
        elif isinstance(node, ast.Assert) and "test" not in path:
            yield node.lineno, "assert", "vanishes under python -O; raise instead"


def _compares_with_none(node: ast.Compare) -> bool:
    return any(
        isinstance(op, ast.Eq | ast.NotEq) and isinstance(value, ast.Constant) and value.value is None
        for op, value in zip(node.ops, node.comparators, strict=True)
    )


def _unused_imports(tree: ast.Module, text: str) -> Iterator[tuple[int, str, str]]:
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            for alias in node.names:
                name = (alias.asname or alias.name).split(".")[0]
                # A name in a quoted annotation or in __all__ counts as used.
                if name not in used and text.count(name) == 1:
                    yield node.lineno, "unused-import", f"{name} is never used"


if __name__ == "__main__":
    run(agent)
