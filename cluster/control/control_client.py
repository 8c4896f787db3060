"""The controller's stream to one worker: leases and orders out, reports in; opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import msgspec

from cluster.channel import CHANNEL_OPTIONS, REFUSALS, call_metadata, end_tasks
from cluster.protocol import (
    CONTROL_METHOD,
    Assign,
    Lead,
    Route,
    ToControlled,
    WorkerReport,
)

logger = logging.getLogger(__name__)

RECONNECT_S = 0.1

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(WorkerReport).decode


class ControlClient:
    """Leads the worker at `address` from `start` to `close`, and tells it the last order on every new stream.

    `lead` is asked for anew each heartbeat. `on_report` gets every report, `on_refused` once more a report that was all
    that the worker had to say: it obeys another controller. `on_broken` is called when a stream ends.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None,
        lead: Callable[[], Lead],
        heartbeat_s: float,
        answer_timeout_s: float,
        on_report: Callable[[WorkerReport], None],
        on_refused: Callable[[WorkerReport], None],
        on_broken: Callable[[], None],
    ) -> None:
        self.address = address
        self._metadata = call_metadata(token)
        self._lead = lead
        self._heartbeat_s = heartbeat_s
        self._answer_timeout_s = answer_timeout_s
        self._on_report = on_report
        self._on_refused = on_refused
        self._on_broken = on_broken
        self._order: Assign | Route | None = None
        self._has_order = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.refusal: str | None = None  # why the worker does not let itself be led, in its words

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep_open())

    def send(self, order: Assign | Route) -> None:
        """Takes the place of the order before, on this stream and on later ones."""
        self._order = order
        self._has_order.set()

    async def close(self) -> None:
        if self._task is not None:
            await end_tasks([self._task])
        self._task = None

    async def _keep_open(self) -> None:
        while True:
            try:
                await self._stream()
            except (grpc.RpcError, grpc.aio.UsageError, OSError, asyncio.InvalidStateError, msgspec.MsgspecError) as e:
                text = e.details() if isinstance(e, grpc.aio.AioRpcError) else str(e)
                if isinstance(e, grpc.aio.AioRpcError) and e.code() in REFUSALS:
                    self.refusal = text or e.code().name
                logger.debug("the control stream to %s: %s", self.address, text or type(e).__name__)
            except Exception:
                logger.exception("the control stream to %s failed", self.address)
            self._on_broken()
            await asyncio.sleep(RECONNECT_S)

    async def _stream(self) -> None:
        """One stream, until it breaks or the worker ends it."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            call = channel.stream_stream(CONTROL_METHOD)(metadata=self._metadata)
            await self._write(call, self._lead())
            first = await self._read(call)
            if first is None:
                return
            self.refusal = None
            self._on_report(first)
            if self._order is not None:
                self._has_order.set()
            both = {asyncio.ensure_future(self._read_all(call, first)), asyncio.ensure_future(self._write_all(call))}
            try:
                done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.cancelled():  # by grpc, as it ends a call
                        task.result()
            finally:
                await end_tasks(both)
                call.cancel()

    async def _read(self, call: Any) -> WorkerReport | None:
        """None at the end. Raises `TimeoutError` where the worker says nothing for `answer_timeout_s`."""
        async with asyncio.timeout(self._answer_timeout_s):
            raw = await call.read()
        return None if raw is grpc.aio.EOF else _decode(raw)

    async def _read_all(self, call: Any, first: WorkerReport) -> None:
        report = await self._read(call)
        if report is None:
            self._on_refused(first)
        while report is not None:
            self._on_report(report)
            report = await self._read(call)

    async def _write_all(self, call: Any) -> None:
        while True:
            if self._has_order.is_set() and self._order is not None:
                self._has_order.clear()
                await self._write(call, self._order)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_order.wait(), self._heartbeat_s)
                continue
            await self._write(call, self._lead())

    async def _write(self, call: Any, message: ToControlled) -> None:
        async with asyncio.timeout(self._answer_timeout_s):
            await call.write(_encode(message))
