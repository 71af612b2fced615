"""What stands against what: conflicts, computed, and that somebody has decided them."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
