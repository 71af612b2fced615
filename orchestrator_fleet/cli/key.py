"""`fleet key`: API keys of people and services. fleet.yaml keeps their hashes; the key itself is shown once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import rich_click as click

from orchestrator_fleet import keys
from orchestrator_fleet.cli import output
from orchestrator_fleet.cli.command import Group, place
from orchestrator_fleet.cli.sql import store_of
from orchestrator_fleet.cli.values import DURATION
from orchestrator_fleet.clock import to_rfc3339
from orchestrator_fleet.errors import FleetError
from orchestrator_fleet.ids import is_name
from orchestrator_fleet.orchestrators import issue, keyring
from orchestrator_fleet.orchestrators.keyring import Use
from orchestrator_fleet.reconcile.control import publish_keys
from orchestrator_fleet.reconcile.declare import finish
from orchestrator_fleet.reconcile.state import State
from orchestrator_fleet.spec.folder import Folder
from orchestrator_fleet.spec.load import load_fleet, read_trees
from orchestrator_fleet.spec.model import Key
from orchestrator_fleet.spec.suggest import hint
from orchestrator_fleet.spec.writeback import Edit, Standing, add_key, edit_files
from orchestrator_fleet.store.check import looking


@click.group(cls=Group)
def command() -> None:
    """Create, rotate, revoke and list API keys."""


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
    finish(fleet_file)
    file = add_key(
        fleet_file,
        key_id=minted.id,
        owner=owner,
        sha256=minted.sha256,
        scopes=wanted,
        created=instant(now),
        expires=expires,
    )
    show_key(minted, owner=owner, scopes=wanted, expires=expires, file=file)
    if save:
        save_key(State(fleet_file).key_file, minted.text)
    published = publish_keys(fleet_file)
    if published is None and not place().json:
        output.say("it works from the first `fleet apply` on", err=True)


def show_key(
    minted: keys.MintedKey, *, owner: str, scopes: list[str], expires: str | None, file: Path, **more: str
) -> None:
    """Print a new key, this once: alone on stdout, or as JSON with `more`."""
    if place().json:
        output.write_json({"id": minted.id, "key": minted.text, "scopes": scopes, "expires_at": expires, **more})
        return
    output.write(f"{minted.text}\n")
    until = f" until {expires}" if expires else ""
    output.say(f"key {minted.id} of {owner}{until}: {', '.join(scopes)}", err=True)
    output.say(f"its hash is in {file}; the key itself is shown this once", err=True)


@command.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option("--overlap", type=DURATION, metavar="TIME", help="How long the old one still works; default: not at all.")
@click.option("--save", is_flag=True, help="Also keep the new one in .fleet/key, for commands run here.")
def rotate(*, key_id: str, overlap: float | None, save: bool) -> None:
    """Make a new key in the place of one, with its owner, name and scopes, and as long a life.

    The old one's entry gets a `revoked:`; all else in the fleet's files stays. Nothing is committed.
    """
    fleet_file, minted, now = place().file, keys.mint(), datetime.now(UTC)
    ends = now + timedelta(seconds=overlap or 0.0)
    fresh: dict[str, Any] = {}

    def make(standing: Standing) -> list[Edit]:
        old = declared_key(standing, key_id)
        state = state_of(standing.fleet.file.keys[key_id], now=now)
        if state != "active":
            raise click.UsageError(f"{key_id}: is {state} already; `fleet key create` makes a new one")
        expires = issue.renewed(old, now=now)
        fresh.update(
            issue.entry(
                minted, owner=old["owner"], name=old.get("name"), scopes=old["scopes"], created=now, expires=expires
            )
        )
        ended = old if issue.ends_by(old, ends) else {**old, "revoked": instant(ends)}
        return [Edit(section="keys", name=key_id, value=ended), Edit(section="keys", name=minted.id, value=fresh)]

    finish(fleet_file)
    files = edit_files(fleet_file, make)
    show_key(
        minted,
        owner=fresh["owner"],
        scopes=fresh["scopes"],
        expires=fresh.get("expires"),
        file=files[-1],
        previous=key_id,
        previous_revoked_at=instant(ends),
    )
    if not place().json:
        output.say(f"{key_id} works until {instant(ends)}" if overlap else f"{key_id} works no more", err=True)
    if save:
        save_key(State(fleet_file).key_file, minted.text)
    publish_keys(fleet_file)


@command.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke(*, key_id: str) -> None:
    """End a key: its entry gets a `revoked:`, and what runs on it here is cut off. Nothing is committed."""
    fleet_file, at = place().file, instant(datetime.now(UTC))

    def make(standing: Standing) -> list[Edit]:
        old = declared_key(standing, key_id)
        ended = state_of(standing.fleet.file.keys[key_id]) == "revoked"
        return [] if ended else [Edit(section="keys", name=key_id, value={**old, "revoked": at})]

    finish(fleet_file)
    files = edit_files(fleet_file, make)
    publish_keys(fleet_file)
    if place().json:
        output.write_json({"id": key_id, "changed": bool(files), "state": "revoked"})
    else:
        output.say(f"{key_id}: revoked in {files[0]}" if files else f"{key_id}: was revoked already")


def declared_key(standing: Standing, key_id: str) -> dict[str, Any]:
    """A key's entry as written; raises UsageError naming the nearest there is."""
    old = standing.entries["keys"].get(key_id)
    if old is None:
        near = hint(key_id, standing.entries["keys"], otherwise="`fleet key list` shows all")
        raise click.UsageError(f"there is no key {key_id}; {near}")
    return old


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
    """List the keys that the fleet's files declare; where there is a live store, with their last use."""
    declared = sorted(load_fleet(place().file).file.keys.items(), key=lambda item: (item[1].owner, item[0]))
    shown, live = declared[:limit], _live(State(place().file))
    states = {key_id: "revoked" if key_id in live.revoked else state_of(key) for key_id, key in shown}
    if place().json:
        listed = [
            {"id": i, **k.model_dump(mode="json"), "state": states[i], **_last_use(live.uses.get(i))} for i, k in shown
        ]
        output.write_json({"data": listed, "total": len(declared)})
        return
    output.table(
        ("id", "owner", "name", "state", "scopes", "created", "expires", "last used", "from"),
        [
            (
                i,
                k.owner,
                k.name,
                states[i],
                ", ".join(k.scopes),
                _day(k.created),
                _day(k.expires),
                *_used(live.uses.get(i)),
            )
            for i, k in shown
        ],
    )
    if len(declared) > limit:
        output.say(f"{limit} of {len(declared)}; --limit shows more", err=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What the live store knows of keys: when they were revoked there, and last used, by id."""

    revoked: Mapping[str, int] = field(default_factory=dict)
    uses: Mapping[str, Use] = field(default_factory=dict)


def _live(state: State) -> Live:
    """Read from the store itself, also while `fleet serve` works on it; nothing where there is none to be read."""
    try:
        with looking(state.store_url(store_of(state))) as conn:
            return Live(revoked=keyring.revoked(conn), uses=keyring.uses(conn))
    except FleetError:
        return Live()


def _last_use(use: Use | None) -> dict[str, str | None]:
    at, address = (None, None) if use is None else (to_rfc3339(use.at_us), use.address)
    return {"last_used_at": at, "last_used_from": address}


def _used(use: Use | None) -> tuple[str | None, str | None]:
    return (None, None) if use is None else (f"{to_rfc3339(use.at_us)[:16].replace('T', ' ')}Z", use.address)


def _day(at: datetime | None) -> str | None:
    return at.date().isoformat() if at is not None else None


def state_of(key: Key, *, now: datetime | None = None) -> str:
    """active, expired or revoked; a revocation to come leaves it active until then."""
    now = now or datetime.now(UTC)
    for state, end in (("revoked", key.revoked), ("expired", key.expires)):
        if end is not None and (end if end.tzinfo else end.replace(tzinfo=UTC)) <= now:
            return state
    return "active"
