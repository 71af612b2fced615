"""A skipped test is loud, and a failure where nothing may be missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"
TESTS = """
import pytest

def test_skipped():
    pytest.skip("needs a database; apt-get install one")

@pytest.mark.xfail
def test_expected_to_fail():
    assert False

def test_fine():
    pass
"""


def _pytest(folder: Path, *, ci: str, name: str, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / name).write_text(text)
    env = {k: v for k, v in os.environ.items() if k != "CI" and not k.startswith("PYTEST_")} | (
        {"CI": ci} if ci else {}
    )
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-c",
            os.devnull,
            "--rootdir",
            ".",
            ".",
        ],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_skip_is_told_in_one_loud_line(tmp_path: Path) -> None:
    """On somebody's own computer it does not fail the run."""
    done = _pytest(tmp_path, ci="", name="test_it.py", text=TESTS)
    assert done.returncode == 0, done.stdout
    assert "SKIPPED 1 test: needs a database; apt-get install one" in done.stdout


@pytest.mark.parametrize("ci", ["true", "1"])
def test_a_skip_fails_under_ci(tmp_path: Path, ci: str) -> None:
    """And nothing else does: an expected failure stays one."""
    done = _pytest(tmp_path, ci=ci, name="test_it.py", text=TESTS)
    assert done.returncode == 1
    assert "skipped, which CI=true forbids: needs a database; apt-get install one" in done.stdout
    assert "1 failed, 1 passed, 1 xfailed" in done.stdout


def test_a_whole_file_skipped_fails_under_ci(tmp_path: Path) -> None:
    """`importorskip` at the top of a file hides its tests from nobody."""
    text = "import pytest\npytest.importorskip('no_such_module_anywhere')\ndef test_x(): pass\n"
    done = _pytest(tmp_path, ci="true", name="test_it.py", text=text)
    assert done.returncode != 0
    assert "skipped, which CI=true forbids" in done.stdout
