"""Who leads a cluster: one controller at a time, by a lease in the store, under an epoch that only grows.

The lease keeps two controllers from working at once; the epoch keeps one that lost it unnoticed from being obeyed:
workers refuse an epoch below the highest that they have seen. Without its store a leader goes on, since nobody can
take over without it either; one that starts without it only holds what the last one on its machine led (`last_known`).
A store that came back empty knows nothing: whoever has the higher epoch then wins.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from cluster.errors import StoreUnavailableError
from cluster.protocol import Lead
from cluster.silence import LASTING_LEASES, RENEWALS
from cluster.store.base import Store, Versioned
from cluster.store.records import EPOCH_KEY, LEAD_KEY, Reader, decode_epoch, decode_lead

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at another's lead, at most: each is a sign that this controller does not hang
MAX_TRIES = 8  # of a write that others come before

_encode = msgspec.json.Encoder().encode


class LostLeadError(Exception):
    """Another controller leads; str: who, and how it is known. The process must end, and may start anew."""


class Leadership:
    """One controller's claim to lead."""

    def __init__(self, store: Store, controller_id: str, *, lease_s: float, before: Lead | None = None) -> None:
        """`before`: as whom a controller led whose process is known to have ended, and whose workers this one holds."""
        self.epoch = 0  # 0: it does not lead yet
        self.found_epoch = 0  # the highest that the store knew of when this one came to lead
        self.controller_id = controller_id
        self._before = before
        self._store = store
        self._reader = Reader()
        self._ttl_s = LASTING_LEASES * lease_s
        self._version = 0  # of our entry in the store
        self._renewing = asyncio.Lock()
        self._unreadable = (0, 0.0)  # the version of a lead that cannot be read, and when it was first seen

    @property
    def message(self) -> Lead:
        """What workers are told: until this controller leads, what its predecessor told them."""
        if not self.epoch and self._before is not None:
            return self._before
        return Lead(epoch=self.epoch, controller_id=self.controller_id)

    async def acquire(
        self, is_stopping: Callable[[], bool] = lambda: False, on_look: Callable[[], None] = lambda: None
    ) -> bool:
        """Wait until nobody else leads, then lead under a new epoch; False where `is_stopping` came first.

        `on_look` is called before each look at the store.
        """
        last = ""
        while not is_stopping():
            on_look()
            try:
                held = await self._store.get(LEAD_KEY)
                now = self._in_the_way(held)
                if not now and await self._claim(held):
                    return True
            except StoreUnavailableError as error:
                now = error.message
            if now and now != last:
                logger.info("waiting to lead: %s", now)
            last = now or last
            await asyncio.sleep(min(self._ttl_s / RENEWALS, LOOK_S))
        return False

    def _in_the_way(self, held: Versioned | None) -> str:
        """Who leads; "": nobody."""
        if held is None:
            return ""
        other = self._reader.read(LEAD_KEY, held.value, decode_lead)
        if other is not None:
            # An own claim may have been written although its answer was lost.
            ours = (self.controller_id, self._before.controller_id if self._before is not None else None)
            return "" if other.controller_id in ours else f"controller {other.controller_id} leads"
        # Whoever leads writes it anew within the time of a lead.
        version, since = self._unreadable
        if version != held.version:
            version, since = self._unreadable = held.version, time.monotonic()
        is_nobodys = time.monotonic() - since > self._ttl_s
        return "" if is_nobodys else "the store's lead cannot be read"

    async def _claim(self, held: Versioned | None) -> bool:
        found = await self._stored_epoch()
        other = self._reader.read(LEAD_KEY, held.value, decode_lead) if held is not None else None
        if other is not None and other.controller_id != self.controller_id:
            found = max(found, other.epoch)
        epoch = max(found, self._before.epoch if self._before is not None else 0) + 1
        value = _encode(Lead(epoch=epoch, controller_id=self.controller_id))
        expected = held.version if held is not None else 0
        version = await self._store.compare_and_set(LEAD_KEY, value, expected=expected, ttl_s=self._ttl_s)
        if version is None:
            return False
        if not self.epoch:  # otherwise what was found is an earlier claim of ours
            self.found_epoch = found
        self.epoch, self._version = epoch, version
        await self._store_epoch()
        return True

    async def raise_above(self, epoch: int) -> None:
        """Take a new epoch, above one that a worker has seen: the store had forgotten it."""
        self.epoch = max(self.epoch, epoch + 1)
        await self.renew()

    async def renew(self) -> None:
        """Keep the lead, and write it again where the store has lost it. Raises `LostLeadError`."""
        async with self._renewing:
            try:
                is_kept = await self._store.renew(LEAD_KEY, expected=self._version, ttl_s=self._ttl_s)
                if not is_kept or await self._stored_epoch() != self.epoch:
                    await self._take_back(await self._store.get(LEAD_KEY))
            except StoreUnavailableError as error:
                logger.debug("the lead was not renewed: %s", error.message)

    async def _take_back(self, held: Versioned | None) -> None:
        other = self._reader.read(LEAD_KEY, held.value, decode_lead) if held is not None else None
        if other is not None and other.controller_id != self.controller_id and other.epoch >= self.epoch:
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
        return self._epoch_of(await self._store.get(EPOCH_KEY))

    def _epoch_of(self, held: Versioned | None) -> int:
        """0 where none is stored, or none that can be read: workers, and the lead itself, know it as well."""
        return (self._reader.read(EPOCH_KEY, held.value, decode_epoch) or 0) if held is not None else 0

    async def _store_epoch(self) -> None:
        """Write our epoch, unless a higher one is there."""
        for _ in range(MAX_TRIES):
            held = await self._store.get(EPOCH_KEY)
            if self._epoch_of(held) >= self.epoch:
                return
            expected = held.version if held is not None else 0
            if await self._store.compare_and_set(EPOCH_KEY, b"%d" % self.epoch, expected=expected) is not None:
                return
