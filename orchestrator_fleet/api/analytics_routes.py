"""`/api/vps/{id}/analytics`: how an orchestrator did, from history."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
