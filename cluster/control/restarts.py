"""When a worker that died, or did not start, is started again: at once, then after growing pauses, then rarely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.control.failures import Failures, backoff_s
from cluster.errors import ForetokenError, StartImpossibleError, UnavailableError
from cluster.store.records import StartFailure

RARE_S = 30.0  # between two tries of a start that failed in one way again and again


@dataclass
class _Record:
    failures: Failures
    failure: StartFailure | None = None  # why the last start failed; None: it did not, or not for a reason of its own
    rest_until_s: float = 0.0


@dataclass
class Restarts:
    """By the worker's name. Times are those of one clock."""

    backoff: Callable[[int], float] = backoff_s
    _records: dict[str, _Record] = field(default_factory=dict)

    def note_death(self, name: str, now_s: float, lived_s: float) -> None:
        record = self._record(name)
        record.failures.note_death(lived_s)
        record.rest_until_s = now_s + record.failures.pause_s

    def note_failure(self, name: str, now_s: float, error: ForetokenError) -> None:
        """A start failed; with `UnavailableError` itself for no reason of its own: its launcher cannot be reached."""
        record = self._record(name)
        record.failures.note_failed_start(error)
        record.failure = None
        if type(error) is not UnavailableError:
            record.failure = StartFailure(code=error.code, message=error.message, worker=name)
        record.rest_until_s = now_s + (RARE_S if record.failures.is_hopeless else record.failures.pause_s)

    def note_start(self, name: str) -> None:
        record = self._record(name)
        record.failures.note_start()
        record.failure = None

    def resting(self, now_s: float) -> frozenset[str]:
        """Those that are not to be started yet."""
        return frozenset(name for name, record in self._records.items() if record.rest_until_s > now_s)

    def failures(self) -> tuple[StartFailure, ...]:
        """Why workers do not start, where they keep failing in one way."""
        hopeless = (record for _, record in sorted(self._records.items()) if record.failures.is_hopeless)
        return tuple(record.failure for record in hopeless if record.failure is not None)

    def problem(self) -> str | None:
        """The first of `failures` in words."""
        for failure in self.failures():
            never = ", and would not by being tried again" if failure.code == StartImpossibleError.code else ""
            return f"{failure.worker} does not start{never}: {failure.message}"
        return None

    def _record(self, name: str) -> _Record:
        return self._records.setdefault(name, _Record(Failures(self.backoff)))
