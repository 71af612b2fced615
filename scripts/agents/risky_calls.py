"""Calls attackers look for: eval and exec, shells, unsafe loaders, disabled certificate checks."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

from report import Report, Work, plural, run

CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "pickle.load": "runs what it reads",
    "pickle.loads": "runs what it reads",
    "yaml.load": "builds any object unless told otherwise; use safe_load",
    "tempfile.mktemp": "names a file that somebody else may make first",
}


def agent(work: Work) -> Report:
    """Look at every call in every Python file in scope."""
    found = [
        (name, f"{path}:{line}: {name}: {why}") for path, tree, _ in work.modules() for line, name, why in _risky(tree)
    ]
    counts = Counter(name for name, _ in found)
    return Report(
        headline=f"{plural(len(found), 'risky call')}" + (f": {', '.join(sorted(counts))}" if counts else ""),
        numbers={"by_call": dict(counts)},
        findings=[line for _, line in found],
    )


def _risky(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in CALLS:
            yield node.lineno, name, CALLS[name]
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "shell" and value is True:
                yield node.lineno, f"{name}(shell=True)", "passes text through a shell"
            elif keyword.arg == "verify" and value is False:
                yield node.lineno, f"{name}(verify=False)", "trusts any certificate"


if __name__ == "__main__":
    run(agent)
