"""A lease that somebody renews: a controller, or the engine's thread. When it runs out, the worker ends itself."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

LOOKS = 20  # at the lease within its time
LAST_WORDS_S = 1.0  # for the log line: whoever reads standard error may hang


class Lease:
    """Ends the process when `renew` was not called for `timeout_s`, by a thread of its own: an event loop may hang."""

    def __init__(self, timeout_s: float | None, last_words: str, die: Callable[[], None] = lambda: os._exit(1)) -> None:
        """`timeout_s` None: it lasts for ever. `last_words`: why it ended, with ``{:g}`` for the time."""
        self._timeout_s = timeout_s
        self._last_words = last_words
        self._die = die
        self._lock = threading.Lock()
        self._renewed_for: float | None = None  # by `renew`, since the last look
        self._ended = threading.Event()

    def start(self) -> None:
        if self._timeout_s is not None:
            threading.Thread(target=self._watch, args=(self._timeout_s,), name="lease", daemon=True).start()

    def renew(self, longer_s: float = 0.0) -> None:
        """From now on it lasts its time again, and until the next renewal `longer_s` more: whoever renews it waits."""
        with self._lock:
            self._renewed_for = longer_s

    def end(self) -> None:
        """Nobody will renew it any more, and that is as it should be."""
        self._ended.set()

    def _watch(self, timeout_s: float) -> None:
        pause_s = timeout_s / LOOKS
        silent_s, longer_s, before = 0.0, 0.0, time.monotonic()
        while silent_s < timeout_s + longer_s:
            if self._ended.wait(pause_s):
                return
            now = time.monotonic()
            with self._lock:
                renewed_for, self._renewed_for = self._renewed_for, None
            if renewed_for is not None:
                silent_s, longer_s = 0.0, renewed_for
            else:
                # A process that was stopped for a while has yet to read what came meanwhile.
                silent_s += min(now - before, 2 * pause_s)
            before = now
        last_words = threading.Thread(target=self._say_why, args=(timeout_s,), daemon=True)
        last_words.start()
        last_words.join(LAST_WORDS_S)
        self._die()

    def _say_why(self, timeout_s: float) -> None:
        log.critical("%s: this worker ends itself", self._last_words.format(timeout_s))
