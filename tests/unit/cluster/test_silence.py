from __future__ import annotations

import pytest

from cluster.silence import ListeningTime


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_by(self, seconds: float) -> None:
        self.now_s += seconds


def test_time_in_which_somebody_looks_counts() -> None:
    clock = Clock()
    listening = ListeningTime(1.0, clock)
    total_s = 0.0
    for pause_s in (1.0, 0.5, 1.9, 1.0):
        clock.pass_by(pause_s)
        total_s += listening.passed_s()
    assert total_s == pytest.approx(4.4)


def test_of_a_look_that_comes_late_little_counts_and_only_at_the_next() -> None:
    clock = Clock()
    listening = ListeningTime(1.0, clock)
    clock.pass_by(50.0)
    assert listening.passed_s() == 0.0  # what was said meanwhile is yet to be read
    clock.pass_by(1.0)
    assert listening.passed_s() == pytest.approx(3.0)
    clock.pass_by(1.0)
    assert listening.passed_s() == pytest.approx(1.0)


def test_looks_that_are_always_late_end_the_patience_too() -> None:
    clock = Clock()
    listening = ListeningTime(1.0, clock)
    total_s = 0.0
    for _ in range(5):
        clock.pass_by(3.0)
        total_s += listening.passed_s()
    assert total_s == pytest.approx(8.0)
