"""The embedded store: one process, one event loop, nothing outside. The default without a cluster."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.store.base import (
    LOG_LENGTH,
    AsyncClosing,
    Change,
    Deleted,
    Poll,
    Put,
    Versioned,
    Watch,
    check_key,
    check_ttl,
    check_value,
    room_of,
)


@dataclass
class _Room:
    log: deque[Change]
    version: int = 0
    entries: dict[str, Versioned] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)  # key -> end, on the store's clock
    first_end: float = math.inf  # no lease ends before
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, key: str, value: bytes) -> None:
        self.version += 1
        self.entries[key] = Versioned(value, self.version)
        self._tell(Put(key, value, self.version))

    def delete(self, key: str, *, expired: bool) -> None:
        self.version += 1
        del self.entries[key]
        self.leases.pop(key, None)
        self._tell(Deleted(key, self.version, expired))

    def lease(self, key: str, end: float) -> None:
        self.leases[key] = end
        self.first_end = min(self.first_end, end)

    def _tell(self, change: Change) -> None:
        self.log.append(change)
        self.changed.set()
        self.changed = asyncio.Event()  # who waits has the old one


class MemoryStore(AsyncClosing):
    """A `Store` in this process, for the tasks of one event loop.

    `clock`: seconds, never backwards. `log_length`: changes of a room that a watcher may be behind.
    """

    def __init__(self, *, log_length: int = LOG_LENGTH, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._log_length = log_length
        self._rooms: dict[str, _Room] = {}

    def _room(self, name: str) -> _Room:
        """The room without what has expired until now."""
        room = self._rooms.get(name)
        if room is None:
            room = self._rooms[name] = _Room(deque(maxlen=self._log_length))
        now = self._clock()
        if room.first_end <= now:
            for _, key in sorted((end, key) for key, end in room.leases.items() if end <= now):
                room.delete(key, expired=True)
            room.first_end = min(room.leases.values(), default=math.inf)
        return room

    async def get(self, key: str) -> Versioned | None:
        return self._room(check_key(key)).entries.get(key)

    async def entries(self, prefix: str) -> dict[str, Versioned]:
        return (await self.snapshot(prefix))[1]

    async def compare_and_set(
        self, key: str, value: bytes | None, *, expected: int, ttl_s: float | None = None
    ) -> int | None:
        check_value(value)
        check_ttl(ttl_s)
        room = self._room(check_key(key))
        held = room.entries.get(key)
        if (held.version if held else 0) != expected:
            return None
        if value is not None:
            room.put(key, value)
            room.leases.pop(key, None)
            if ttl_s is not None:
                room.lease(key, self._clock() + ttl_s)
        elif held is not None:
            room.delete(key, expired=False)
        return room.version

    async def renew(self, key: str, *, expected: int, ttl_s: float) -> bool:
        check_ttl(ttl_s)
        room = self._room(check_key(key))
        held = room.entries.get(key)
        if held is None or held.version != expected:
            return False
        room.lease(key, self._clock() + ttl_s)
        return True

    def watch(self, prefix: str) -> Watch:
        return Watch(self, prefix)

    async def close(self) -> None:
        """Nothing is held open; what is stored stays until the store is let go."""

    async def poll(self, room: str, after: int) -> Poll:
        seen = self._room(room)
        changes = tuple(change for change in seen.log if change.version > after)
        return Poll(seen.version, changes, seen.first_end - self._clock() if seen.leases else None)

    async def snapshot(self, prefix: str) -> tuple[int, dict[str, Versioned]]:
        room = self._room(room_of(prefix, "prefix"))
        return room.version, {key: room.entries[key] for key in sorted(room.entries) if key.startswith(prefix)}

    async def wait_for_change(self, room: str, after: int, timeout_s: float) -> None:
        seen = self._room(room)
        if seen.version > after:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await seen.changed.wait()
        except TimeoutError:
            return
