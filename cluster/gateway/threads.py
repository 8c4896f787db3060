"""Where work runs that would hold up the event loop: each kind of it queues behind its own kind only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

SHORT_CHARS = 64 * 1024  # a longer text waits its turn among the long ones

Result = TypeVar("Result")


class Threads:
    """Four small pools; their threads start when they are first needed."""

    def __init__(self) -> None:
        self.bodies = _pool("body", 2)
        self.templates = _pool("template", 4)
        self._short_texts = _pool("short-text", 2)
        self._long_texts = _pool("long-text", 2)

    def texts(self, num_chars: int) -> ThreadPoolExecutor:
        """The pool that tokenises a text of that length."""
        return self._short_texts if num_chars <= SHORT_CHARS else self._long_texts

    def close(self) -> None:
        """Begin nothing more; what runs is not waited for."""
        for pool in (self.bodies, self.templates, self._short_texts, self._long_texts):
            pool.shutdown(wait=False, cancel_futures=True)


async def run_in(pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    """The result of `work`; a cancelled call leaves the queue, but a thread that has begun goes on."""
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _pool(name: str, num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix=f"foretoken-{name}")
