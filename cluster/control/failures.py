"""How often a process has failed in a row, and so how long to wait before it is started again, or to give it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import ConfigError, ForetokenError, StartImpossibleError, StartRefusedError, UnavailableError

MAX_EQUAL_START_FAILURES = 3
STABLE_S = 60.0  # what lived this long is started again without waiting


def backoff_s(num_failures: int) -> float:
    """Seconds to wait before the restart after this many deaths in a row: 0, 0.5, 1, 2 … 10."""
    return 0.0 if num_failures <= 1 else min(10.0, 0.5 * 2 ** (num_failures - 2))


@dataclass
class Failures:
    """Of one process and its successors."""

    backoff: Callable[[int], float] = backoff_s
    num_in_a_row: int = 0  # deaths and failed starts
    num_alike: int = 0  # failed starts in a row that failed in one way
    _is_final: bool = False  # the last start failed for what does not change by itself
    _way: object = None  # in which the last start failed; None: in no way of its own

    def note_death(self, lived_s: float) -> None:
        self.num_in_a_row = 1 if lived_s > STABLE_S else self.num_in_a_row + 1

    def note_failed_start(self, error: ForetokenError) -> None:
        before, self._way = self._way, _way_of(error)
        self._is_final = isinstance(error, StartImpossibleError | ConfigError)
        self.num_in_a_row += 1
        self.num_alike = self.num_alike + 1 if self._way is not None and self._way == before else 1

    def note_start(self) -> None:
        self._way, self.num_alike, self._is_final = None, 0, False

    @property
    def pause_s(self) -> float:
        """Before it is started again."""
        return self.backoff(self.num_in_a_row)

    @property
    def is_hopeless(self) -> bool:
        """Whether it will not start by being started again."""
        return self._is_final or self.num_alike >= MAX_EQUAL_START_FAILURES


def _way_of(error: ForetokenError) -> object:
    """Where a worker says itself why it refuses, the numbers in its words may be others each time."""
    if type(error) is UnavailableError:  # who starts it cannot be reached: no failure of its own
        return None
    return error.code, "" if isinstance(error, StartRefusedError) else error.message
