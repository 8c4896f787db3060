"""Workers for tests of the controller: in this process, over real gRPC, the control stream alone; and their launcher.

They obey the highest epoch, carry out orders at once, and report. A `Launcher` for tests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import msgspec

from cluster.control.placement import PlacedWorker
from cluster.control.topology import Topology
from cluster.errors import UnavailableError, WorkerLostError
from cluster.protocol import SERVICE, TOKEN_KEY, Assign, Launch, Lead, Route, ToControlled, WorkerReport
from cluster.store.records import WorkerRecord

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToControlled).decode


class ControlledWorker:
    """One process, as a controller sees it."""

    def __init__(self, record: WorkerRecord, token: str | None, heartbeat_s: float) -> None:
        self.record = record
        self.leader: Lead | None = None
        self.leads: set[Lead] = set()
        self.num_renewals = 0  # of its lease, by whom it obeys
        self.held: tuple[tuple[int, ...], ...] = ()
        self.assign_version = 0
        self.num_assigns = 0
        self.route: Route | None = None
        self.is_running = False
        self.is_hung = False
        self.refusal: str | None = None  # why it takes no control stream
        self._token = token
        self._heartbeat_s = heartbeat_s
        self._server: grpc.aio.Server | None = None
        self._stopped: asyncio.Future[None] | None = None
        self._session: object = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.stream_stream_rpc_method_handler(self._control)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Control": handler}),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.record = msgspec.structs.replace(self.record, address=f"127.0.0.1:{port}")
        await self._server.start()
        self.is_running = True

    async def kill(self) -> None:
        self.is_running = False
        if self._server is None:
            return
        if self._stopped is None:
            self._stopped = asyncio.ensure_future(self._server.stop(None))
        # A controller that is cancelled in the middle of ending this worker must not cancel the end itself:
        # grpc's servers share one future among all who stop them, and the next would find it cancelled.
        await asyncio.shield(self._stopped)

    def obey(self, lead: Lead) -> None:
        """As if that controller had been here."""
        self.leader = lead
        self._changed.set()

    def report(self) -> WorkerReport:
        record = self.record
        return WorkerReport(
            worker_id=record.worker_id,
            name=record.name,
            epoch=self.leader.epoch if self.leader is not None else 0,
            assign_version=self.assign_version,
            experts=self.held,
            route_version=self.route.version if self.route is not None else 0,
        )

    async def _control(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        given = dict(context.invocation_metadata()).get(TOKEN_KEY)
        if self._token is not None and given != f"Bearer {self._token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")
        if self.refusal is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        lead = _decode(await anext(aiter(messages)))
        assert isinstance(lead, Lead)
        self.leads.add(lead)
        if self.leader is not None and lead.epoch <= self.leader.epoch and lead != self.leader:
            yield _encode(self.report())
            return
        self.leader = lead
        self.num_renewals += 1
        session = self._session = object()
        reader = asyncio.create_task(self._read(messages))
        try:
            while self._session is session and self.leader == lead:
                if not self.is_hung:
                    yield _encode(self.report())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._heartbeat_s)
                self._changed.clear()
            yield _encode(self.report())
        finally:
            reader.cancel()

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        async for body in messages:
            order = _decode(body)
            if isinstance(order, Assign):
                self.held, self.assign_version = order.experts, order.version
                self.num_assigns += 1
            elif isinstance(order, Route):
                self.route = order
            elif isinstance(order, Lead):
                self.leads.add(order)
                self.leader = order if self.leader is None or order.epoch >= self.leader.epoch else self.leader
                self.num_renewals += self.leader == order
                continue
            self._changed.set()


class ControlledLauncher:
    """Starts `ControlledWorker`s. What is in `refusals` says why a worker's start fails, by its name."""

    def __init__(self, topology: Topology, *, token: str | None = None, heartbeat_s: float = 0.03) -> None:
        self.nodes = topology
        self.workers: dict[str, ControlledWorker] = {}  # the last process of each name
        self.launches: list[Launch] = []
        self.refusals: dict[str, str] = {}
        self.is_away = False
        self._token = token
        self._heartbeat_s = heartbeat_s

    @property
    def starts_workers(self) -> bool:
        return True

    def _check(self) -> None:
        if self.is_away:
            raise UnavailableError("the launcher is away")

    async def topology(self) -> Topology:
        self._check()
        return self.nodes

    async def start(self, worker: PlacedWorker, launch: Launch) -> WorkerRecord:
        self._check()
        self.launches.append(launch)
        if worker.id in self.refusals:
            raise WorkerLostError(self.refusals[worker.id])
        pid = len(self.launches)
        record = WorkerRecord(
            name=worker.id,
            role=worker.role,
            node_id=worker.node_id,
            device_id=worker.device_id,
            address="",
            worker_id=f"{worker.id}/{pid}",
            pid=pid,
            memory_bytes=worker.memory_bytes,
            kv_bytes=worker.kv_bytes,
        )
        process = self.workers[worker.id] = ControlledWorker(record, self._token, self._heartbeat_s)
        await process.start()
        return process.record

    def _process(self, record: WorkerRecord) -> ControlledWorker | None:
        process = self.workers.get(record.name)
        return process if process is not None and process.record == record and process.is_running else None

    async def adopt(self, record: WorkerRecord) -> bool:
        return await self.is_running(record)

    async def is_running(self, record: WorkerRecord) -> bool:
        self._check()
        return self._process(record) is not None

    async def stop(self, record: WorkerRecord, *, kill: bool) -> None:
        self._check()
        if (process := self._process(record)) is not None:
            await process.kill()

    async def close(self) -> None:
        for process in self.workers.values():
            await process.kill()
