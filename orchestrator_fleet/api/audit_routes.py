"""Who changed what, and what keys there are to do so."""

from __future__ import annotations

from typing import Any

ROUTES: list[Any] = []
