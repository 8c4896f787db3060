"""When a worker that died, or did not start, is started again: at once, then after growing pauses, then rarely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.control.launch import MAX_EQUAL_START_FAILURES, STABLE_S, backoff_s
from cluster.errors import ForetokenError, StartRefusedError, UnavailableError
from cluster.store.records import StartFailure

RARE_S = 30.0  # between two tries of a start that failed in one way again and again


@dataclass
class _Record:
    num_failures: int = 0  # deaths and failed starts in a row
    failure: StartFailure | None = None  # why the last start failed; None: it did not, or not for a reason of its own
    num_equal: int = 0  # failed starts in a row that failed in this way
    rest_until_s: float = 0.0


@dataclass
class Restarts:
    """By the worker's name. Times are those of one clock."""

    backoff: Callable[[int], float] = backoff_s
    _records: dict[str, _Record] = field(default_factory=dict)

    def note_death(self, name: str, now_s: float, lived_s: float) -> None:
        record = self._records.setdefault(name, _Record())
        record.num_failures = 1 if lived_s > STABLE_S else record.num_failures + 1
        record.rest_until_s = now_s + self.backoff(record.num_failures)

    def note_failure(self, name: str, now_s: float, error: ForetokenError) -> None:
        """A start failed; with `UnavailableError` itself for no reason of its own: its launcher cannot be reached."""
        record = self._records.setdefault(name, _Record())
        record.num_failures += 1
        before, record.failure = record.failure, None
        if type(error) is not UnavailableError:
            record.failure = StartFailure(code=error.code, message=error.message, worker=name)
        record.num_equal = record.num_equal + 1 if _is_alike(before, record.failure) else 1
        is_hopeless = record.num_equal >= MAX_EQUAL_START_FAILURES
        record.rest_until_s = now_s + (RARE_S if is_hopeless else self.backoff(record.num_failures))

    def note_start(self, name: str) -> None:
        record = self._records.setdefault(name, _Record())
        record.failure, record.num_equal = None, 0

    def resting(self, now_s: float) -> frozenset[str]:
        """Those that are not to be started yet."""
        return frozenset(name for name, record in self._records.items() if record.rest_until_s > now_s)

    def failures(self) -> tuple[StartFailure, ...]:
        """Why workers do not start, where they keep failing in one way."""
        hopeless = (
            record for _, record in sorted(self._records.items()) if record.num_equal >= MAX_EQUAL_START_FAILURES
        )
        return tuple(record.failure for record in hopeless if record.failure is not None)


def _is_alike(one: StartFailure | None, other: StartFailure | None) -> bool:
    """Where a worker says itself why it refuses, the numbers in its words may be others each time."""
    if one is None or other is None or one.code != other.code:
        return False
    return one.code == StartRefusedError.code or one.message == other.message
