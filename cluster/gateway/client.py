"""The gateway's end of one worker's stream.

One connection at a time: it is made again whenever it breaks, because whoever started the worker starts it again when
it has died. What ran on a broken one is its owner's to place anew.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol

import grpc
import grpc.aio
import msgspec

from cluster.channel import CHANNEL_OPTIONS, call_metadata, end_tasks
from cluster.protocol import (
    PROTOCOL_VERSION,
    STATE_METHOD,
    STREAM_METHOD,
    Beat,
    EngineState,
    FromWorker,
    Hello,
    RequestOutput,
    StepOutput,
    ToWorker,
)
from cluster.silence import ListeningTime

logger = logging.getLogger(__name__)

LEASE_CHECKS = 8  # looks at a silent worker within its lease
REFUSED = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromWorker).decode
_decode_state = msgspec.msgpack.Decoder(EngineState).decode


class _ConnectionLostError(Exception):
    """Why a connection ended, in words."""


class _WrongWorkerError(_ConnectionLostError):
    """Who answered is not the worker that is meant, or cannot be talked to."""


# How a connection ends. TimeoutError is an OSError.
_EXPECTED = (_ConnectionLostError, grpc.RpcError, grpc.aio.UsageError, OSError, asyncio.InvalidStateError)


class Owner(Protocol):
    """Who is told what the worker does."""

    def connected(self) -> None:
        """There is a worker: `WorkerClient.hello` says which."""

    def received(self, output: RequestOutput) -> None: ...

    def told(self, state: EngineState) -> None:
        """The engine's numbers, behind all outputs that came before."""

    def lost(self) -> None:
        """The connection broke; nothing of what was sent on it goes on."""


