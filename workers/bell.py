"""A bell: who rings it need not know who listens, nor the other way round."""

from __future__ import annotations

from collections.abc import Callable


class Bell:
    """Something has changed, and whoever listens looks at what."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Be called at each ring, on the thread of who rings."""
        self._listeners.append(listener)

    def ring(self) -> None:
        for listener in self._listeners:
            listener()
