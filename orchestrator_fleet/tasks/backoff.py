"""How long to wait before the next try, pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator_fleet.clock import SECOND_US

_MAX_DOUBLINGS = 62


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """As `retry:` in fleet.yaml: seconds, and `jitter` as the share of the wait that is random (0..1)."""

    max_attempts: int = 3
    backoff_s: float = 2.0
    backoff_max_s: float = 300.0
    jitter: float = 0.2


def wait_us(policy: RetryPolicy, *, failures: int, roll: float) -> int:
    """Microseconds before the next try, after `failures` (at least 1) failed ones.

    The wait doubles with each failure up to `backoff_max_s`; `roll` (0..1, from the caller's randomness) moves it
    within `jitter` on both sides, so that tasks which failed together do not come back together.
    """
    exponent = min(max(failures, 1) - 1, _MAX_DOUBLINGS)
    wait_s = min(policy.backoff_s * (1 << exponent), policy.backoff_max_s)
    return round(wait_s * (1 + policy.jitter * (2 * roll - 1)) * SECOND_US)
