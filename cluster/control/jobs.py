"""What a loop has running beside it: tasks by a key, one of a kind at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import Any

logger = logging.getLogger(__name__)


class Jobs:
    """The tasks of one event loop's object.

    `pause_s`: after a job failed, before the like may run again. `on_failure` is called when there is a `failure`.
    """

    def __init__(self, pause_s: float, on_failure: Callable[[], None]) -> None:
        self.failure: Exception | None = None  # the first that ended a loop
        self._pause_s = pause_s
        self._on_failure = on_failure
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}

    def once(self, key: Hashable, run: Callable[[], Awaitable[object]]) -> None:
        """Run something to its end, unless the like runs already. Where it fails, whoever wants it orders it again."""

        async def job() -> None:
            try:
                await run()
            except Exception:
                logger.exception("the job %s failed", key)
                await asyncio.sleep(self._pause_s)

        self._begin(key, job)

    def keep(self, key: Hashable, run: Callable[[], Awaitable[object]]) -> None:
        """Run a loop that others rely on: its failure is theirs."""

        async def job() -> None:
            try:
                await run()
            except Exception as error:
                self.fail(error)

        self._begin(key, job)

    def fail(self, error: Exception) -> None:
        """Count as the failure of a loop that others rely on."""
        self.failure = self.failure or error
        self._on_failure()

    def named(self, kind: str) -> frozenset[str]:
        """The second parts of the keys (kind, …) that run."""
        return frozenset(key[1] for key in self._tasks if isinstance(key, tuple) and _kind(key) == kind)

    async def cancel(self, kind: str | None = None) -> None:
        """End those of the key `kind` or (kind, …); None: all."""
        tasks = [task for key, task in self._tasks.items() if kind in (None, _kind(key))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, key: Hashable, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if key not in self._tasks:
            task = self._tasks[key] = asyncio.get_running_loop().create_task(job())
            # Not within the job: one that is cancelled before its first step never runs a line of it.
            task.add_done_callback(lambda _: self._tasks.pop(key, None))


def _kind(key: Hashable) -> Hashable:
    return key[0] if isinstance(key, tuple) else key
