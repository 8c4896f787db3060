"""A client that goes away, or closes its side of the connection, ends its request at once.

The two look alike (a FIN) until something is written: TCP says only that the client will send no more. So the request
is given up in both cases, and the client told (`ClientDisconnected` is an error like any other). One that is gone
never sees that; one that half-closed its connection and still reads has its clear error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from cluster.errors import RequestError

Result = TypeVar("Result")

GIVEN_UP = (
    "the client closed the connection, or its sending side, before the answer was complete, so the request was given "
    "up: keep both sides open until then"
)


class ClientDisconnected(RequestError):  # noqa: N818  (mostly an event, not a fault)
    """Nobody may be left to answer."""

    code = "client_disconnected"

    def __init__(self, message: str = GIVEN_UP) -> None:
        super().__init__(message)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client is gone. The request's body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled (`ClientDisconnected`) when the client goes away first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
