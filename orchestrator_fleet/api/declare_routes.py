"""Declared orchestrators made, changed and deleted: edits of the YAML, committed with the caller as author."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
