from __future__ import annotations

from cluster.control.launch import STABLE_S, backoff_s
from cluster.control.restarts import RARE_S, Restarts


def test_the_first_death_costs_no_time_the_next_ones_more_and_more() -> None:
    restarts = Restarts()
    rests = []
    for deaths in range(1, 6):
        restarts.note_death("a", 0.0, 1.0)
        rests.append(backoff_s(deaths))
        assert not rests[-1] or "a" in restarts.resting(rests[-1] - 0.01)
        assert "a" not in restarts.resting(rests[-1])
    assert rests == sorted(rests)
    restarts.note_death("a", 0.0, STABLE_S + 1)
    assert not restarts.resting(0.0)


def test_one_workers_failures_are_not_another_s() -> None:
    restarts = Restarts()
    for _ in range(3):
        restarts.note_failure("a", 0.0, "no such file")
    assert restarts.resting(0.0) == {"a"}


def test_three_equal_failures_are_a_problem_until_a_start_succeeds() -> None:
    restarts = Restarts()
    for error in ("x", "y", "y"):
        restarts.note_failure("a", 0.0, error)
        assert restarts.problem() is None
    restarts.note_failure("a", 0.0, "y")
    assert restarts.problem() == "a does not start: y"
    assert restarts.resting(RARE_S - 1) == {"a"}
    restarts.note_start("a")
    assert restarts.problem() is None


def test_failures_for_no_reason_of_its_own_are_never_hopeless() -> None:
    restarts = Restarts()
    for _ in range(20):
        restarts.note_failure("a", 0.0, "")
    assert restarts.problem() is None
    assert not restarts.resting(backoff_s(100))
