"""What orchestrators say: status updates, and messages to each other and to people."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
