"""Follows the workers that are registered in the store, and tells the pool who they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from cluster.errors import StoreUnavailableError
from cluster.gateway.pool import Place, WorkerPool
from cluster.protocol import WorkerRecord
from cluster.store.base import Deleted, Event, Put, Snapshot, Store

logger = logging.getLogger(__name__)

WORKERS = "workers/"
WAIT_S = 10.0  # for a change; after it the store is asked again


class WorkerRegistry:
    """Keeps `pool` at the workers whose records say that they take requests.

    A worker that does not answer stays among them. While the store is out of reach, what is known goes on; a store
    that comes back empty takes nobody away who is connected.
    """

    def __init__(self, store: Store, pool: WorkerPool) -> None:
        self._watch = store.watch(WORKERS)
        self._pool = pool
        self._places: dict[str, Place] = {}  # by key

    async def run(self) -> None:
        """Follow the store until cancelled."""
        is_lost = False
        while True:
            try:
                event = await self._watch.next(WAIT_S)
            except StoreUnavailableError as error:
                if not is_lost:
                    logger.warning("going on with %d known workers: %s", len(self._places), error.message)
                is_lost = True
                continue
            if is_lost:
                logger.info("the store is there again")
                is_lost = False
            if event is not None:
                self._take(event)

    def _take(self, event: Event) -> None:
        before = dict(self._places)
        if isinstance(event, Snapshot):
            self._reset({key: entry.value for key, entry in event.entries.items()})
        elif isinstance(event, Put):
            self._put(event.key, event.value)
        else:
            assert isinstance(event, Deleted)
            self._places.pop(event.key, None)
        if self._places != before:
            self._pool.set_workers(self._places.values())

    def _reset(self, values: Mapping[str, bytes]) -> None:
        for key in [key for key in self._places if key not in values]:
            if not self._pool.is_alive(self._places[key].name):
                del self._places[key]
        for key, value in values.items():
            self._put(key, value)

    def _put(self, key: str, value: bytes) -> None:
        try:
            record = msgspec.json.decode(value, type=WorkerRecord)
        except msgspec.MsgspecError as error:
            logger.warning("the record %s is left out, it cannot be read: %s", key, error)
            return
        if record.role == "expert":
            self._places.pop(key, None)
        else:
            self._places[key] = Place(record.name, record.address, record.worker_id)
