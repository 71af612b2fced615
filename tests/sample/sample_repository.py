"""A small git repository with things to find in it, and a way to put an agent to work on it as a daemon would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[2]
AGENTS = HOME / "scripts/agents"
TIMEOUT_S = 60
KEY = "fleet_k-0a1b2c3d_" + "5e" * 32 + "_89abcdef"  # the shape of a key, and no key
RANDOM = "q8ZrT2vLx9KpW4mNb7Yc"

FILES = {
    "pyproject.toml": """\
[project]
name = "sample"
license = "MIT"
requires-python = ">=3.11"
dependencies = ["Odd_Licence>=1", "requests", "never.installed>=2"]
optional-dependencies = {dev = ["pytest>=8"]}
""",
    "README.md": "[there](app/clean.py) [gone](docs/missing.md) [out](https://example.org/x)\n\nscripts/nowhere\n",
    "app/clean.py": '"""Nothing to find."""\n\n\ndef add(a: int, b: int) -> int:\n    """Sum."""\n    return a + b\n',
    "app/messy.py": """\
import os
import sys
import requests

def collect(item, into=[]):
    try:
        into.append(item)
    except:
        pass
    if item == None:
        return sys.argv
    return into
""",
    "app/deep.py": "def deep(x):\n"
    + "".join("    " * (n + 1) + f"if x > {n}:\n" for n in range(6))
    + "    " * 7
    + "return x\n",
    "app/risky.py": "import os\nimport subprocess\n\n\ndef go(text):\n    eval(text)\n    os.system(text)\n"
    "    subprocess.run(text, shell=True)\n",
    "app/later.py": "x = 1  # TO" + "DO: do it properly\n",
    "app/broken.py": "def (:\n",
    "config/settings.py": f'fleet = "{KEY}"\napi_token = "{RANDOM}"\npassword = "changemechangeme"\n',
    "tests/test_clean.py": "from app.clean import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n\n\n"
    "def test_nothing():\n    add(1, 2)\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What an agent left: exit code, result, stdout and stderr."""

    code: int
    result: Any
    out: str
    err: str


def git(repository: Path, *arguments: str, author: str = "Ada") -> None:
    """Run git there as `author`, whatever this machine's own settings are."""
    who = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", author), ("EMAIL", f"{author.lower()}@example.org"))
    }
    env = {**os.environ, **who, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(["git", "-C", str(repository), *arguments], env=env, check=True, capture_output=True, timeout=30)


def make(folder: Path) -> Path:
    """The repository: everything by Ada, then three changes of one file by Grace."""
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "picture.bin").write_bytes(b"\xff\xfe\0 not text")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "Begin")
    for turn in range(3):
        with (folder / "app/clean.py").open("a") as file:
            file.write(f"\n\nTURN_{turn} = {turn}\n")
        git(folder, "commit", "-q", "-a", "-m", f"Turn {turn}", author="Grace")
    (folder / "untracked.py").write_text(f'fleet = "{KEY}"\n')
    return folder


def install(repository: Path, name: str, *, version: str, licence: str) -> None:
    """Make a package look installed in the repository's .venv."""
    info = repository / f".venv/lib/python3.11/site-packages/{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: {licence}\n")


def run(agent: str, stdin: bytes, *, folder: Path) -> Ran:
    """Start an agent as a daemon does: from a generation's assets, in a folder of its own, with a bare environment."""
    assets, session = folder / "assets/scripts/agents", folder / "session"
    if not assets.exists():
        shutil.copytree(AGENTS, assets, ignore=shutil.ignore_patterns("__pycache__"))
    session.mkdir(exist_ok=True)
    result = session / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, str(assets / f"{agent}.py")],
        input=stdin,
        cwd=session,
        env={"PATH": os.environ["PATH"], "HOME": str(session), "LANG": "C.UTF-8", "FLEET_RESULT": str(result)},
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    read = json.loads(result.read_text())["result"] if result.exists() else None
    return Ran(code=done.returncode, result=read, out=done.stdout.decode(), err=done.stderr.decode())


def task(repository: Path, **metadata: Any) -> bytes:
    """A task on stdin, with what the agents read of it."""
    return json.dumps({"id": "task-1", "title": "t", "metadata": metadata, "workspace": str(repository)}).encode()
