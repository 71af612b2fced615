"""How long a person waits for the command line itself."""

from __future__ import annotations

import subprocess

from bench_sample import FLEET, HOME, arguments, figures, report, timed

RUNS = 11
COMMANDS = {
    "fleet --help": ["--help"],
    "fleet --version": ["--version"],
    "fleet plan --help": ["plan", "--help"],
    "fleet task add --help": ["task", "add", "--help"],
    "fleet validate": ["validate"],
}


def run(command: list[str]) -> None:
    """Run once, in the sample fleet's folder."""
    subprocess.run([FLEET, *command], cwd=HOME, stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    """Measure each command warm: its modules are compiled and in the page cache."""
    options = arguments(__doc__ or "")
    rows = []
    for name, command in COMMANDS.items():
        run(command)
        rows.append(figures(name, timed(lambda command=command: run(command), times=RUNS)))  # type: ignore[misc] # a bound default
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
