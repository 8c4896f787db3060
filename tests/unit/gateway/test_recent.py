"""Quantiles of what callers have waited lately."""

from __future__ import annotations

import random

import pytest

from cluster.gateway.recent import MAX_S, MIN_S, NUM_SLOTS, RATIO, WINDOW_S, RecentDurations


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_quantiles_are_near_those_of_all_that_was_seen() -> None:
    recent, draws = RecentDurations(Clock()), random.Random(5)
    seen = [draws.lognormvariate(-4, 1.5) for _ in range(5000)]
    for seconds in seen:
        recent.observe(seconds)
    seen.sort()
    found = recent.summary()
    assert found["count"] == 5000
    for name, rank in (("p50_s", 2500), ("p99_s", 4950)):
        assert found[name] == pytest.approx(seen[rank - 1], rel=RATIO**0.5 - 1 + 1e-9)


def test_one_duration_is_every_quantile() -> None:
    recent = RecentDurations(Clock())
    assert recent.summary() == {"count": 0, "p50_s": None, "p99_s": None}
    recent.observe(0.25)
    assert recent.summary()["p50_s"] == recent.summary()["p99_s"] == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(("seconds", "near"), [(0.0, MIN_S), (-1.0, MIN_S), (1e9, MAX_S)])
def test_what_is_out_of_range_counts_as_the_nearest(seconds: float, near: float) -> None:
    recent = RecentDurations(Clock())
    recent.observe(seconds)
    assert recent.summary()["p50_s"] == pytest.approx(near, rel=RATIO - 1)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    clock = Clock()
    recent = RecentDurations(clock)
    slot_s = WINDOW_S / NUM_SLOTS
    recent.observe(1.0)
    for _ in range(NUM_SLOTS - 1):
        clock.now_s += slot_s
        recent.observe(2.0)
    assert recent.summary()["count"] == NUM_SLOTS
    clock.now_s += slot_s
    assert recent.summary() | {"p99_s": 0} == {
        "count": NUM_SLOTS - 1,
        "p50_s": pytest.approx(2.0, rel=0.02),
        "p99_s": 0,
    }
    clock.now_s += 100 * WINDOW_S
    assert recent.summary()["count"] == 0
    recent.observe(3.0)
    clock.now_s -= 30 * WINDOW_S  # a clock that goes back loses nothing, and nothing twice
    recent.observe(3.0)
    assert recent.summary()["count"] == 2
