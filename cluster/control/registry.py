"""What the controller keeps in the store: workers, the placement, the status. Made equal again and again.

So a store that was away, or came back empty, is soon as it should be.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping

import msgspec

from cluster.control.placement import PlacedWorker, Placement
from cluster.control.topology import Device, Node, Topology
from cluster.errors import StoreUnavailableError
from cluster.protocol import ClusterStatus, WorkerRecord
from cluster.store.base import Store, Versioned

logger = logging.getLogger(__name__)

WORKERS = "workers/"
PLACEMENT_KEY = "placement/current"
STATUS_KEY = "status/cluster"


class StoredNode(msgspec.Struct, frozen=True):
    """A node as it was before workers ran on it."""

    id: str
    failure_domain: str
    host_memory_bytes: int
    devices: tuple[Device, ...]
    num_cores: int
    machine: str


class StoredWorker(msgspec.Struct, frozen=True):
    """A `PlacedWorker` without its experts: which those are, workers report."""

    role: str
    index: int
    node_id: str
    device_id: str
    memory_bytes: int
    kv_bytes: int


class StoredPlacement(msgspec.Struct, frozen=True):
    """`placement/current`."""

    nodes: tuple[StoredNode, ...]
    workers: tuple[StoredWorker, ...]


_encode = msgspec.json.Encoder(order="deterministic").encode
_decode_record = msgspec.json.Decoder(WorkerRecord).decode
_decode_placement = msgspec.json.Decoder(StoredPlacement).decode


def encode_placement(placement: Placement, nodes: Iterable[Node]) -> bytes:
    stored_nodes = tuple(
        StoredNode(n.id, n.failure_domain, n.host_memory_bytes, n.devices, n.num_cores, n.machine) for n in nodes
    )
    workers = tuple(
        StoredWorker(w.role, w.index, w.node_id, w.device_id, w.memory_bytes, w.kv_bytes) for w in placement.workers
    )
    return _encode(StoredPlacement(stored_nodes, workers))


def decode_placement(value: bytes) -> tuple[Placement, Topology]:
    """Raises `msgspec.MsgspecError` for what another release wrote."""
    stored = _decode_placement(value)
    workers = tuple(
        PlacedWorker(
            "attention" if w.role == "attention" else "expert",
            w.index,
            w.node_id,
            w.device_id,
            w.memory_bytes,
            w.kv_bytes,
        )
        for w in stored.workers
    )
    nodes = tuple(
        Node(n.id, n.failure_domain, n.host_memory_bytes, n.devices, n.num_cores, n.machine) for n in stored.nodes
    )
    return Placement(workers), Topology(nodes)


class Registry:
    """Writes what differs. `owns_workers`: records that are not wanted are deleted; otherwise others write them."""

    def __init__(self, store: Store, *, owns_workers: bool) -> None:
        self._store = store
        self._owns_workers = owns_workers
        self._wanted: dict[str, bytes] = {}

    async def load(self) -> tuple[dict[str, WorkerRecord], bytes | None]:
        """The workers and the placement that are stored. Raises `StoreUnavailableError`."""
        placement = await self._store.get(PLACEMENT_KEY)
        return await self.records(), placement.value if placement is not None else None

    async def records(self) -> dict[str, WorkerRecord]:
        """By name; what is no record of this release is passed over. Raises `StoreUnavailableError`."""
        found = {}
        for key, entry in (await self._store.entries(WORKERS)).items():
            try:
                record = _decode_record(entry.value)
            except msgspec.MsgspecError as error:
                logger.warning("the store's %s is no worker's record: %s", key, error)
                continue
            if key == WORKERS + record.name and re.fullmatch(rf"{record.role}-\d{{1,9}}", record.name):
                found[record.name] = record
            else:
                logger.warning("the store's %s is the record of another name: %s", key, record.name)
        return found

    def want_workers(self, records: Mapping[str, WorkerRecord]) -> None:
        kept = {key: value for key, value in self._wanted.items() if not key.startswith(WORKERS)}
        self._wanted = kept | {WORKERS + name: _encode(record) for name, record in records.items()}

    def want_placement(self, value: bytes) -> None:
        self._wanted[PLACEMENT_KEY] = value

    def want_status(self, status: ClusterStatus) -> None:
        self._wanted[STATUS_KEY] = _encode(status)

    async def sync(self) -> None:
        """Raises `StoreUnavailableError`; what was not written is next time."""
        wanted = dict(self._wanted)
        held: dict[str, Versioned | None] = {
            key: await self._store.get(key) for key in wanted if not key.startswith(WORKERS)
        }
        if self._owns_workers:
            entries = await self._store.entries(WORKERS)
            held |= {key: entries.get(key) for key in (*entries, *(key for key in wanted if key.startswith(WORKERS)))}
        for key, entry in held.items():
            value = wanted.get(key)
            if value != (entry.value if entry is not None else None):
                await self._store.compare_and_set(key, value, expected=entry.version if entry is not None else 0)

    async def try_sync(self) -> bool:
        """`sync`, where the store can be reached."""
        try:
            await self.sync()
        except StoreUnavailableError as error:
            logger.debug("the store was not written: %s", error.message)
            return False
        return True
