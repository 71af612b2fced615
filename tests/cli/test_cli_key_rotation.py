"""Rotating and revoking keys in a person's work tree: lines change, nothing is committed."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Run

from orchestrator_fleet import keys
from orchestrator_fleet.spec.load import load_fleet


def made(run: Run, *more: str) -> dict[str, str]:
    """A key of mine."""
    return dict(
        json.loads(run("key", "create", "--owner", "person:me", "--scopes", "admin,tasks:read", "--json", *more).stdout)
    )


def test_a_rotated_key_has_a_successor_like_it(run: Run, fleet_home: Path) -> None:
    """Owner, scopes and length of life; the old one's lines get one more, and nothing else changes."""
    old = made(run, "--expires-in", "30d")
    before = (fleet_home / "fleet.yaml").read_text().split("\n")
    new = json.loads(run("key", "rotate", old["id"], "--overlap", "1h", "--save", "--json").stdout)
    after = (fleet_home / "fleet.yaml").read_text().split("\n")
    assert all(line in after for line in before)
    assert len(after) == len(before) + 7  # `revoked`, and a new entry of six lines
    declared = load_fleet(fleet_home / "fleet.yaml").file.keys
    was, now = declared[old["id"]], declared[new["id"]]
    assert (now.owner, now.scopes, now.revoked) == (was.owner, was.scopes, None)
    assert was.revoked is not None
    assert now.created is not None
    assert now.expires is not None
    assert (was.revoked - now.created).total_seconds() == 3600
    assert (now.expires - now.created).days == 30
    assert new["previous"] == old["id"]
    parsed = keys.parse(new["key"])
    assert parsed is not None
    assert keys.matches(parsed[1], now.sha256)
    assert (fleet_home / ".fleet/key").read_text().strip() == new["key"]


def test_without_an_overlap_the_old_one_ends_now(run: Run, fleet_home: Path) -> None:
    """And can't be rotated again; the key alone is on stdout."""
    old = made(run)
    done = run("key", "rotate", old["id"])
    assert keys.parse(done.stdout.strip())
    assert f"{old['id']} works no more" in done.stderr
    assert "is revoked already" in run("key", "rotate", old["id"], code=64).stderr
    assert len(load_fleet(fleet_home / "fleet.yaml").file.keys) == 2


def test_a_revoked_key_stays_written_down(run: Run, fleet_home: Path) -> None:
    """One line more, and none the second time."""
    old = made(run)
    before = (fleet_home / "fleet.yaml").read_text()
    assert "revoked in" in run("key", "revoke", old["id"]).stdout
    after = (fleet_home / "fleet.yaml").read_text()
    assert [line.split(":")[0] for line in after.split("\n") if line not in before.split("\n")] == ["    revoked"]
    assert "was revoked already" in run("key", "revoke", old["id"]).stdout
    assert json.loads(run("key", "revoke", old["id"], "--json").stdout)["changed"] is False
    assert (fleet_home / "fleet.yaml").read_text() == after


def test_a_key_that_is_not_there_is_a_usage_error(run: Run, fleet_home: Path) -> None:
    """With the one that was meant."""
    old = made(run)
    before = (fleet_home / "fleet.yaml").read_text()
    wrong = old["id"][:-1] + ("0" if old["id"][-1] != "0" else "1")
    for what in ("rotate", "revoke"):
        said = run("key", what, wrong, code=64).stderr
        assert "there is no key" in said
        assert old["id"] in said.replace("\n", "")
    assert (fleet_home / "fleet.yaml").read_text() == before
