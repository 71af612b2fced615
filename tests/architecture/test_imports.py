"""What a process loads is what its users pay for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "orchestrator_fleet"
HEAVY = {"pydantic", "litestar", "sqlalchemy", "duckdb", "cel", "yaml", "jinja2", "alembic", "httpx"}


def _loaded(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_daemon_loads_nothing_of_the_control_plane() -> None:
    """Sixteen machines run many of them: each stays small."""
    assert _loaded("import orchestrator_fleet.daemon.__main__") & (HEAVY | {"rich_click", "click"}) == set()


def test_help_loads_no_command() -> None:
    """`fleet --help` answers before anything heavy is imported."""
    assert _loaded("from orchestrator_fleet.cli.main import run\nrun(['--help'])") & HEAVY == set()


@pytest.mark.parametrize("init", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_a_package_says_its_place_and_runs_nothing(init: Path) -> None:
    """An `__init__` is a docstring (and, at the root, the version)."""
    body = ast.parse(init.read_text()).body
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
    allowed = ast.Assign if init.parent == PACKAGE else ()
    assert all(isinstance(node, allowed) for node in body[1:])
