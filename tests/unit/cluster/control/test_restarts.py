from __future__ import annotations

from cluster.control.failures import STABLE_S, backoff_s
from cluster.control.restarts import RARE_S, Restarts
from cluster.errors import CheckpointError, StartImpossibleError, StartRefusedError, UnavailableError, WorkerLostError
from cluster.store.records import StartFailure


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
        restarts.note_failure("a", 0.0, CheckpointError("no such file"))
    assert restarts.resting(0.0) == {"a"}


def test_three_equal_failures_are_told_of_until_a_start_succeeds() -> None:
    restarts = Restarts()
    for text in ("x", "y", "y"):
        restarts.note_failure("a", 0.0, WorkerLostError(text))
        assert restarts.failures() == ()
    restarts.note_failure("a", 0.0, WorkerLostError("y"))
    assert restarts.failures() == (StartFailure(code="worker_lost", message="y", worker="a"),)
    assert restarts.resting(RARE_S - 1) == {"a"}
    restarts.note_start("a")
    assert restarts.failures() == ()


def test_a_worker_that_refuses_may_use_other_words_each_time() -> None:
    restarts = Restarts()
    for i in range(3):
        assert restarts.failures() == ()
        restarts.note_failure("a", 0.0, StartRefusedError(f"{i} GiB are free"))
    assert restarts.failures() == (StartFailure(code="start_refused", message="2 GiB are free", worker="a"),)
    restarts.note_failure("a", 0.0, WorkerLostError("killed"))
    assert restarts.failures() == ()  # that may be another reason


def test_what_another_try_does_not_change_is_tried_once_and_then_rarely() -> None:
    restarts = Restarts()
    restarts.note_failure("a", 0.0, StartImpossibleError("no such device"))
    assert restarts.failures() == (StartFailure(code="start_impossible", message="no such device", worker="a"),)
    assert restarts.problem() == "a does not start, and would not by being tried again: no such device"
    assert restarts.resting(RARE_S - 1) == {"a"}
    restarts.note_start("a")
    assert (restarts.failures(), restarts.problem()) == ((), None)


def test_failures_for_no_reason_of_its_own_are_never_hopeless() -> None:
    restarts = Restarts()
    for _ in range(20):
        restarts.note_failure("a", 0.0, UnavailableError("Ray is away"))
    assert restarts.failures() == ()
    assert not restarts.resting(backoff_s(100))
