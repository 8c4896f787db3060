"""When a worker that died, or did not start, is started again: at once, then after growing pauses, then rarely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.control.launch import MAX_EQUAL_START_FAILURES, STABLE_S, backoff_s

RARE_S = 30.0  # between two tries of a start that failed in one way again and again


@dataclass
class _Record:
    num_failures: int = 0  # deaths and failed starts in a row
    last_error: str = ""
    num_equal: int = 0  # failed starts in a row with this error
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

    def note_failure(self, name: str, now_s: float, error: str) -> None:
        """A start failed; `error` "": for no reason of its own."""
        record = self._records.setdefault(name, _Record())
        record.num_failures += 1
        record.num_equal = record.num_equal + 1 if error and error == record.last_error else 1
        record.last_error = error
        is_hopeless = record.num_equal >= MAX_EQUAL_START_FAILURES
        record.rest_until_s = now_s + (RARE_S if is_hopeless else self.backoff(record.num_failures))

    def note_start(self, name: str) -> None:
        record = self._records.setdefault(name, _Record())
        record.last_error, record.num_equal = "", 0

    def resting(self, now_s: float) -> frozenset[str]:
        """Those that are not to be started yet."""
        return frozenset(name for name, record in self._records.items() if record.rest_until_s > now_s)

    def problem(self) -> str | None:
        """Why a worker does not start, where it keeps failing in one way."""
        for name, record in sorted(self._records.items()):
            if record.num_equal >= MAX_EQUAL_START_FAILURES:
                return f"{name} does not start: {record.last_error}"
        return None
