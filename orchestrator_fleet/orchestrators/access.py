"""Who a key is and what it may do. Pure: keys and time come in, an answer goes out.

The whole key ring is in memory (it is a few hundred hashes), so a check costs one SHA-256 and one comparison and no
query, whatever comes: what is no key at all, an unknown id, a wrong secret, a revoked key and a good one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator_fleet import keys
from orchestrator_fleet.clock import from_datetime

DAEMON_SCOPES = ("tasks:work",)
_NOBODY = "0" * 64  # no text has this digest that anybody knows of


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownKey:
    """A key as declared (or, with a `machine`, as a daemon's). Times are microseconds since 1970."""

    id: str
    owner: str
    sha256: str
    scopes: tuple[str, ...]
    expires_us: int | None = None
    revoked_us: int | None = None
    machine: str = ""

    @property
    def actor(self) -> str:
        """The name that events carry."""
        return f"daemon:{self.owner}@{self.machine}" if self.machine else self.id

    @property
    def is_orchestrators(self) -> bool:
        """Whether its owner is an orchestrator, and not a person or a service."""
        return ":" not in self.owner

    @property
    def acts_for(self) -> str | None:
        """The orchestrator that it acts for alone; None: for any."""
        return self.owner if self.is_orchestrators and "admin" not in self.scopes else None

    def allows(self, scope: str) -> bool:
        """Whether it has the scope; `admin` has all."""
        return keys.allows(self.scopes, scope)

    def claims_for(self, orchestrator: str) -> bool:
        """Whether it may claim tasks of `orchestrator`: its own key may, and one with `admin`."""
        return self.owner == orchestrator or "admin" in self.scopes


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a key is not good: malformed, unknown, revoked or expired."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a caller shows: a key's public id (None: it has not a key's form) and the digest of its secret."""

    id: str | None
    sha256: str

    @classmethod
    def of(cls, text: str) -> Shown:
        """Take a text apart. Costs the same whatever it is."""
        key_id, secret = keys.parse(text) or (None, "")
        return cls(id=key_id, sha256=keys.digest(secret))

    def among(self, rings: Iterable[Mapping[str, KnownKey]]) -> KnownKey | None:
        """The key that is known under this id."""
        return next((ring[self.id] for ring in rings if self.id in ring), None) if self.id is not None else None


def check(
    shown: Shown, known: KnownKey | None, *, now_us: int, revoked: Collection[str] = frozenset()
) -> KnownKey | Denied:
    """`known`, when that is what was shown and it is good; else why it is not. One comparison, always.

    `revoked` are ids that were revoked in the live store: they stay so, whatever else says.
    """
    good = keys.same(shown.sha256, known.sha256 if known is not None else _NOBODY)
    if shown.id is None:
        return Denied("malformed")
    if known is None or not good:
        return Denied("unknown")
    why = still_good(known, now_us=now_us, revoked=revoked)
    return known if why is None else Denied(why)


def still_good(known: KnownKey | None, *, now_us: int, revoked: Collection[str] = frozenset()) -> str | None:
    """Why a key with the right secret is good no more (unknown, revoked, expired); None while it is."""
    if known is None:
        return "unknown"
    if known.id in revoked or (known.revoked_us is not None and known.revoked_us <= now_us):
        return "revoked"
    if known.expires_us is not None and known.expires_us <= now_us:
        return "expired"
    return None


def declared(section: Mapping[str, Mapping[str, Any]]) -> dict[str, KnownKey]:
    """The ring of fleet.yaml's `keys`, as control.json has them."""
    return {
        key_id: KnownKey(
            id=key_id,
            owner=key["owner"],
            sha256=key["sha256"],
            scopes=tuple(key["scopes"]),
            expires_us=_instant(key.get("expires")),
            revoked_us=_instant(key.get("revoked")),
        )
        for key_id, key in section.items()
    }


def _instant(text: str | None) -> int | None:
    return None if text is None else from_datetime(datetime.fromisoformat(text))
