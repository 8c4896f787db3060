"""The gateway's end of one worker's stream.

One connection at a time: it is made again whenever it breaks, because the launcher restarts a worker that died. What
ran on a broken one ends with `WorkerLostError`; what comes meanwhile waits for the next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio
import msgspec

from cluster.errors import DeadlineError, ForetokenError, UnavailableError, WorkerLostError
from cluster.gateway.generation import Generation, Observer
from cluster.protocol import (
    PROTOCOL_VERSION,
    STATE_METHOD,
    STREAM_METHOD,
    Abort,
    EngineState,
    FromWorker,
    Hello,
    StepOutput,
    Submit,
    ToWorker,
)

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, whatever the last one met
)
CANCEL_RETRY_S = 0.5  # grpc can lose a cancellation that meets the end of a call
DEADLINE_GRACE_S = 1.0  # the worker keeps a request's deadline; past this we do

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromWorker).decode
_decode_state = msgspec.msgpack.Decoder(EngineState).decode


class _ConnectionLostError(Exception):
    """Why a connection ended, in words."""


class WorkerClient:
    """Submits to the worker at `address` ("unix:/path" or "host:port") and hands its outputs out.

    Everything runs on one event loop, from `start` to `close`.
    """

    def __init__(
        self,
        address: str,
        *,
        hello_timeout_s: float = 10.0,
        write_timeout_s: float = 30.0,
        reconnect_delay_s: float = 0.1,
        max_buffered: int = 4096,
    ) -> None:
        self.address = address
        self._hello_timeout_s = hello_timeout_s
        self._write_timeout_s = write_timeout_s
        self._reconnect_delay_s = reconnect_delay_s
        self._max_buffered = max_buffered
        self._hello: Hello | None = None
        self._connected: asyncio.Event = asyncio.Event()  # also set by `fail`, to wake who waits
        self._outbox: asyncio.Queue[ToWorker] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None
        self._running: dict[str, Generation] = {}
        self._refusal: ForetokenError | None = None
        self._task: asyncio.Task[None] | None = None
        self.num_connections = 0
        self.last_failure = "no connection was tried yet"

    async def __aenter__(self) -> WorkerClient:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def start(self) -> None:
        """Connect, and go on connecting, in the background."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep_connected())

    async def close(self) -> None:
        """End what runs and leave the worker; it aborts what it still has of ours."""
        self.fail(UnavailableError("the server has shut down"))
        while self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=CANCEL_RETRY_S)
        self._task = None

    @property
    def hello(self) -> Hello | None:
        """What the worker serves; None while there is none."""
        return self._hello

    async def ready(self, timeout_s: float) -> Hello:
        """Wait for a worker. Raises `DeadlineError`, or what `fail` was given."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if self._refusal is not None:
                        raise self._refusal
                    if self._hello is not None:
                        return self._hello
                    await self._connected.wait()
        except TimeoutError:
            raise DeadlineError(f"no worker was ready within {timeout_s:g} s ({self.last_failure})") from None

    def submit(self, submits: Sequence[Submit], *, timeout_s: float, observer: Observer) -> Generation:
        """Start the sequences of one HTTP request; choice i is `submits[i]`.

        Raises `WorkerLostError` where the worker has gone since `ready`.
        """
        if self._refusal is not None:
            raise self._refusal
        if self._hello is None:
            raise WorkerLostError("the worker was lost before the request reached it; send it again")
        generation = Generation(
            [submit.request_id for submit in submits],
            send_abort=self._abort,
            observer=observer,
            max_buffered=self._max_buffered,
        )
        for submit in submits:
            self._running[submit.request_id] = generation
            self._outbox.put_nowait(submit)
        error = DeadlineError(f"the request took longer than {timeout_s:.0f} s")
        generation.fail_after(timeout_s + DEADLINE_GRACE_S, error)
        return generation

    def fail(self, error: ForetokenError) -> None:
        """End all requests, running and waiting, with `error`, and refuse further ones with it."""
        self._refusal = error
        self._connected.set()
        self._end_running(error, reason="shutdown")

    async def state(self, timeout_s: float) -> EngineState | None:
        """The engine's numbers; None where no worker answers in time."""
        if self._channel is None or self._hello is None:
            return None
        try:
            raw: bytes = await self._channel.unary_unary(STATE_METHOD)(b"", timeout=timeout_s)
            return _decode_state(raw)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, msgspec.DecodeError):
            return None

    # ----------------------------------------------------------------------------------------------- the connection

    async def _keep_connected(self) -> None:
        while True:
            try:
                await self._connection()
            except (
                _ConnectionLostError,
                grpc.RpcError,
                grpc.aio.UsageError,
                OSError,
                asyncio.InvalidStateError,
            ) as error:
                self._note_failure(error)
            except Exception:
                logger.exception("the connection to the worker at %s failed", self.address)
                self.last_failure = "an internal error"
            finally:
                self._hello = None
                self._channel = None
                if self._refusal is None:
                    self._connected.clear()
                self._end_running(
                    WorkerLostError("the worker that ran this request was lost; send it again"), reason="worker_lost"
                )
            await asyncio.sleep(self._reconnect_delay_s)

    def _note_failure(self, error: Exception) -> None:
        text = str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error) or "no answer in time"
        if self._hello is not None:
            logger.warning("lost worker %s at %s: %s", self._hello.worker_id, self.address, text)
        elif text != self.last_failure:
            # Before the first connection that is what a start looks like.
            level = logging.INFO if self.num_connections else logging.DEBUG
            logger.log(level, "no worker at %s yet: %s", self.address, text)
        self.last_failure = text

    async def _connection(self) -> None:
        """Serve one connection until it breaks. Raises `_ConnectionLostError` or grpc's errors."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            call = channel.stream_stream(STREAM_METHOD)()
            async with asyncio.timeout(self._hello_timeout_s):
                hello = _message(await call.read())
            if not isinstance(hello, Hello):
                raise _ConnectionLostError("the worker's first message was no Hello")
            if hello.version != PROTOCOL_VERSION:
                raise _ConnectionLostError(
                    f"the worker speaks protocol version {hello.version}, this gateway {PROTOCOL_VERSION}: "
                    "run both from one release"
                )
            self._outbox = asyncio.Queue()
            self._channel = channel
            self._hello = hello
            self.num_connections += 1
            self._connected.set()
            logger.info("worker %s at %s serves %s", hello.worker_id, self.address, hello.served_name)
            both = {asyncio.ensure_future(self._read(call)), asyncio.ensure_future(self._write(call, self._outbox))}
            try:
                done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                first = done.pop()
                if first.cancelled():  # by grpc: nobody else knows the task
                    raise _ConnectionLostError("the stream was cancelled")
                first.result()
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        while True:
            message = _message(await call.read())
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    generation = self._running.get(output.request_id)
                    if generation is not None:
                        if output.finish is not None:
                            del self._running[output.request_id]
                        generation.deliver(output)

    async def _write(self, call: Any, outbox: asyncio.Queue[ToWorker]) -> None:
        while True:
            message = await outbox.get()
            async with asyncio.timeout(self._write_timeout_s):
                await call.write(_encode(message))

    def _abort(self, request_id: str) -> None:
        if self._running.pop(request_id, None) is not None and self._hello is not None:
            self._outbox.put_nowait(Abort(request_id=request_id))

    def _end_running(self, error: ForetokenError, *, reason: str) -> None:
        for generation in set(self._running.values()):
            generation.fail(error, reason=reason)
        self._running.clear()


def _message(raw: Any) -> Hello | StepOutput:
    if raw is grpc.aio.EOF:
        raise _ConnectionLostError("the worker closed the stream")
    try:
        message: Hello | StepOutput = _decode(raw)
    except msgspec.MsgspecError as error:
        raise _ConnectionLostError(f"the worker sent what is no message: {error}") from error
    return message
