"""The `claude-code` runner: declared in fleet.yaml, not available in this version."""

from __future__ import annotations


def unavailable(orchestrator: str) -> str:
    """Why a session can't be started, and what to do about it."""
    return (
        "runner claude-code is not available in this version; in fleet.yaml set "
        f"orchestrators.{orchestrator}.runner to {{type: command, command: [...]}} and run `fleet apply`"
    )
