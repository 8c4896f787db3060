"""The HTTP/1.1 connection under the application: uvicorn's, with clear ends for what is no whole request.

- What is no HTTP, a head over `MAX_HEAD_BYTES`, one that takes longer than `HEAD_TIMEOUT_S` or ends within itself: an
  error in OpenAI's shape, then the connection is closed.
- Over so many connections: only the open paths are answered on those that are too many (`state.is_surplus`), for the
  probes of whoever watches this server; far over it a connection is refused unread.
- A client that takes nothing of a whole answer for `TAKE_S` is cut: nobody waits for it any more, yet it holds memory.
- What is left of a body when its answer is there is thrown away, for `REST_S`.
- The client closes its side (a FIN) while its request is open: the application's `receive` says `http.disconnect`, yet
  what it then sends still goes out, and ends the connection. A client that is gone for good sends the same FIN as one
  that only shut down its writing side, so the application must give up and say so: the one never sees it, the other
  has its error.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import uuid
from functools import partial
from typing import Any

import h11
import orjson
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from cluster.gateway.replies import openai_error

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
HEAD_TIMEOUT_S = 30.0  # from a connection's begin, or a later head's first byte, to the head's end
MAX_HEAD_BYTES = 64 * 1024  # of a head that has not ended yet
MAX_AHEAD_BYTES = 64 * 1024  # of requests sent ahead; a client that sends more is not read, so its leaving not seen
REST_S = 5.0
TAKE_S = 30.0
KEEP_ALIVE_S = 75  # of a connection between requests: longer than proxies keep theirs, who would send into its end
MAX_SURPLUS = 64  # connections over the bound that are still asked what they want
LINGER_S = 2.0  # a refused client may take so long to read why; closing on what it still sends would destroy that

_DISCONNECT: Message = {"type": "http.disconnect"}


def server_config(
    app: ASGIApp, *, stop_timeout_s: int, backlog: int = 128, max_connections: int = MAX_CONNECTIONS
) -> uvicorn.Config:
    """What uvicorn is told to serve `app` on `Connection`s; one still open `stop_timeout_s` after the end is cut."""
    return uvicorn.Config(
        app,
        http=partial(Connection, max_connections=max_connections),  # type: ignore[arg-type]  # it is only called
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        backlog=backlog,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=stop_timeout_s,
    )


class Connection(H11Protocol):
    """One connection of a client, with its requests one after the other."""

    def __init__(self, *args: Any, max_connections: int = MAX_CONNECTIONS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._is_surplus = False
        self._rest_timer: asyncio.TimerHandle | None = None
        self._application: ASGIApp = self.app  # type: ignore[assignment]  # uvicorn has its own names for the types
        self.app = self._run  # type: ignore[assignment]
        self._half_closed = False
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None  # of a head, or of the lingering at the end
        self._take_timer: asyncio.TimerHandle | None = None

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, told of the connection's end by `receive` as soon as nothing more of its body can come."""
        cycle = self.cycle
        has_all = False

        async def receive_to_end() -> Message:
            nonlocal has_all
            if has_all and self._half_closed:
                return _DISCONNECT
            message = await receive()  # the end of what the client sends wakes it too
            if message["type"] == "http.request":
                if self._half_closed and (has_all or message["more_body"]):
                    has_all = True
                    return _DISCONNECT
                has_all = has_all or not message["more_body"]
            return message

        if self._is_surplus:
            scope.setdefault("state", {})["is_surplus"] = True
        await self._application(scope, receive_to_end, send)
        if cycle.response_complete and self.conn.their_state is h11.SEND_BODY:
            self._rest_timer = self.loop.call_later(REST_S, self.transport.abort)
        if cycle.response_started and not cycle.response_complete and not cycle.disconnected:
            cycle.disconnected = True
            self.transport.abort()  # to close would wait until all is sent, for a client that takes nothing forever

    # ----------------------------------------------------------------------------------------------- asyncio's events

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._is_surplus = len(self.connections) > self._max_connections
        if len(self.connections) > self._max_connections + MAX_SURPLUS:
            self._refuse(
                429, "as many connections are open as there may be", code="overloaded", kind="rate_limit_error"
            )
            return
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_timed_out)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_rest_timer()
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_rest_timer()
        self._watch_head()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # uvicorn's never keeps the transport open
        """Whether the transport stays open for what is still to be sent."""
        if self._refused:
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            self._half_closed = True
            self.cycle.keep_alive = False
            self.cycle.message_event.set()
            return True
        if self._unparsed():
            self._refuse(400, "the connection ended within the request's head")
        return None

    # ------------------------------------------------------------------------------------------------ uvicorn's events

    def handle_events(self) -> None:
        super().handle_events()
        if not self.flow.read_paused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.DONE and len(self._unparsed()) <= MAX_AHEAD_BYTES:
            self.flow.resume_reading()  # paused for a request sent ahead: the connection's end would go unseen

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._take_timer is None:
            self._watch_taking(self.transport.get_write_buffer_size())
        if self._unparsed():
            self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """Called while the parser's error is handled."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            self._refuse(status, f"the request's head is over {MAX_HEAD_BYTES} bytes")
        else:
            self._refuse(status, f"this is no HTTP/1.1 request: {error or msg!s:.200}")

    def shutdown(self) -> None:
        if self._refused:
            self.transport.close()
        else:
            super().shutdown()

    # ---------------------------------------------------------------------------------------------------------- ends

    def _watch_head(self) -> None:
        if self._refused:
            return
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_timed_out)

    def _watch_taking(self, num_left: int) -> None:
        """Cut the client if of `num_left` unsent bytes, where there are some, it takes none for `TAKE_S`."""

        def look() -> None:
            self._take_timer = None
            now_left = self.transport.get_write_buffer_size()
            if now_left >= num_left:
                logger.info("cut a client that took nothing of its answer for %g s", TAKE_S)
                self.transport.abort()
            else:
                self._watch_taking(now_left)

        if num_left:
            self._take_timer = self.loop.call_later(TAKE_S, look)

    def _unparsed(self) -> bytes:
        return self.conn.trailing_data[0]

    def _head_timed_out(self) -> None:
        self._timer = None
        if self._unparsed():
            self._refuse(408, f"the request's head did not arrive within {HEAD_TIMEOUT_S:g} s")
        else:
            self.transport.close()

    def _refuse(
        self, status: int, message: str, *, code: str = "invalid_request", kind: str = "invalid_request_error"
    ) -> None:
        """Answer what never became a whole request, and close; nothing more is read into it."""
        self._stop_timer()
        self._unset_keepalive_if_required()
        self._refused = True
        request_id = uuid.uuid4().hex
        if self.cycle is not None and not self.cycle.response_complete:
            request_id = self.scope["state"].get("request_id", request_id)
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        logger.info("refused what is no request: %d, request %s", status, request_id)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._write_error(status, openai_error(message, kind=kind, code=code), request_id)
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self._timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _write_error(self, status: int, error: dict[str, Any], request_id: str) -> None:
        body = orjson.dumps(error)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        if status == 429:
            headers.append((b"retry-after", b"1"))
        response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))

    def _stop_rest_timer(self) -> None:
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
