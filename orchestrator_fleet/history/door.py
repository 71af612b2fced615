"""Where questions to the history come in: from the process that ingests, and from one that finds nobody ingesting."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator_fleet.history import sql
from orchestrator_fleet.history.ingest import Ingester

WAIT_S = 10.0


def ask(
    ingester: Ingester,
    query: str,
    *,
    params: Sequence[Any] | Mapping[str, Any] = (),
    limit: int = sql.MAX_ROWS,
    timeout_s: float = sql.TIMEOUT_S,
) -> sql.Result:
    """Ingest what is committed by now, then answer. Blocks, so call it in a thread; any number of them may at once."""
    ingester.flush()
    with contextlib.closing(ingester.cursor()) as connection:
        return sql.query(connection, query, params=params, limit=limit, timeout_s=timeout_s)


def ask_files(
    store_url: str,
    duckdb_path: Path,
    query: str,
    *,
    params: Sequence[Any] | Mapping[str, Any] = (),
    limit: int = sql.MAX_ROWS,
    timeout_s: float = sql.TIMEOUT_S,
) -> sql.Result:
    """The same where no control plane runs: opens the files, ingests the rest, answers and lets go of them.

    Waits up to WAIT_S seconds for another process that does the same; then raises HistoryInUse, which names it.
    """
    with contextlib.closing(Ingester(store_url, duckdb_path, wait_s=WAIT_S)) as ingester:
        return ask(ingester, query, params=params, limit=limit, timeout_s=timeout_s)
