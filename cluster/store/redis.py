"""The store of a cluster: one Redis (7 or later), its server's clock, Lua scripts and streams; no settings of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cluster.errors import ConfigError, InvalidValueError, StoreUnavailableError
from cluster.store import scripts
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

logger = logging.getLogger(__name__)

PAGE = 16  # changes that a watch takes at once
MAX_CONNECTIONS = 256


class RedisStore(AsyncClosing):
    """A `Store` in Redis, shared by all who use the same `url` and `namespace`.

    `url`: redis://, rediss:// or unix://, with user, password and database as redis-py reads them. `op_timeout_s`:
    after this long without an answer a call raises `StoreUnavailableError`. Nothing is opened before the first call.
    Raises `ConfigError` for an `url` that cannot be read.
    """

    def __init__(
        self, url: str, *, namespace: str = "foretoken", op_timeout_s: float = 2.0, log_length: int = LOG_LENGTH
    ) -> None:
        self._namespace = namespace
        self._op_timeout_s = op_timeout_s
        self._log_length = log_length
        self._told_of: set[bytes] = set()  # entries that cannot be read
        try:
            self._redis: Redis = Redis.from_url(
                url,
                socket_timeout=op_timeout_s,
                socket_connect_timeout=op_timeout_s,
                max_connections=MAX_CONNECTIONS,
                retry=Retry(NoBackoff(), 0),  # a write whose answer was lost must not be sent a second time
            )
        except ValueError:  # its text may hold a part of the password
            raise ConfigError(
                "the store's url cannot be read: it must be redis://[user:password@]host:port/database, rediss://… or "
                "unix:///path, with special characters percent-encoded",
                param="store",
            ) from None

    async def get(self, key: str) -> Versioned | None:
        found = await self._run(scripts.GET, check_key(key), key)
        return Versioned(found[1], _number(found[0])) if found else None

    async def entries(self, prefix: str) -> dict[str, Versioned]:
        return (await self.snapshot(prefix))[1]

    async def compare_and_set(
        self, key: str, value: bytes | None, *, expected: int, ttl_s: float | None = None
    ) -> int | None:
        check_value(value)
        check_ttl(ttl_s)
        kind = "delete" if value is None else "put"
        ttl_ms = "" if ttl_s is None else round(ttl_s * 1000)
        version = await self._run(scripts.COMPARE_AND_SET, check_key(key), key, expected, kind, value or b"", ttl_ms)
        return None if version is None else _number(version)

    async def renew(self, key: str, *, expected: int, ttl_s: float) -> bool:
        check_ttl(ttl_s)
        return bool(await self._run(scripts.RENEW, check_key(key), key, expected, round(ttl_s * 1000)))

    def watch(self, prefix: str) -> Watch:
        return Watch(self, prefix)

    async def close(self) -> None:
        await self._redis.aclose()

    async def poll(self, room: str, after: int) -> Poll:
        version, wait_ms, entries = await self._run(scripts.POLL, room, after, PAGE)
        changes = [change for entry in entries if (change := _change(*entry)) is not None]
        return Poll(_number(version), changes, _number(wait_ms) / 1000 if wait_ms else None)

    async def snapshot(self, prefix: str) -> tuple[int, dict[str, Versioned]]:
        """What somebody else wrote there, under a key that is none of ours, is passed over, and told of once."""
        version, *flat = await self._run(scripts.SNAPSHOT, room_of(prefix, "prefix"), prefix)
        found: dict[str, Versioned] = {}
        for key, written, value in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            try:
                found[_text(key)] = Versioned(value or b"", int(written))
            except (ValueError, InvalidValueError) as error:
                if key not in self._told_of:
                    logger.warning("the store's %r cannot be read and is passed over: %s", key, error)
                    self._told_of.add(key)
        return _number(version), dict(sorted(found.items()))

    async def wait_for_change(self, room: str, after: int, timeout_s: float) -> None:
        log = self._room_keys(room)[-1]
        block_ms = max(1, round(min(timeout_s, self._op_timeout_s / 2) * 1000))
        async with self._answering(block_ms / 1000):
            await self._redis.xread({log: f"{after}-0"}, count=1, block=block_ms)

    async def _run(self, script: str, room: str, *arguments: str | bytes | int) -> Any:
        keys = self._room_keys(room)
        async with self._answering():
            run = self._redis.register_script(script)
            return await cast(Awaitable[Any], run(keys=keys, args=[self._log_length, *arguments]))

    def _room_keys(self, room: str) -> list[str]:
        return [f"{{{self._namespace}/{room}}}:{name}" for name in scripts.ROOM_KEYS]

    @asynccontextmanager
    async def _answering(self, wait_s: float = 0.0) -> AsyncIterator[None]:
        """Within the store's deadline, beside a wait that was asked for, or `StoreUnavailableError`."""
        task = asyncio.current_task()
        assert task is not None
        num_cancels = task.cancelling()
        failure: Exception | None = None
        try:
            async with asyncio.timeout(self._op_timeout_s + wait_s):
                yield
        except (RedisError, OSError) as error:  # TimeoutError is an OSError
            failure = error
        if task.cancelling() > num_cancels:  # before Python 3.12 `asyncio.wait_for`, as redis-py uses it, can lose one
            raise asyncio.CancelledError
        if failure is not None:
            reason = str(failure) or f"no answer within {self._op_timeout_s:g} s"
            raise StoreUnavailableError(f"the store (Redis) cannot be used: {reason}") from failure


def _number(found: bytes | int) -> int:
    """A version or a time. With somebody else's value in its place the store is as good as away.

    Raises `StoreUnavailableError`.
    """
    try:
        return int(found)
    except ValueError:
        raise StoreUnavailableError(
            f"the store has {found!r:.40} in the place of a number of ours: who wrote it?"
        ) from None


def _text(key: bytes) -> str:
    """Raises `ValueError` or `InvalidValueError` for what is no key of ours."""
    text = key.decode()
    check_key(text)
    return text


def _change(entry_id: bytes, fields: list[bytes]) -> Change | None:
    """None for what somebody else wrote: a watch then finds a version missing, and takes a snapshot."""
    version = int(entry_id.split(b"-")[0])
    try:
        _, kind, _, key, _, value = fields
        name = _text(key)
    except (ValueError, InvalidValueError):
        return None
    if kind == b"put":
        return Put(name, value, version)
    return Deleted(name, version, expired=kind == b"expired")
