"""Waiting for what a test cannot be told of: it looks again and again, and says at the deadline what did not come."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

DEADLINE_S = 60.0  # on a machine that has much else to do
POLL_S = 0.005

T = TypeVar("T")


async def eventually(
    look: Callable[[], T | Awaitable[T]], what: object = "", *, deadline_s: float = DEADLINE_S, poll_s: float = POLL_S
) -> T:
    """The first true value of `look`. Raises `AssertionError` with `what`; if that can be called, with what it says."""
    loop = asyncio.get_running_loop()
    end = loop.time() + deadline_s
    while True:
        seen = look()
        found = cast(T, await seen if inspect.isawaitable(seen) else seen)
        if found:
            return found
        assert loop.time() < end, _told(what, found, deadline_s)
        await asyncio.sleep(poll_s)


def wait_until(
    look: Callable[[], T], what: object = "", *, deadline_s: float = DEADLINE_S, poll_s: float = POLL_S
) -> T:
    """`eventually`, where no loop runs."""
    end = time.monotonic() + deadline_s
    while not (found := look()):
        assert time.monotonic() < end, _told(what, found, deadline_s)
        time.sleep(poll_s)
    return found


def _told(what: object, found: object, deadline_s: float) -> str:
    return f"{what() if callable(what) else what or 'what is waited for'} is {found!r} after {deadline_s:g} s"
