from __future__ import annotations

from cluster.control.failures import MAX_EQUAL_START_FAILURES, STABLE_S, Failures, backoff_s
from cluster.errors import (
    ConfigError,
    DeadlineError,
    ForetokenError,
    StartImpossibleError,
    StartRefusedError,
    UnavailableError,
    WorkerLostError,
)


def _failed(*errors: ForetokenError) -> Failures:
    failures = Failures()
    for error in errors:
        failures.note_failed_start(error)
    return failures


def test_backoff_grows_to_a_bound() -> None:
    assert [backoff_s(deaths) for deaths in (1, 2, 3, 4)] == [0.0, 0.5, 1.0, 2.0]
    assert backoff_s(50) == 10.0


def test_deaths_and_failed_starts_in_a_row_make_the_pause_longer_until_one_lived_long() -> None:
    failures = Failures()
    for _ in range(3):
        failures.note_death(STABLE_S / 2)
    failures.note_failed_start(WorkerLostError("x"))
    assert failures.pause_s == backoff_s(4)
    failures.note_death(STABLE_S + 1)
    assert failures.pause_s == 0.0


def test_starts_that_fail_in_one_way_are_hopeless() -> None:
    assert not _failed(WorkerLostError("x"), WorkerLostError("y"), WorkerLostError("y")).is_hopeless
    assert not _failed(WorkerLostError("x"), DeadlineError("x"), WorkerLostError("x")).is_hopeless
    failures = _failed(*[WorkerLostError("x")] * MAX_EQUAL_START_FAILURES)
    assert failures.is_hopeless
    failures.note_start()
    assert not failures.is_hopeless


def test_a_worker_that_refuses_may_use_other_words_each_time() -> None:
    assert _failed(*(StartRefusedError(f"{i} GiB are free") for i in range(3))).is_hopeless


def test_what_another_try_does_not_change_is_hopeless_at_once() -> None:
    for error in (StartImpossibleError("no such device"), ConfigError("no such folder")):
        failures = _failed(WorkerLostError("killed"), error)
        assert failures.is_hopeless
        failures.note_failed_start(WorkerLostError("killed"))
        assert not failures.is_hopeless
        assert not _failed(StartRefusedError(error.message)).is_hopeless


def test_a_start_that_could_not_be_tried_tells_nothing() -> None:
    assert not _failed(*[UnavailableError("Ray is away")] * 20).is_hopeless
