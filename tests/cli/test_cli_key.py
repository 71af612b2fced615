"""Keys: made once, kept as hashes, working at once."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from click import UsageError
from command_line import Run

from orchestrator_fleet import keys
from orchestrator_fleet.cli.key import parse_scopes, state_of
from orchestrator_fleet.spec.model import Key


def _declared(file: Path) -> dict[str, dict[str, object]]:
    return yaml.safe_load(file.read_text())["keys"]


def test_a_key_is_shown_once_and_its_hash_stands_in_the_file(run: Run, fleet_home: Path) -> None:
    """Comments and all else stay; the fleet is still valid."""
    before = (fleet_home / "fleet.yaml").read_text()
    made = json.loads(run("key", "create", "--owner", "person:me", "--scopes", "admin", "--json").stdout)
    assert set(made) == {"id", "key", "scopes", "expires_at"}
    key_id, secret = keys.parse(made["key"]) or ("", "")
    assert key_id == made["id"]
    declared = _declared(fleet_home / "fleet.yaml")[key_id]
    assert declared["owner"] == "person:me"
    assert declared["scopes"] == made["scopes"] == ["admin"]
    assert keys.matches(secret, str(declared["sha256"]))
    after = (fleet_home / "fleet.yaml").read_text()
    assert set(before.splitlines()) <= set(after.splitlines())
    assert secret not in after
    run("validate")


def test_a_key_goes_where_keys_are_kept(run: Run, fleet_home: Path) -> None:
    """An included file with a `keys` section, so that a clone can have keys of its own."""
    main = fleet_home / "fleet.yaml"
    main.write_text(main.read_text().replace("version: 1\n", "version: 1\ninclude: [fleet.d/*.yaml]\n"))
    (fleet_home / "fleet.d").mkdir()
    (fleet_home / "fleet.d/local.yaml").write_text("keys: {}\n")
    before = main.read_text()
    run("key", "create", "--owner", "service:ci", "--scopes", "tasks:read")
    assert main.read_text() == before
    assert [k["owner"] for k in _declared(fleet_home / "fleet.d/local.yaml").values()] == ["service:ci"]


def test_into_makes_the_file_that_keeps_a_clones_keys(run: Run, fleet_home: Path) -> None:
    """One that `include` names, and that keys really go to; else nothing is made."""
    main = fleet_home / "fleet.yaml"
    create = ("key", "create", "--owner", "person:me", "--scopes", "admin", "--into", "fleet.d/local.yaml")
    assert "include" in run(*create, code=64).stderr
    assert not (fleet_home / "fleet.d/local.yaml").exists()
    main.write_text(main.read_text().replace("version: 1\n", "version: 1\ninclude: [fleet.d/*.yaml]\n"))
    before = main.read_text()
    for _ in range(2):
        run(*create)
    assert main.read_text() == before
    assert len(_declared(fleet_home / "fleet.d/local.yaml")) == 2
    main.write_text(f"{before}keys: {{}}\n")
    assert "fleet.yaml" in run(*create, code=64).stderr


def test_the_key_alone_is_on_stdout(run: Run, fleet_home: Path) -> None:
    """`FLEET_KEY=$(fleet key create ...)` works; what is said beside it goes to stderr."""
    assert fleet_home.exists()
    done = run("key", "create", "--owner", "vp-eng", "--scopes", "tasks:read,tasks:write", "--expires-in", "90d")
    assert keys.parse(done.stdout.strip())
    assert "tasks:read, tasks:write" in done.stderr


def test_a_saved_key_is_its_owners_alone(run: Run, fleet_home: Path) -> None:
    """Mode 0600, in a folder of mode 0700; saving again replaces it."""
    for _ in range(2):
        made = json.loads(run("key", "create", "--owner", "person:me", "--scopes", "admin", "--save", "--json").stdout)
    file = fleet_home / ".fleet/key"
    assert file.read_text().strip() == made["key"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".key")] == []


@pytest.mark.parametrize(
    ("owner", "scopes", "problem"),
    [
        ("person:Me", "admin", "--owner: got 'person:Me'"),
        ("robot:x", "admin", "--owner: got 'robot:x'"),
        ("vp-none", "admin", "--owner: got 'vp-none'"),
        ("person:me", "tasks:reed", "--scopes: got tasks:reed"),
        ("person:me", ",", "--scopes: got none"),
    ],
)
def test_a_wrong_owner_or_scope_makes_no_key(run: Run, fleet_home: Path, owner: str, scopes: str, problem: str) -> None:
    """64, and the file stays as it was."""
    before = (fleet_home / "fleet.yaml").read_text()
    assert problem in run("key", "create", "--owner", owner, "--scopes", scopes, code=64).stderr
    assert (fleet_home / "fleet.yaml").read_text() == before


def test_scopes_come_in_lists_and_repeated() -> None:
    """In one order, each once."""
    assert parse_scopes(("history:sql, tasks:read", "tasks:read")) == ["tasks:read", "history:sql"]
    with pytest.raises(UsageError):
        parse_scopes(("tasks:read,none",))


def test_keys_are_listed_without_secrets(run: Run, fleet_home: Path) -> None:
    """With owner, state and scopes."""
    assert fleet_home.exists()
    made = json.loads(run("key", "create", "--owner", "person:me", "--scopes", "admin", "--json").stdout)
    listed = json.loads(run("key", "list", "--json").stdout)
    assert [(k["id"], k["state"]) for k in listed["data"]] == [(made["id"], "active")]
    assert made["id"] in run("key", "list").stdout


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        ({}, "active"),
        ({"expires": "2026-01-01T00:00:00Z"}, "expired"),
        ({"revoked": "2026-01-01T00:00:00Z"}, "revoked"),
        ({"revoked": "2026-01-01T00:00:00Z", "expires": "2025-01-01T00:00:00Z"}, "revoked"),
        ({"revoked": "2026-03-01T00:00:00Z"}, "active"),
    ],
)
def test_a_key_is_active_until_its_end(ends: dict[str, str], state: str) -> None:
    """Revoked says more than expired."""
    key = Key.model_validate({"owner": "person:me", "sha256": "0" * 64, "scopes": ["admin"], **ends})
    assert state_of(key, now=datetime(2026, 2, 1, tzinfo=UTC)) == state
