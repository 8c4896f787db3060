"""What the cluster agrees on: small versioned values, watched for changes. One face, in memory or in Redis.

Keys are ``room/name`` ("workers/attention-0"). Versions are per room, grow with every change and are never used again,
so a version names one write for good, even when the key was deleted in between. A value may have a lease (`ttl_s`):
unless it is renewed it is deleted when the lease ends, and watchers see that as an event. Values are bytes.

Watching: a `Watch` first gives a `Snapshot` of its prefix, then each later change once and in order. A watcher that
fell further behind than the store's log, or that lost the store, goes on with a new `Snapshot` that says so.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from cluster.errors import InvalidValueError, StoreUnavailableError

MAX_KEY_BYTES = 512
MAX_VALUE_BYTES = 2**20
MAX_TTL_S = 7 * 24 * 3600.0
LOG_LENGTH = 256  # changes of a room that a watcher may be behind before it needs a new snapshot
POLL_S = 0.25  # a watch looks for ended leases at least this often
FIRST_RETRY_S, LAST_RETRY_S = 0.02, 0.5  # pauses of a watch whose store is gone

_KEY = re.compile(r"([A-Za-z0-9_.-]+)/[!-~]*")  # printable ASCII without spaces


@dataclass(frozen=True)
class Versioned:
    """A value and the version of the write that put it there."""

    value: bytes
    version: int


@dataclass(frozen=True)
class Snapshot:
    """All entries under the watched prefix at one moment; what follows are the changes after it."""

    entries: Mapping[str, Versioned]
    reason: Literal["start", "behind", "reconnected"]


@dataclass(frozen=True)
class Put:
    key: str
    value: bytes
    version: int


@dataclass(frozen=True)
class Deleted:
    key: str
    version: int  # of the deletion
    expired: bool  # its lease ended


Change = Put | Deleted
Event = Snapshot | Change


class Store(Protocol):
    """Every call ends within the store's deadline or raises `StoreUnavailableError`; afterwards it may be used on.

    Keys, values and leases out of bounds raise `InvalidValueError`.
    """

    async def get(self, key: str) -> Versioned | None: ...

    async def entries(self, prefix: str) -> dict[str, Versioned]:
        """All entries whose key begins with `prefix`, which names one room ("workers/")."""

    async def compare_and_set(
        self, key: str, value: bytes | None, *, expected: int, ttl_s: float | None = None
    ) -> int | None:
        """Write `value` if the key's version is `expected`; the new version, or None where it was another.

        `expected` 0: only if the key is not there. `value` None: delete. `ttl_s`: the lease; without one the value
        stays. After a `StoreUnavailableError` the write may have happened: read before trying again.
        """

    async def renew(self, key: str, *, expected: int, ttl_s: float) -> bool:
        """Let the lease end `ttl_s` from now; no event and no new version. False: gone, or of another version."""

    def watch(self, prefix: str) -> Watch: ...
    async def close(self) -> None: ...


def room_of(key: str, name: str = "key") -> str:
    """The room of a key or prefix; raises `InvalidValueError` where it is malformed or too long."""
    found = _KEY.fullmatch(key)
    if found is None or len(key) > MAX_KEY_BYTES:
        raise InvalidValueError(
            f"the store's {name} {key[:80]!r} must be room/name in printable ASCII without spaces, "
            f"of at most {MAX_KEY_BYTES} bytes",
            param=name,
        )
    return found[1]


def check_key(key: str) -> str:
    """The room of a whole key, which has a name after its room."""
    room = room_of(key)
    if len(key) == len(room) + 1:
        raise InvalidValueError(f"the store's key {key!r} has no name after its room", param="key")
    return room


def check_value(value: bytes | None) -> None:
    if value is not None and len(value) > MAX_VALUE_BYTES:
        raise InvalidValueError(
            f"the store's value has {len(value)} bytes; at most {MAX_VALUE_BYTES} fit", param="value"
        )


def check_ttl(ttl_s: float | None) -> None:
    if ttl_s is not None and not 0.001 <= ttl_s <= MAX_TTL_S:
        raise InvalidValueError(f"ttl_s must be in 0.001..{MAX_TTL_S:.0f} seconds, not {ttl_s}", param="ttl_s")


@dataclass(frozen=True)
class Poll:
    """A room as it is now, seen by someone who knows it up to a version."""

    version: int  # the room's newest
    changes: Sequence[Change]  # after the asked version, oldest first, as far as the log goes back and a page holds
    next_expiry_s: float | None  # until the first lease ends


class WatchSource(Protocol):
    """What a `Watch` needs of its store."""

    async def poll(self, room: str, after: int) -> Poll: ...

    async def snapshot(self, prefix: str) -> tuple[int, dict[str, Versioned]]: ...

    async def wait_for_change(self, room: str, after: int, timeout_s: float) -> None:
        """Return when the room has a version above `after`, and in any case after `timeout_s`."""


class Watch:
    """The changes under a prefix; one reader. It holds nothing in the store, so there is nothing to close."""

    def __init__(self, source: WatchSource, prefix: str) -> None:
        self._source = source
        self._prefix = prefix
        self._room = room_of(prefix, "prefix")
        self._seen = 0  # the room's version up to which events are queued
        self._events: deque[Event] = deque()
        self._resync: Literal["start", "behind", "reconnected"] | None = "start"

    async def next(self, timeout_s: float) -> Event | None:
        """The next event, or None when there was none for `timeout_s`.

        Raises `StoreUnavailableError` where the store was out of reach until then; the next call tries again, and
        once it succeeds the event is a `Snapshot` with the reason "reconnected".
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        pause_s = FIRST_RETRY_S
        while not self._events:
            try:
                wait_s = await self._fill()
                remaining_s = deadline - loop.time()
                if not self._events:
                    if remaining_s <= 0:
                        return None
                    await self._source.wait_for_change(self._room, self._seen, min(wait_s, remaining_s))
            except StoreUnavailableError:
                if self._resync is None:
                    self._resync = "reconnected"
                if loop.time() + pause_s >= deadline:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LAST_RETRY_S)
        return self._events.popleft()

    async def _fill(self) -> float:
        """Queue what is new; the seconds until it is worth looking again, unless something changes before."""
        if self._resync is not None:
            self._seen, entries = await self._source.snapshot(self._prefix)
            self._events.append(Snapshot(entries, self._resync))
            self._resync = None
            return 0.0
        poll = await self._source.poll(self._room, self._seen)
        for change in poll.changes:
            if change.version != self._seen + 1:
                break
            self._seen = change.version
            if change.key.startswith(self._prefix):
                self._events.append(change)
        else:
            if poll.changes or poll.version == self._seen:
                return POLL_S if poll.next_expiry_s is None else min(POLL_S, max(0.001, poll.next_expiry_s))
        self._resync = "behind"  # the log no longer reaches back to what was seen, or the store was emptied
        return await self._fill()


class AsyncClosing(ABC):
    """``async with`` for what has a `close`."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()
