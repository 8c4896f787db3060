"""Tokens -> server-sent events. Every stream ends with one terminal: its dialect's closing, or an error event."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import ExitStack

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.gateway.dialects.base import Batch, Events
from cluster.gateway.disconnect import ClientDisconnected, wait_for_disconnect
from cluster.gateway.generation import Generation
from cluster.gateway.replies import as_foretoken_error

logger = logging.getLogger(__name__)


class _TookNothingError(Exception):
    """The client does not read: nothing can be said to it."""


class EventStream(Response):
    """Writes a generation's events until its terminal; the client going away aborts it.

    `held` is what the request holds (its generation, its place), let go of at the end.
    """

    def __init__(
        self,
        generation: Generation,
        events: Events,
        first: Batch,
        held: ExitStack,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # a proxy that buffers would hold the tokens back
        self._generation = generation
        self._events = events
        self._first = first
        self._held = held
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(self._abort_on_disconnect(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._write(send)
        except (_TookNothingError, OSError):
            pass
        finally:
            watcher.cancel()
            self._held.close()

    async def _abort_on_disconnect(self, receive: Receive) -> None:
        await wait_for_disconnect(receive)
        self._generation.abort("disconnect")

    async def _write(self, send: Send) -> None:
        try:
            batch = self._first
            while batch:
                data = self._events.events(batch)
                if data:
                    await self._send(send, data)
                batch = await self._generation.read()
            last = self._events.closing()
        except (_TookNothingError, OSError):
            raise
        except ClientDisconnected as error:
            last = self._events.failing(error)
        except Exception as error:
            ours = as_foretoken_error(error)
            logger.warning("the stream of %s ended early: %s", self._events.reply_id, ours.code)
            last = self._events.failing(ours)
        await self._send(send, last, more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        """Raises `_TookNothingError` where the client takes nothing for `timeout_s`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            self._generation.abort("slow_reader")
            logger.warning("the client of %s took nothing for %g s: cut", self._events.reply_id, self._timeout_s)
            raise _TookNothingError from None
