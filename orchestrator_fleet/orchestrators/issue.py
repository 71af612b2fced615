"""What a key's entry says: which keys of an owner are active, and what stands in the place of one. Pure.

Entries are as in fleet.yaml's `keys`, times in RFC 3339; `Section` is all of them, by id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator_fleet.clock import from_datetime
from orchestrator_fleet.keys import MintedKey
from orchestrator_fleet.orchestrators import access

Entry = Mapping[str, Any]
Section = Mapping[str, Entry]


def entry(
    minted: MintedKey, *, owner: str, name: str | None, scopes: Sequence[str], created: datetime, expires: str | None
) -> dict[str, Any]:
    """A new key's. `name` is what people call it."""
    return {
        "owner": owner,
        **({"name": name} if name else {}),
        "sha256": minted.sha256,
        "scopes": list(scopes),
        "created": instant(created),
        **({"expires": expires} if expires else {}),
    }


def active(section: Section, owner: str, *, now: datetime, revoked: Collection[str]) -> dict[str, Entry]:
    """The keys of `owner` that work at `now`. `revoked` are those that were revoked otherwise."""
    ring, now_us = access.declared(section), from_datetime(now)
    return {
        key_id: section[key_id]
        for key_id, key in ring.items()
        if key.owner == owner and access.still_good(key, now_us=now_us, revoked=revoked) is None
    }


def newest(section: Section) -> str:
    """The id of the key that is to go on: one that is not ending already, and of those the one made last."""
    return max(section, key=lambda key_id: (not section[key_id].get("revoked"), _made(section[key_id]), key_id))


def renewed(before: Entry, *, now: datetime) -> str | None:
    """When what replaces a key expires: as long after `now` as that one lived.

    Its own end where that is not known, or is beyond the last year there is.
    """
    created, expires = before.get("created"), before.get("expires")
    if not expires or not created:
        return expires or None
    try:
        return instant(now + (moment(expires) - moment(created)))
    except OverflowError:
        return str(expires)


def ends_by(key: Entry, until: datetime) -> bool:
    """Whether a key is to be revoked by `until` anyway."""
    return bool(key.get("revoked")) and moment(key["revoked"]) <= until


def instant(at: datetime) -> str:
    """RFC 3339 in whole seconds, as people write it."""
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def moment(text: str) -> datetime:
    """The time that a text names; without a zone it is UTC."""
    at = datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def later(now: datetime, **by: float) -> datetime:
    """`now` and some days or seconds, in whole seconds."""
    return (now + timedelta(**by)).replace(microsecond=0)


def _made(key: Entry) -> float:
    return moment(key["created"]).timestamp() if key.get("created") else 0.0
