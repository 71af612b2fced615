"""What orchestrators ask of each other: delegate, escalate, hand off, collaborate."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
