"""Keys of orchestrators: generated, rotated, revoked; and all keys, listed."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
