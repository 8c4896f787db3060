"""grpc has one completion queue for all event loops of a process: a closed loop's late events reach another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def other_loops_ignored() -> Iterator[None]:
    """On the running loop, which would else report the events of loops of other tests, closed by now."""
    loop = asyncio.get_running_loop()
    handle = loop.get_exception_handler()

    def ignore_other_loops(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if str(context.get("exception")) != "Event loop is closed":
            if handle is not None:
                handle(loop, context)
            else:
                loop.default_exception_handler(context)

    loop.set_exception_handler(ignore_other_loops)
    yield
    loop.set_exception_handler(handle)
