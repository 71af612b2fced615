"""Charters: Markdown whose front matter, between two `---` lines, is typed and enforced."""

from __future__ import annotations

from orchestrator_fleet.errors import Diagnostic, SpecInvalid
from orchestrator_fleet.spec.diagnose import validate
from orchestrator_fleet.spec.folder import Folder
from orchestrator_fleet.spec.model import Charter, CharterFront
from orchestrator_fleet.spec.yaml_tree import MappingNode, kind, parse

MAX_CHARTER_BYTES = 256 << 10
_FENCE = "---"


def read_charter(folder: Folder, path: str) -> Charter:
    """Read and check one charter; raises SpecInvalid with every problem of the file."""
    text = folder.read_text(path, max_bytes=MAX_CHARTER_BYTES)
    front_text, prose = _split(text, file=path)
    tree = parse(front_text, file=path, first_line=2) if front_text is not None else None
    front: CharterFront | None = CharterFront()
    problems: list[Diagnostic] = []
    if isinstance(tree, MappingNode):
        checked = validate(CharterFront, tree)
        front, problems = checked.value, list(checked.problems)
    elif tree is not None:
        wanted = f"front matter: got {kind(tree)}, wanted a mapping"
        problems = [Diagnostic(file=path, line=tree.at.line, column=tree.at.column, problem=wanted)]
    if not prose.strip():
        problems.append(Diagnostic(file=path, problem="has no prose", hint="write the mandate below the front matter"))
    if problems or front is None:
        raise SpecInvalid(problems)
    return Charter(path=path, front=front, prose=prose)


def _split(text: str, *, file: str) -> tuple[str | None, str]:
    """(front matter or None, prose)."""
    lines = text.split("\n")
    if lines[0].rstrip() != _FENCE:
        return None, text
    for number, line in enumerate(lines[1:], start=1):
        if line.rstrip() == _FENCE:
            return "\n".join(lines[1:number]) + "\n", "\n".join(lines[number + 1 :]).lstrip("\r\n")
    problem = "front matter opens with --- and never closes"
    raise SpecInvalid(
        [Diagnostic(file=file, line=1, column=1, problem=problem, hint="end it with a line of --- before the prose")]
    )
