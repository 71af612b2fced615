"""Which keys of an owner are active, and what comes in the place of one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from orchestrator_fleet import keys
from orchestrator_fleet.orchestrators import issue

NOW = datetime(2026, 1, 10, 12, tzinfo=UTC)


def entry(owner: str = "vp-a", **fields: Any) -> dict[str, Any]:
    return {"owner": owner, "sha256": "0" * 64, "scopes": ["tasks:work"], **fields}


def test_active_is_what_is_neither_revoked_nor_expired_and_of_the_owner() -> None:
    """A revocation to come, or an expiry to come, leaves it active until then."""
    section = {
        "good": entry(),
        "ending": entry(revoked="2026-01-10T12:00:01Z", expires="2027-01-01T00:00:00+00:00"),
        "expired": entry(expires="2026-01-10T12:00:00Z"),
        "revoked": entry(revoked="2026-01-01T00:00:00"),
        "revoked-otherwise": entry(),
        "another's": entry("vp-b"),
    }
    assert list(issue.active(section, "vp-a", now=NOW, revoked={"revoked-otherwise"})) == ["good", "ending"]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"a": entry(created="2026-01-01T00:00:00Z"), "b": entry(created="2026-01-02T00:00:00Z")}, "b"),
        ({"a": entry(created="2026-01-01T00:00:00Z"), "b": entry()}, "a"),
        (
            {
                "a": entry(created="2026-01-01T00:00:00Z"),
                "b": entry(created="2026-01-02T00:00:00Z", revoked="2026-02-01T00:00:00Z"),
            },
            "a",
        ),
        ({"b": entry(revoked="2026-02-01T00:00:00Z")}, "b"),
    ],
)
def test_the_newest_is_the_one_that_goes_on(section: dict[str, Any], expected: str) -> None:
    """One that is ending already only where there is no other."""
    assert issue.newest(section) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"created": "2026-01-01T00:00:00Z"}, None),
        ({"created": "2026-01-01T00:00:00Z", "expires": "2026-01-31T00:00:00Z"}, "2026-02-09T12:00:00Z"),
        ({"expires": "2026-01-31T00:00:00Z"}, "2026-01-31T00:00:00Z"),
        ({"created": "2026-01-01T00:00:00Z", "expires": "9999-12-31T00:00:00Z"}, "9999-12-31T00:00:00Z"),
    ],
)
def test_a_lifetime_is_renewed_at_the_same_length(fields: dict[str, Any], expected: str | None) -> None:
    """Where nobody knows how long it was, or where time ends before that, the end stays."""
    assert issue.renewed(entry(**fields), now=NOW) == expected


def test_a_derived_key_is_a_key_and_the_same_again() -> None:
    """For the same secret and context, and no other."""
    first, again = keys.derive("a" * 64, "one"), keys.derive("a" * 64, "one")
    assert first == again
    parsed = keys.parse(first.text)
    assert parsed is not None
    assert parsed[0] == first.id
    assert keys.matches(parsed[1], first.sha256)
    others = {keys.derive("a" * 64, "two"), keys.derive("b" * 64, "one"), keys.mint()}
    assert len({one.id for one in others} | {first.id}) == 4
