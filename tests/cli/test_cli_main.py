"""The door itself: help, exit codes, errors as text and as JSON, pipes and terminals."""

from __future__ import annotations

import importlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_line import FLEET, Run

from orchestrator_fleet.cli import main
from orchestrator_fleet.errors import ControlPlaneError, FleetError, SpecInvalid, StalePlan


def test_help_lists_every_command(run: Run) -> None:
    """In a pipe it is plain lines."""
    text = run("--help").stdout
    for name, lazy in main.TABLE.items():
        assert f"\n  {name} " in text
        assert lazy.summary[:30] in text
    assert "╭" not in text


@pytest.mark.parametrize("name", main.TABLE)
def test_every_command_has_help_and_the_shared_options(run: Run, name: str) -> None:
    """What the table names can be imported, and is documented option by option."""
    text = run(name, "--help").stdout
    assert all(option in text for option in ("--file", "--directory", "--json"))


def _leaves(command: click.Command, path: str) -> list[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        return [leaf for name, sub in command.commands.items() for leaf in _leaves(sub, f"{path} {name}")]
    return [(path, command)]


@pytest.mark.parametrize("name", main.TABLE)
def test_every_option_says_what_it_does(name: str) -> None:
    """No option without help, no command without a text."""
    command = importlib.import_module(main.TABLE[name].module).command
    for path, leaf in _leaves(command, name):
        assert leaf.help, path
        silent = [p.name for p in leaf.params if isinstance(p, click.Option) and not p.help]
        assert silent == [], path


@pytest.mark.parametrize(
    "args", [(), ("no-such",), ("plan", "--no-such"), ("task",), ("task", "show"), ("-C", "/no/such", "schema")]
)
def test_a_wrong_command_line_is_64(run: Run, args: tuple[str, ...]) -> None:
    """Not click's 2: that means changes here."""
    assert run(*args, code=64).stderr


def test_a_mistyped_command_is_guessed(run: Run) -> None:
    """The nearest name is offered."""
    assert "plan" in run("plann", code=64).stderr


def test_errors_are_json_when_asked(run: Run) -> None:
    """On stderr, with a code; stdout stays empty."""
    done = run("--json", "no-such", code=64)
    assert json.loads(done.stderr)["error"]["code"] == "usage"
    assert done.stdout == ""


def test_an_invalid_spec_gives_its_diagnostics_as_json(run: Run, fleet_home: Path) -> None:
    """Each with its place."""
    (fleet_home / "fleet.yaml").write_text("version: 1\nfleet: Test\nmachinez: {}\n")
    error = json.loads(run("plan", "--json", code=1).stderr)["error"]
    assert error["code"] == "spec_invalid"
    assert {d["line"] for d in error["diagnostics"]} >= {2, 3}


def test_shared_options_work_before_and_after_the_command(run: Run, fleet_home: Path) -> None:
    """`fleet -C DIR validate` is `fleet validate -C DIR`, and -f is read from there."""
    (fleet_home / "fleet.yaml").rename(fleet_home / "other.yaml")
    elsewhere = Path("/")
    before = run("-C", str(fleet_home), "-f", "other.yaml", "--json", "validate", cwd=elsewhere).stdout
    after = run("validate", "-C", str(fleet_home), "-f", "other.yaml", "--json", cwd=elsewhere).stdout
    assert json.loads(before) == json.loads(after)


def test_a_bug_is_one_line_and_a_traceback_only_when_asked(monkeypatch, capsys) -> None:
    """Nobody is met by a stack of frames."""

    def broken(_argv: object) -> int:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(main, "_invoke", broken)
    monkeypatch.delenv("FLEET_DEBUG", raising=False)
    assert main.run([]) == 1
    said = capsys.readouterr().err
    assert said == "bug: ZeroDivisionError: by nought; run with FLEET_DEBUG=1 for the traceback\n"
    monkeypatch.setenv("FLEET_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main.run([])


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (FleetError("x"), 1, "fleet_error"),
        (StalePlan("x"), 3, "stale_plan"),
        (SpecInvalid([]), 1, "spec_invalid"),
        (ControlPlaneError("x", status=409, code="lease_lost"), 1, "lease_lost"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_an_error_has_the_exit_code_of_its_class(monkeypatch, capsys, error: BaseException, code: int, word) -> None:
    """And its name, or the API's word, as JSON."""

    def failing(_argv: object) -> int:
        raise error

    monkeypatch.setattr(main, "_invoke", failing)
    assert main.run(["--json"]) == code
    said = capsys.readouterr().err
    assert word is None or json.loads(said)["error"]["code"] == word


def test_a_closed_pipe_is_quiet(fleet_home: Path) -> None:
    """`fleet schema | head -1` leaves no traceback."""
    with subprocess.Popen([FLEET, "schema"], cwd=fleet_home, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def _on_a_terminal(*args: str, **env: str) -> str:
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [FLEET, *args], stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm-256color", **env}
    ) as process:
        os.close(slave)
        text = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            text += piece
        assert process.wait(30) == 0
    os.close(master)
    return text.decode()


def test_help_is_drawn_on_a_terminal() -> None:
    """With frames, and colours unless NO_COLOR says no."""
    assert "╭" in _on_a_terminal("--help")


def test_a_table_is_coloured_on_a_terminal_unless_told_otherwise(fleet_home: Path) -> None:
    """NO_COLOR leaves no escape code at all."""
    args = ("-C", str(fleet_home), "route", "explain", "--discipline", "security")
    coloured, plain = _on_a_terminal(*args), _on_a_terminal(*args, NO_COLOR="1")
    assert "\x1b[" in coloured
    assert "\x1b" not in plain
    assert all("matched" in text for text in (coloured, plain))


def test_help_imports_no_command() -> None:
    """That is what keeps it fast."""
    code = (
        "import sys; from orchestrator_fleet.cli.main import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    ours = {name for name in loaded if name.startswith("orchestrator_fleet.cli.")}
    assert ours == {f"orchestrator_fleet.cli.{name}" for name in ("main", "command", "output")}
    assert not {"rich.console", "httpx", "pydantic", "msgspec"} & set(loaded)