class WorkerClient:
    """Talks to the worker at `address` ("unix:/path" or "host:port"), on one event loop from `start` to `close`.

    `worker_id`: only this process is meant; "": whichever answers. `lease_s`: a worker from which no message, not even
    a `Beat`, came for so long is lost; None: only a broken stream tells.
    """

    def __init__(
        self,
        address: str,
        owner: Owner,
        *,
        worker_id: str = "",
        token: str | None = None,
        lease_s: float | None = None,
        hello_timeout_s: float = 10.0,
        write_timeout_s: float = 30.0,
        reconnect_delay_s: float = 0.1,
    ) -> None:
        self.address = address
        self._owner = owner
        self._worker_id = worker_id
        self._metadata = call_metadata(token)
        self._lease_s = lease_s
        self._hello_timeout_s = hello_timeout_s
        self._write_timeout_s = write_timeout_s
        self._reconnect_delay_s = reconnect_delay_s
        self._hello: Hello | None = None
        self._silent_s = 0.0  # since the last message
        self._outbox: asyncio.Queue[ToWorker] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self.num_connections = 0
        self.last_failure = "no connection was tried yet"  # in words for everybody, without addresses
        self._last_text = ""

    def start(self) -> None:
        """Connect, and go on connecting, in the background."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep_connected())

    async def close(self) -> None:
        """Leave the worker; it aborts what it still has of ours."""
        if self._task is not None:
            await end_tasks([self._task])
        self._task = None

    @property
    def hello(self) -> Hello | None:
        """What the worker serves; None while there is none."""
        return self._hello

    def send(self, message: ToWorker) -> None:
        """Queue a message for the worker that there is; without one it is gone."""
        if self._hello is not None:
            self._outbox.put_nowait(message)

    async def state(self, timeout_s: float) -> EngineState | None:
        """The engine's numbers; None where no worker answers in time."""
        if self._channel is None or self._hello is None:
            return None
        try:
            call = self._channel.unary_unary(STATE_METHOD)
            raw: bytes = await call(b"", timeout=timeout_s, metadata=self._metadata)
            return _decode_state(raw)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, msgspec.DecodeError):
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # grpc's, for a channel that was closed meanwhile

    # ----------------------------------------------------------------------------------------------- the connection

    async def _keep_connected(self) -> None:
        while True:
            try:
                await self._connection()
            except _EXPECTED as error:
                self._note_failure(error)
            except Exception:
                logger.exception("the connection to the worker at %s failed", self.address)
                self.last_failure = "an internal error"
            await asyncio.sleep(self._reconnect_delay_s)

    def _note_failure(self, error: BaseException) -> None:
        is_refused = isinstance(error, _WrongWorkerError)
        text = str(error) or "no answer in time"
        if isinstance(error, grpc.aio.AioRpcError):
            is_refused = error.code() in REFUSED
            text = error.details() or text
        if self._hello is not None:
            if not isinstance(error, _EXPECTED):
                logger.error("the connection to the worker at %s failed", self.address, exc_info=error)
            logger.warning("lost worker %s at %s: %s", self._hello.worker_id, self.address, text)
        elif text != self._last_text:
            # Before the first connection that is what a start looks like.
            level = logging.WARNING if is_refused else logging.INFO if self.num_connections else logging.DEBUG
            logger.log(level, "no worker at %s yet: %s", self.address, text)
        self._last_text = text
        is_unreachable = isinstance(error, grpc.aio.AioRpcError) and error.code() == grpc.StatusCode.UNAVAILABLE
        self.last_failure = "it cannot be reached" if is_unreachable else text  # grpc's own words have its address

    async def _connection(self) -> None:
        """Serve one connection until it breaks. Raises `_ConnectionLostError` or grpc's errors."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            call = channel.stream_stream(STREAM_METHOD)(metadata=self._metadata)
            async with asyncio.timeout(self._hello_timeout_s):
                hello = self._checked(_message(await call.read()))
            self._outbox = asyncio.Queue()
            self._channel = channel
            self._hello = hello
            self._silent_s = 0.0
            self.num_connections += 1
            logger.info("worker %s at %s serves %s", hello.worker_id, self.address, hello.served_name)
            self._owner.connected()
            parts = [self._read(call), self._write(call, self._outbox)]
            if self._lease_s is not None:
                parts.append(self._watch(self._lease_s))
            tasks = {asyncio.ensure_future(part) for part in parts}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                self._lose(done.pop())  # before what follows, which may take its time
            finally:
                self._hello = None
                self._channel = None
                await end_tasks(tasks)

    def _lose(self, ended: asyncio.Task[None]) -> None:
        """Tell why the connection is over, and whom it concerns."""
        self._note_failure(_error_of(ended) or _ConnectionLostError("the stream was cancelled"))
        self._hello = None
        self._channel = None
        self._owner.lost()

    def _checked(self, hello: FromWorker) -> Hello:
        if not isinstance(hello, Hello):
            raise _WrongWorkerError("the worker's first message was no Hello")
        if hello.version != PROTOCOL_VERSION:
            raise _WrongWorkerError(
                f"the worker speaks protocol version {hello.version}, this gateway {PROTOCOL_VERSION}: "
                "run both from one release"
            )
        if self._worker_id not in ("", hello.worker_id):
            raise _WrongWorkerError(f"worker {hello.worker_id} answers there, not {self._worker_id}")
        return hello

    async def _read(self, call: Any) -> None:
        while True:
            message = _message(await call.read())
            self._silent_s = 0.0
            if isinstance(message, StepOutput):
                for output in message.outputs:
                    self._owner.received(output)
            if isinstance(message, StepOutput | Beat) and message.state is not None:
                self._owner.told(message.state)

    async def _write(self, call: Any, outbox: asyncio.Queue[ToWorker]) -> None:
        while True:
            message = await outbox.get()
            async with asyncio.timeout(self._write_timeout_s):
                await call.write(_encode(message))

    async def _watch(self, lease_s: float) -> None:
        """Raise `_ConnectionLostError` when the worker's lease has ended."""
        pause_s = lease_s / LEASE_CHECKS
        listening = ListeningTime(pause_s, asyncio.get_running_loop().time)
        while True:
            await asyncio.sleep(pause_s)
            self._silent_s += listening.passed_s()
            if self._silent_s > lease_s:
                raise _ConnectionLostError(f"no message for {self._silent_s:.2f} s")


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    """What ended a task; None where it was cancelled, maybe by grpc: nobody else knows it."""
    return None if task.cancelled() else task.exception()


def _message(raw: Any) -> FromWorker:
    if raw is grpc.aio.EOF:
        raise _ConnectionLostError("the worker closed the stream")
    try:
        message: FromWorker = _decode(raw)
    except msgspec.MsgspecError as error:
        raise _ConnectionLostError(f"the worker sent what is no message: {error}") from error
    return message
