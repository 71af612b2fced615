"""What people do to orchestrators: actions one by one and in bulk, with the log of them."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
