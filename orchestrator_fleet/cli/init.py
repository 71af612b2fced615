"""`fleet init`: a fleet that validates, plans and applies on this computer as it stands."""

from __future__ import annotations

import re
import shlex
from importlib import resources
from pathlib import Path

import rich_click as click

from orchestrator_fleet import __version__
from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import DEFAULT_FILE, Command, place
from orchestrator_fleet.errors import FleetError, Refused
from orchestrator_fleet.ids import is_name

# the template in the package's scaffold/ -> where it goes
FILES = {
    "fleet.yaml.in": DEFAULT_FILE,
    "engineering.md.in": "charters/engineering.md",
    "hello.py.in": "scripts/agents/hello.py",
    "workflow.yml.in": ".github/workflows/fleet.yml",
    "gitignore.in": ".gitignore",
}


@click.command(cls=Command)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="The fleet's name [the folder's].")
def command(*, folder: Path | None, name: str | None) -> None:
    """Scaffold a fleet in FOLDER (default: here); nothing that exists is overwritten."""
    folder = (folder or Path()).absolute()
    name = name or _name_of(folder)
    if not is_name(name):
        raise click.UsageError(f"--name: got {name!r}, wanted lower case letters, digits and -, a letter first")
    if (folder / DEFAULT_FILE).exists():
        raise Refused(f"{folder / DEFAULT_FILE}: is there already; nothing was written")
    written, kept = _write(folder, name)
    if place().json:
        output.write_json({"folder": str(folder), "written": written, "kept": kept})
        return
    for path in written:
        output.say(f"wrote  {path}")
    for path in kept:
        output.say(f"kept   {path}, as it was")
    if FILES["gitignore.in"] in kept:
        output.say("add `.fleet/` to .gitignore: run-time state and keys stand there")
    enter = "" if folder == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
    output.say(f"\nNext: {enter}fleet validate && fleet plan && fleet apply")


def _name_of(folder: Path) -> str:
    """A folder's name as a name of this product: `My Fleet` -> `my-fleet`."""
    words = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    return words[:63].rstrip("-") if words[:1].isalpha() else "my-fleet"


def _write(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Write the files that are not there; (written, kept)."""
    scaffold = resources.files(__package__) / "scaffold"
    written, kept = [], []
    for source, target in FILES.items():
        text = (scaffold / source).read_text(encoding="utf-8")
        text = text.replace("@NAME@", name).replace("@VERSION@", __version__)
        try:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            with (folder / target).open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            kept.append(target)
        except OSError as error:
            raise FleetError(f"{folder / target}: {error.strerror}") from None
        else:
            written.append(target)
    return written, kept
