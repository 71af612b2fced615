"""Why the hands did not do what was asked: becomes the request's `Refusal`."""

from __future__ import annotations

LEASE_HELD, FENCED, NOT_STAGED, NOT_RUNNING = "lease_held", "fenced", "not_staged", "not_running"
FAILED = "failed"


class Declined(Exception):
    """It is not done; `code` is a Refusal's."""

    def __init__(self, code: str, problem: str) -> None:
        self.code = code
        super().__init__(problem)
