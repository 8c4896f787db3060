"""What callers have waited lately: quantiles over the last minute, in a fixed amount of memory.

Prometheus' histograms count since the start, and whoever asks takes differences; a page that was just opened has none.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable
from itertools import accumulate
from typing import Any

WINDOW_S = 60.0
NUM_SLOTS = 12  # the window moves on by one of these at a time
MIN_S = 1e-5  # what is shorter counts as this
MAX_S = 1e3
RATIO = 1.04  # between the bounds of a bucket: a quantile is at most 2 % off
_SCALE = 1 / math.log(RATIO)
_NUM_BUCKETS = math.ceil(math.log(MAX_S / MIN_S) * _SCALE) + 1


class RecentDurations:
    """Durations in seconds, by the time they were seen at. Each costs an addition, whatever the window holds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._slots = [array("L", bytes(array("L").itemsize * _NUM_BUCKETS)) for _ in range(NUM_SLOTS)]
        self._total = array("L", self._slots[0])
        self._slot = self._slot_of_now()  # the newest, counted from the clock's beginning

    def _slot_of_now(self) -> int:
        return int(self._clock() * NUM_SLOTS / WINDOW_S)

    def observe(self, seconds: float) -> None:
        self._forget()
        place = int(math.log(max(seconds, MIN_S) / MIN_S) * _SCALE)
        bucket = min(place, _NUM_BUCKETS - 1)
        self._slots[self._slot % NUM_SLOTS][bucket] += 1
        self._total[bucket] += 1

    def _forget(self) -> None:
        """Empty the slots whose time is over."""
        now = self._slot_of_now()
        for slot in range(max(self._slot, now - NUM_SLOTS) + 1, now + 1):
            counts = self._slots[slot % NUM_SLOTS]
            for bucket, count in enumerate(counts):
                if count:
                    self._total[bucket] -= count
                    counts[bucket] = 0
        self._slot = max(self._slot, now)

    def summary(self) -> dict[str, Any]:
        """`count`, `p50_s` and `p99_s`; None where nothing was seen."""
        self._forget()
        count = sum(self._total)
        return {"count": count, "p50_s": self._quantile(0.5, count), "p99_s": self._quantile(0.99, count)}

    def _quantile(self, share: float, count: int) -> float | None:
        """The middle, by ratio, of the bucket in which the nearest rank is."""
        rank = math.ceil(share * count)
        if not rank:
            return None
        bucket = next(place for place, seen in enumerate(accumulate(self._total)) if seen >= rank)
        return MIN_S * math.exp((bucket + 0.5) / _SCALE)


class RecentLatencies:
    """Time to first token and between two steps' tokens, of all that this gateway has served lately."""

    def __init__(self) -> None:
        self.ttft = RecentDurations()
        self.itl = RecentDurations()

    def body(self) -> dict[str, Any]:
        return {"window_s": WINDOW_S, "ttft": self.ttft.summary(), "itl": self.itl.summary()}
