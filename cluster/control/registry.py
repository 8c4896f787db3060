"""What the controller keeps in the store: workers, the placement, the status. Made equal again and again.

So a store that was away, or came back empty, is soon as it should be.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import msgspec

from cluster.control.placement import PlacedWorker, Placement
from cluster.control.topology import Node, Topology
from cluster.errors import InvalidValueError, StoreUnavailableError
from cluster.store.base import Store, Versioned
from cluster.store.records import PLACEMENT_KEY, STATUS_KEY, WORKERS, ClusterStatus, Reader, WorkerRecord

logger = logging.getLogger(__name__)


class StoredPlacement(msgspec.Struct, frozen=True):
    """`PLACEMENT_KEY`: nodes as they were before workers ran on them, and workers. Their experts they report."""

    nodes: tuple[Node, ...]
    workers: tuple[PlacedWorker, ...]


_encode = msgspec.json.Encoder(order="deterministic").encode
_decode_placement = msgspec.json.Decoder(StoredPlacement).decode


def encode_placement(placement: Placement, nodes: Iterable[Node]) -> bytes:
    return _encode(StoredPlacement(tuple(nodes), placement.workers))


def decode_placement(value: bytes) -> tuple[Placement, Topology]:
    """Raises one of `UNREADABLE` for what another release wrote."""
    stored = _decode_placement(value)
    try:
        return Placement(stored.workers), Topology(stored.nodes)
    except InvalidValueError as error:
        raise ValueError(error.message) from None


class Registry:
    """Writes what differs. `owns_workers`: records that are not wanted are deleted; otherwise others write them."""

    def __init__(self, store: Store, *, owns_workers: bool) -> None:
        self._store = store
        self._reader = Reader()
        self._owns_workers = owns_workers
        self._is_written = True  # when it was last tried
        self._wanted: dict[str, bytes] = {}

    async def load(self) -> tuple[dict[str, WorkerRecord], bytes | None]:
        """The workers and the placement that are stored. Raises `StoreUnavailableError`."""
        placement = await self._store.get(PLACEMENT_KEY)
        return await self.records(), placement.value if placement is not None else None

    async def records(self) -> dict[str, WorkerRecord]:
        """By name; what is no record of this release is passed over. Raises `StoreUnavailableError`."""
        entries = await self._store.entries(WORKERS)
        found = [self._reader.read_worker(key, entry.value) for key, entry in entries.items()]
        return {record.name: record for record in found if record is not None}

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
            if self._is_written:
                logger.warning("the store was not written, which is tried again: %s", error.message)
            self._is_written = False
            return False
        self._is_written = True
        return True
