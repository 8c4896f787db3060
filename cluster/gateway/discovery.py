"""Follows the workers that are registered in the store, and tells the pool who they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from cluster.errors import StoreUnavailableError
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.store.base import Deleted, Event, Put, Snapshot, Store
from cluster.store.records import WORKERS, Reader

logger = logging.getLogger(__name__)

WAIT_S = 10.0  # for a change; after it the store is asked again


class WorkerDiscovery:
    """Keeps `pool` at the workers whose records say that they take requests.

    A worker that does not answer stays among them. While the store is out of reach, what is known goes on; a store
    that comes back empty takes nobody away who is connected.
    """

    def __init__(self, store: Store, pool: WorkerPool) -> None:
        self._watch = store.watch(WORKERS)
        self._pool = pool
        self._reader = Reader()
        self._endpoints: dict[str, Endpoint] = {}  # by key

    async def run(self) -> None:
        """Follow the store until cancelled."""
        is_lost = False
        while True:
            try:
                event = await self._watch.next(WAIT_S)
            except StoreUnavailableError as error:
                if not is_lost:
                    logger.warning("going on with %d known workers: %s", len(self._endpoints), error.message)
                is_lost = True
                continue
            if is_lost:
                logger.info("the store is there again")
                is_lost = False
            if event is not None:
                self._take(event)

    def _take(self, event: Event) -> None:
        before = dict(self._endpoints)
        if isinstance(event, Snapshot):
            self._reset({key: entry.value for key, entry in event.entries.items()})
        elif isinstance(event, Put):
            self._put(event.key, event.value)
        else:
            assert isinstance(event, Deleted)
            self._endpoints.pop(event.key, None)
        if self._endpoints != before:
            self._pool.set_workers(self._endpoints.values())

    def _reset(self, values: Mapping[str, bytes]) -> None:
        for key in [key for key in self._endpoints if key not in values]:
            if not self._pool.is_alive(self._endpoints[key].name):
                del self._endpoints[key]
        for key, value in values.items():
            self._put(key, value)

    def _put(self, key: str, value: bytes) -> None:
        record = self._reader.read_worker(key, value)
        if record is None:
            return  # what was known of it goes on
        if record.role == "expert":
            self._endpoints.pop(key, None)
        else:
            self._endpoints[key] = Endpoint(record.name, record.address, record.worker_id)
