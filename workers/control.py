"""The control stream: a controller's leases and orders in, reports out.

Of all controllers the one with the highest epoch is obeyed, on its newest stream (a fencing token: Kleppmann, "How to
do distributed locking", 2016). An epoch has one controller: another that claims it is refused like a lower one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import msgspec

from cluster.protocol import Lead, ToControlled, WorkerReport
from workers.lease import Lease
from workers.orders import Orders, Subject

log = logging.getLogger(__name__)

FIRST_LEAD_S = 10.0  # a stream that says nothing for so long is ended

_encode = msgspec.msgpack.Encoder().encode
_decode_to_controlled = msgspec.msgpack.Decoder(ToControlled).decode


class _Session:
    """One open control stream."""

    def __init__(self) -> None:
        self.is_over = False
        self.changed = asyncio.Event()

    def end(self) -> None:
        self.is_over = True
        self.changed.set()


class ControlService:
    """Knows who controls this worker. Lives on the event loop; `notify` may be called from any thread."""

    def __init__(
        self,
        subject: Subject,
        lease: Lease,
        *,
        report: Callable[[], WorkerReport],
        heartbeat_s: float,
    ) -> None:
        """`report` gives what is the same for every worker."""
        self._subject = subject
        self._lease = lease
        self._base_report = report
        self._heartbeat_s = heartbeat_s
        self._leader: Lead | None = None
        self._session: _Session | None = None  # the leader's
        self._orders = Orders(subject.carry_out, self.notify)
        self._loop = asyncio.get_running_loop()

    def handlers(self) -> Mapping[str, Any]:
        return {"Control": grpc.stream_stream_rpc_method_handler(self.control)}

    def notify(self) -> None:
        """Something that is reported has changed."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who would hear it
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._session is not None:
            self._session.changed.set()

    async def control(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """`Lead` first; then orders in, and reports out until another stream takes over or this one ends.

        The last report says why: its epoch is the one that is obeyed.
        """
        try:
            lead = _decode_to_controlled(await asyncio.wait_for(anext(messages), FIRST_LEAD_S))
        except (StopAsyncIteration, TimeoutError, msgspec.DecodeError):
            lead = None
        if not isinstance(lead, Lead):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a control stream must be Lead")
            return
        session = _Session()
        if not self._admit(session, lead):
            yield _encode(self.report())
            return
        reader = asyncio.create_task(self._read(session, messages))
        try:
            yield _encode(self.report())
            while not session.is_over:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(session.changed.wait(), self._heartbeat_s)
                session.changed.clear()
                yield _encode(self.report())
        finally:
            reader.cancel()
            if self._session is session:
                self._session = None

    def report(self) -> WorkerReport:
        report = msgspec.structs.replace(
            self._base_report(), epoch=self._leader.epoch if self._leader else 0, error=self._orders.error
        )
        return self._subject.reported(report)

    def _admit(self, session: _Session, lead: Lead) -> bool:
        """Whether this stream is the leader's from now on."""
        before = self._leader
        if before is not None and lead.epoch <= before.epoch and lead != before:
            log.warning("%r is refused: %r leads", lead, before)
            return False
        if lead != before:
            log.info("%r leads", lead)
            self._leader = lead
        if before is not None and lead.controller_id != before.controller_id:
            self._orders.drop()
            self._subject.forget_versions()
        if self._session is not None and self._session is not session:
            self._session.end()
        self._session = session
        self._lease.renew()
        return True

    async def _read(self, session: _Session, messages: AsyncIterator[bytes]) -> None:
        try:
            async for body in messages:
                self._take(session, _decode_to_controlled(body))
        except msgspec.DecodeError as error:
            log.error("a control stream is closed: it sent a message that is none of the protocol's: %s", error)
        finally:
            session.end()

    def _take(self, session: _Session, message: ToControlled) -> None:
        if session is not self._session:  # its controller does not know yet that another one leads
            return
        if isinstance(message, Lead):
            if not self._admit(session, message):
                session.end()
        else:
            self._orders.put(message)
            session.changed.set()  # the last order's error is of no more interest
