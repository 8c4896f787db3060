"""Workers that Kubernetes starts, as pods: they register themselves in the store (`cluster worker`), under a lease."""

from __future__ import annotations

from collections import defaultdict

from cluster.control.placement import PlacedWorker
from cluster.control.topology import Device, Node, Topology
from cluster.errors import UnavailableError
from cluster.protocol import Launch
from cluster.store.base import Store
from cluster.store.records import WORKERS, Reader, WorkerRecord


class PodLauncher:
    """A `Launcher` that starts and ends nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reader = Reader()

    @property
    def starts_workers(self) -> bool:
        return False

    async def topology(self) -> Topology:
        """The nodes that have workers; a node's memory is what its workers have."""
        devices: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for key, entry in (await self._store.entries(WORKERS)).items():
            if (record := self._reader.read_worker(key, entry.value)) is not None:
                devices[record.node_id][record.device_id] += record.memory_bytes
        return Topology(
            tuple(
                Node(
                    node_id,
                    node_id,
                    sum(found.values()),
                    tuple(Device(name, "cuda" if name.startswith("cuda") else "cpu", found[name]) for name in found),
                )
                for node_id, found in sorted(devices.items())
            )
        )

    async def start(self, worker: PlacedWorker, launch: Launch) -> WorkerRecord:
        raise UnavailableError(f"{worker.id} is for Kubernetes to start")

    async def adopt(self, record: WorkerRecord) -> bool:
        return await self.is_running(record)

    async def is_running(self, record: WorkerRecord) -> bool:
        """Whether it is still registered; its lease ends soon after its pod."""
        key = WORKERS + record.name
        entry = await self._store.get(key)
        if entry is None:
            return False
        found = self._reader.read_worker(key, entry.value)
        if found is None:
            raise UnavailableError(f"the store's {key} cannot be read")
        return found.worker_id == record.worker_id

    async def stop(self, record: WorkerRecord, *, kill: bool) -> None:
        """Nothing: a pod ends its worker itself when that hangs (`cluster worker`)."""

    async def close(self) -> None:
        """Nothing is held."""
