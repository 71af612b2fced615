"""How often one caller may do something: a token bucket each, in memory, for few callers at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MAX_CALLERS = 10_000


class Rate:
    """`burst` at once, `per_s` in the long run, for each caller; the longest silent are forgotten first."""

    def __init__(self, *, burst: int, per_s: float, now_us: Callable[[], int]) -> None:
        self._burst, self._per_us, self._now_us = burst, per_s / 1e6, now_us
        self._left: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def admit(self, caller: str) -> bool:
        """Whether `caller` may now; counts it if so."""
        now_us = self._now_us()
        left = self._now_left(self._left.pop(caller, None), now_us)
        admitted = left >= 1
        self._left[caller] = (left - 1 if admitted else left, now_us)
        if len(self._left) > MAX_CALLERS:
            self._left.popitem(last=False)
        return admitted

    def wait_s(self, caller: str) -> float:
        """How long until `caller` may again; 0 when it may now. Counts nothing."""
        left = self._now_left(self._left.get(caller), self._now_us())
        return max(0.0, (1 - left) / self._per_us / 1e6)

    def _now_left(self, was: tuple[float, int] | None, now_us: int) -> float:
        if was is None:
            return float(self._burst)
        left, at_us = was
        return min(float(self._burst), left + max(0, now_us - at_us) * self._per_us)
