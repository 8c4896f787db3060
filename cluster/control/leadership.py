"""Who leads a cluster: one controller at a time, by a lease in the store, under an epoch that only grows.

The lease keeps two controllers from working at once; the epoch keeps one that lost it unnoticed from being obeyed:
workers refuse an epoch below the highest that they have seen. Without its store a leader goes on, since nobody can
take over without it either. A store that came back empty knows nothing: whoever has the higher epoch then wins.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from cluster.errors import StoreUnavailableError
from cluster.protocol import Lead
from cluster.store.base import Store, Versioned

logger = logging.getLogger(__name__)

LEAD_KEY = "controller/lead"
EPOCH_KEY = "controller/epoch"
LEASES = 3  # the lead lasts for so many of a worker's leases
LOOKS = 10  # at the lead within its time
MAX_TRIES = 8  # of a write that others come before

_encode = msgspec.json.Encoder().encode
_decode_lead = msgspec.json.Decoder(Lead).decode


class LostLeadError(Exception):
    """Another controller leads; str: who, and how it is known. The process must end, and may start anew."""


class Leadership:
    """One controller's claim to lead."""

    def __init__(self, store: Store, controller_id: str, *, lease_s: float) -> None:
        self.epoch = 0  # 0: it does not lead yet
        self.controller_id = controller_id
        self._store = store
        self._ttl_s = LEASES * lease_s
        self._version = 0  # of our entry in the store

    @property
    def message(self) -> Lead:
        return Lead(epoch=self.epoch, controller_id=self.controller_id)

    async def acquire(self, is_stopping: Callable[[], bool] = lambda: False) -> bool:
        """Wait until nobody else leads, then lead under a new epoch; False where `is_stopping` came first."""
        last = ""
        while not is_stopping():
            try:
                held = await self._store.get(LEAD_KEY)
                leader = _decode_lead(held.value).controller_id if held is not None else self.controller_id
                # An own claim may have been written although its answer was lost.
                if leader == self.controller_id and await self._claim(held.version if held is not None else 0):
                    return True
                now = f"controller {leader} leads"
            except StoreUnavailableError as error:
                now = error.message
            if now and now != last:
                logger.info("waiting to lead: %s", now)
            last = now or last
            await asyncio.sleep(self._ttl_s / LOOKS)
        return False

    async def _claim(self, expected: int) -> bool:
        epoch = await self._stored_epoch() + 1
        value = _encode(Lead(epoch=epoch, controller_id=self.controller_id))
        version = await self._store.compare_and_set(LEAD_KEY, value, expected=expected, ttl_s=self._ttl_s)
        if version is None:
            return False
        self.epoch, self._version = epoch, version
        await self._store_epoch()
        return True

    async def raise_above(self, epoch: int) -> None:
        """Take a new epoch, above one that a worker has seen: the store had forgotten it."""
        self.epoch = max(self.epoch, epoch + 1)
        await self.renew()

    async def renew(self) -> None:
        """Keep the lead, and write it again where the store has lost it. Raises `LostLeadError`."""
        try:
            is_kept = await self._store.renew(LEAD_KEY, expected=self._version, ttl_s=self._ttl_s)
            if not is_kept or await self._stored_epoch() != self.epoch:
                await self._take_back(await self._store.get(LEAD_KEY))
        except StoreUnavailableError as error:
            logger.debug("the lead was not renewed: %s", error.message)

    async def _take_back(self, held: Versioned | None) -> None:
        if held is not None:
            other = _decode_lead(held.value)
            if other.controller_id != self.controller_id and other.epoch >= self.epoch:
                raise LostLeadError(f"controller {other.controller_id} leads with epoch {other.epoch}")
        stored = await self._stored_epoch()
        if stored > self.epoch:
            raise LostLeadError(f"the store knows of epoch {stored}, above ours, {self.epoch}")
        expected = held.version if held is not None else 0
        version = await self._store.compare_and_set(
            LEAD_KEY, _encode(self.message), expected=expected, ttl_s=self._ttl_s
        )
        if version is not None:
            self._version = version
            await self._store_epoch()

    async def resign(self) -> None:
        """Let the next one lead at once."""
        try:
            await self._store.compare_and_set(LEAD_KEY, None, expected=self._version)
        except StoreUnavailableError as error:
            logger.debug("the lead runs out by itself: %s", error.message)

    async def _stored_epoch(self) -> int:
        held = await self._store.get(EPOCH_KEY)
        return int(held.value) if held is not None else 0

    async def _store_epoch(self) -> None:
        """Write our epoch, unless a higher one is there."""
        for _ in range(MAX_TRIES):
            held = await self._store.get(EPOCH_KEY)
            if held is not None and int(held.value) >= self.epoch:
                return
            expected = held.version if held is not None else 0
            if await self._store.compare_and_set(EPOCH_KEY, b"%d" % self.epoch, expected=expected) is not None:
                return
