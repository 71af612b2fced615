"""Where code is hard to follow: long functions, deep nesting, many branches."""

from __future__ import annotations

import ast
from statistics import median

from report import Report, Work, plural, run

LONG_LINES = 50
MANY_BRANCHES = 10
DEEP = 4
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.BoolOp,
    ast.IfExp,
    ast.comprehension,
    ast.match_case,
)
NESTING = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def agent(work: Work) -> Report:
    """Measure every function in scope."""
    lengths: list[int] = []
    found: list[tuple[int, str]] = []
    for path, tree, _ in work.modules():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            lengths.append(lines)
            branches, depth = sum(isinstance(inner, BRANCHES) for inner in ast.walk(node)), _depth(node)
            if lines > LONG_LINES or branches > MANY_BRANCHES or depth > DEEP:
                what = f"{path}:{node.lineno}: {node.name}: {lines} lines, {branches} branches, {depth} deep"
                found.append((lines + 5 * branches + 10 * depth, what))
    middle = median(lengths) if lengths else 0
    return Report(
        headline=f"{plural(len(lengths), 'function')}, median {middle:g} lines; {len(found)} hard to follow",
        numbers={"functions": len(lengths), "median_lines": middle, "longest_lines": max(lengths, default=0)},
        findings=[what for _, what in sorted(found, reverse=True)],
    )


def _depth(node: ast.AST, depth: int = 0) -> int:
    children = [_depth(child, depth + isinstance(child, NESTING)) for child in ast.iter_child_nodes(node)]
    return max(children, default=depth)


if __name__ == "__main__":
    run(agent)
