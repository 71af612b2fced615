"""API keys: `fleet_<id>_<secret>_<crc32>`.

The secret is 256 random bits, so one SHA-256 of it is enough to keep; the checksum lets a scanner or a
client tell a mistyped key from an unknown one without asking anybody.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass
from typing import Literal, get_args

KEY_PATTERN = r"fleet_(k-[0-9a-f]{8})_([0-9a-f]{64})_([0-9a-f]{8})"
_KEY = re.compile(KEY_PATTERN)

Scope = Literal[
    "tasks:read",
    "tasks:write",
    "tasks:work",
    "fleet:read",
    "fleet:write",
    "keys:write",
    "memory:write",
    "history:sql",
    "admin",
]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class MintedKey:
    """A fresh key: `text` is shown once, `sha256` is kept."""

    id: str
    text: str
    sha256: str


def mint() -> MintedKey:
    """Make a key from the system's randomness."""
    return _minted(secrets.token_hex(4), secrets.token_hex(32))


def derive(secret: str, context: str) -> MintedKey:
    """The one key that follows from another's secret and a context: who has the secret can ask for it again.

    To everybody else it is as random as one that was minted (HMAC-SHA256 under 256 random bits).
    """
    name, body = (
        hmac.new(secret.encode(), f"{part}\0{context}".encode(), hashlib.sha256).hexdigest() for part in ("id", "key")
    )
    return _minted(name[:8], body)


def _minted(name: str, secret: str) -> MintedKey:
    head = f"fleet_k-{name}_{secret}"
    return MintedKey(id=f"k-{name}", text=f"{head}_{zlib.crc32(head.encode()):08x}", sha256=digest(secret))


def parse(text: str) -> tuple[str, str] | None:
    """(id, secret) of a well-formed key, or None when its form or checksum is wrong."""
    match = _KEY.fullmatch(text)
    if match is None:
        return None
    head, _, checksum = text.rpartition("_")
    return (match[1], match[2]) if f"{zlib.crc32(head.encode()):08x}" == checksum else None


def digest(secret: str) -> str:
    """SHA-256 of the secret part, in hex: what fleet.yaml and the store keep."""
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(secret: str, sha256: str) -> bool:
    """Whether `sha256` is of this secret; compares in constant time."""
    return same(digest(secret), sha256)


def same(sha256: str, other: str) -> bool:
    """Whether two digests are equal; compares in constant time."""
    return hmac.compare_digest(sha256, other)


def allows(scopes: tuple[str, ...] | list[str] | frozenset[str], needed: str) -> bool:
    """Whether a key with `scopes` may do what `needed` guards; `admin` may all."""
    return needed in scopes or "admin" in scopes
