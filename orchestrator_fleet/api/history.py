"""History beside the running control plane: one ingester, and questions answered from what it has brought."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator_fleet.history import door, sql
from orchestrator_fleet.history.ingest import Ingester

MAX_QUERIES = 4
WAIT_S = 5.0


class History:
    """Brings events over and answers questions. DuckDB blocks, so all of it happens in threads."""

    def __init__(self, *, store_url: str, path: Path) -> None:
        self._ingester = Ingester(store_url, path, wait_s=WAIT_S)
        self._questions = asyncio.Semaphore(MAX_QUERIES)

    async def catch_up(self) -> None:
        """Bring over everything that is committed now."""
        await asyncio.to_thread(self._ingester.flush)

    async def ask(self, query: str, params: Sequence[Any] | Mapping[str, Any], *, limit: int) -> sql.Result:
        """Answer a read-only query; what was committed before it is in the answer."""
        async with self._questions:
            return await asyncio.to_thread(door.ask, self._ingester, query, params=params, limit=limit)

    async def close(self) -> None:
        """Bring over the rest and let go of the files."""
        await self.catch_up()
        await asyncio.to_thread(self._ingester.close)
