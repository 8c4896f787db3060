"""A real `Controller` that leads `controlled_workers`, all in this process and in real time: `LedCluster`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from cluster.config import load
from cluster.control.controller import Controller
from cluster.control.last_known import LastKnown
from cluster.control.model import Model
from cluster.control.topology import Device, Node, Topology
from cluster.errors import StoreUnavailableError
from cluster.machine import Machine
from cluster.protocol import ModelShape
from cluster.store.base import Versioned
from cluster.store.memory import MemoryStore
from cluster.store.records import LEAD_KEY, ClusterStatus, WorkerRecord
from tests.support.controlled_workers import ControlledLauncher

DEADLINE_S = 30.0
LEASE_S = 0.6
SHAPE = ModelShape(
    num_layers=3,
    moe_layers=(1, 2),
    num_experts=4,
    expert_bytes=1000,
    dense_bytes=1000,
    kv_token_bytes=1,
    max_model_len=64,
)
MACHINE = Machine("Linux", "x86_64", "A processor", frozenset(), 4, None, 2**34, 2**33)
NAMES = {"attention-0", "expert-0", "expert-1"}
TOKEN = "a token"


def nodes(num: int = 3) -> Topology:
    gib = 2**30
    return Topology(tuple(Node(f"n{i}", f"n{i}", gib, (Device("cpu", "cpu", gib),), 4, "m") for i in range(num)))


class FaultyStore(MemoryStore):
    """A store that can be away, and come back empty."""

    is_away = False
    num_looks = 0  # at who leads
    num_scans = 0  # of all workers' records

    async def get(self, key: str) -> Versioned | None:
        self.num_looks += key == LEAD_KEY
        return await super().get(key)

    async def entries(self, prefix: str) -> dict[str, Versioned]:
        self.num_scans += 1
        return await super().entries(prefix)

    def _room(self, name: str) -> Any:
        if self.is_away:
            raise StoreUnavailableError("the store is away")
        return super()._room(name)

    def empty(self) -> None:
        self._rooms.clear()


class LedCluster:
    """A controller that runs until `kill` or `stop`."""

    def __init__(
        self,
        store: FaultyStore,
        launcher: ControlledLauncher,
        *,
        last_known: LastKnown | None = None,
        beat: Callable[[], None] = lambda: None,
        **settings: object,
    ) -> None:
        self.store = store
        self.launcher = launcher
        values: dict[str, object] = {"attention_workers": 1, "expert_workers": 2, "lease_s": LEASE_S}
        self.settings = load(values | {"token": TOKEN, "drain_timeout_s": 1.0} | settings)
        self.controller = Controller(
            self.settings,
            store=store,
            launcher=launcher,
            model=Model("demo", Path("/models/demo")),
            shape=SHAPE,
            machine=MACHINE,
            backoff=lambda _: 0.0,
            last_known=last_known,
            beat=beat,
        )
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(self.controller.run(self.stop))

    async def until(self, condition: Callable[[], bool | Awaitable[bool]]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                met = condition()
                if isinstance(met, bool) and met:
                    return
                if not isinstance(met, bool) and await met:
                    return
                if self.task.done():
                    await self.task
                await asyncio.sleep(0.01)

    async def status(self) -> ClusterStatus | None:
        entry = await self.store.get("status/cluster")
        return msgspec.json.decode(entry.value, type=ClusterStatus) if entry is not None else None

    async def is_well(self) -> bool:
        status = await self.status()
        return (
            status is not None
            and status.controller_id == self.controller.controller_id
            and status.problem is None
            and len(status.workers) == 3
            and all(worker.condition == "serving" for worker in status.workers)
            and self.launcher.workers["attention-0"].route is not None
            and sorted(worker.num_experts for worker in status.workers) == [0, 4, 4]
        )

    async def kill(self) -> None:
        """As SIGKILL does: nothing is put in order."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def ids(self) -> dict[str, str]:
        return {name: worker.record.worker_id for name, worker in self.launcher.workers.items()}


@contextlib.asynccontextmanager
async def running(store: FaultyStore | None = None, **settings: object) -> AsyncIterator[LedCluster]:
    cluster = LedCluster(store or FaultyStore(), ControlledLauncher(nodes(), token=TOKEN), **settings)
    try:
        yield cluster
    finally:
        await cluster.kill()
        await cluster.launcher.close()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * DEADLINE_S):
            await body()

    asyncio.run(bounded())


async def stored_records(store: FaultyStore) -> dict[str, WorkerRecord]:
    entries = await store.entries("workers/")
    return {key: msgspec.json.decode(entry.value, type=WorkerRecord) for key, entry in entries.items()}
