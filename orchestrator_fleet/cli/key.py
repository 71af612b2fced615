"""`fleet key`: API keys of people and services. fleet.yaml keeps their hashes; the key itself is shown once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path

import rich_click as click

from orchestrator_fleet import keys
from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.values import DURATION
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.reconcile.control import publish_keys
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec.folder import Folder
from orchestrator_fleet.spec.load import load_fleet, read_trees
from orchestrator_fleet.spec.model import Key
from orchestrator_fleet.spec.writeback import add_key


@click.group(cls=Group)
def command() -> None:
    """Create and list API keys."""


@command.command("create")
@click.option("--owner", required=True, metavar="WHO", help="person:<name>, service:<name>, or an orchestrator.")
@click.option(
    "--scopes", required=True, multiple=True, metavar="LIST", help=f"Comma list, repeatable: {', '.join(keys.SCOPES)}."
)
@click.option("--expires-in", type=DURATION, metavar="TIME", help="When it stops working, such as 90d; default: never.")
@click.option("--save", is_flag=True, help="Also keep it in .fleet/key, for commands run here.")
@click.option("--into", metavar="FILE", help="The included file that keeps this clone's keys; made when missing.")
def create(*, owner: str, scopes: tuple[str, ...], expires_in: float | None, save: bool, into: str | None) -> None:
    """Make a key: print it once, and add its hash to the fleet's files.

    The hash goes to the first of fleet.yaml and its includes that has a `keys` section, else to fleet.yaml; all else
    in it stays. Where the fleet is applied, the key works at once.
    """
    wanted = parse_scopes(scopes)
    fleet_file = place().file
    check_owner(owner, orchestrators=load_fleet(fleet_file).file.orchestrators.keys())
    if into is not None:
        open_keys_section(fleet_file, Path(into).absolute())
    minted, now = keys.mint(), datetime.now(UTC)
    expires = None if expires_in is None else instant(now + timedelta(seconds=expires_in))
    file = add_key(
        fleet_file,
        key_id=minted.id,
        owner=owner,
        sha256=minted.sha256,
        scopes=wanted,
        created=instant(now),
        expires=expires,
    )
    if place().json:
        output.write_json({"id": minted.id, "key": minted.text, "scopes": wanted, "expires_at": expires})
    else:
        output.write(f"{minted.text}\n")
        until = f" until {expires}" if expires else ""
        output.say(f"key {minted.id} of {owner}{until}: {', '.join(wanted)}", err=True)
        output.say(f"its hash is in {file}; the key itself is shown this once", err=True)
    if save:
        save_key(State(fleet_file).key_file, minted.text)
    published = publish_keys(fleet_file)
    if published is None and not place().json:
        output.say("it works from the first `fleet apply` on", err=True)


def parse_scopes(given: tuple[str, ...]) -> list[str]:
    """`("a,b", "c")` -> the scopes in their own order, each once; raises UsageError naming the unknown ones."""
    asked = {scope.strip() for text in given for scope in text.split(",") if scope.strip()}
    unknown = sorted(asked - set(keys.SCOPES))
    if unknown or not asked:
        got = ", ".join(unknown) or "none"
        raise click.UsageError(f"--scopes: got {got}, wanted some of {', '.join(keys.SCOPES)}")
    return [scope for scope in keys.SCOPES if scope in asked]


def check_owner(owner: str, *, orchestrators: Collection[str]) -> None:
    """Raise UsageError unless the owner is one that can have a key."""
    kind, colon, name = owner.partition(":")
    if colon and kind in ("person", "service") and is_name(name):
        return
    if owner not in orchestrators:
        raise click.UsageError(
            f"--owner: got {owner!r}, wanted person:<name>, service:<name> or an orchestrator of this fleet"
        )


def open_keys_section(fleet_file: Path, file: Path) -> None:
    """Make `file` with an empty `keys` section, unless it is there; raise UsageError when keys would go elsewhere."""
    made = not file.exists()
    if made:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# Keys of this clone, as hashes; `fleet key create` adds them.\nkeys: {}\n", encoding="utf-8")
    trees = read_trees(Folder(fleet_file.parent), fleet_file.name, problems=[])
    files = {fleet_file.parent / tree.at.file: "keys" in tree.entries for tree in trees}
    first = next((path for path, has_keys in files.items() if has_keys), fleet_file)
    if first == file:
        return
    if made:
        file.unlink()
    if file not in files:
        raise click.UsageError(f"--into {file.name}: no `include` of {fleet_file.name} names it; add one that does")
    raise click.UsageError(f"--into {file.name}: keys go to {first}, which has a `keys` section before it")


def instant(at: datetime) -> str:
    """RFC 3339 in whole seconds."""
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def save_key(path: Path, text: str) -> None:
    """Write the key file, readable by its owner alone, in one rename; raises FleetError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".key-")  # mkstemp's mode is 0600
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{text}\n")
        Path(temporary).replace(path)
    except OSError as error:
        raise FleetError(
            f"{path}: {error.strerror}; the key is made, but not saved here: set FLEET_KEY to it"
        ) from None


@command.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=1_000, show_default=True, help="At most so many.")
def list_(*, limit: int) -> None:
    """List the keys that the fleet's files declare."""
    declared = sorted(load_fleet(place().file).file.keys.items(), key=lambda item: (item[1].owner, item[0]))
    shown = declared[:limit]
    if place().json:
        listed = [{"id": key_id, **key.model_dump(mode="json"), "state": state_of(key)} for key_id, key in shown]
        output.write_json({"data": listed, "total": len(declared)})
        return
    output.table(
        ("id", "owner", "state", "scopes", "created", "expires"),
        [(i, k.owner, state_of(k), ", ".join(k.scopes), _day(k.created), _day(k.expires)) for i, k in shown],
    )
    if len(declared) > limit:
        output.say(f"{limit} of {len(declared)}; --limit shows more", err=True)


def _day(at: datetime | None) -> str | None:
    return at.date().isoformat() if at is not None else None


def state_of(key: Key, *, now: datetime | None = None) -> str:
    """active, expired or revoked; a revocation to come leaves it active until then."""
    now = now or datetime.now(UTC)
    for state, end in (("revoked", key.revoked), ("expired", key.expires)):
        if end is not None and (end if end.tzinfo else end.replace(tzinfo=UTC)) <= now:
            return state
    return "active"
