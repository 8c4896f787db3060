"""What only a store behind a connection can suffer: a Redis that dies, hangs, or comes back empty."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator

import pytest
from redis.asyncio import Redis

from cluster.errors import ConfigError, StoreUnavailableError, UnavailableError
from cluster.store import open_store
from cluster.store.base import Put, Snapshot, Versioned
from cluster.store.memory import MemoryStore
from cluster.store.redis import RedisStore
from tests.support.redis_server import RedisServer

DEADLINE_S = 30.0
pytestmark = pytest.mark.needs("redis")


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """One that the test may kill."""
    server = RedisServer()
    server.start()
    yield server
    server.close()


def _run(body: Callable[[RedisStore], Awaitable[None]], url: str, op_timeout_s: float = 5.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * DEADLINE_S), RedisStore(url, op_timeout_s=op_timeout_s) as store:
            await body(store)

    asyncio.run(bounded())


def test_a_redis_that_is_gone_is_a_typed_error_and_its_return_is_noticed(server: RedisServer) -> None:
    async def body(store: RedisStore) -> None:
        old = await store.compare_and_set("r/a", b"1", expected=0) or 0
        server.kill()
        for call in (
            lambda: store.get("r/a"),
            lambda: store.entries("r/"),
            lambda: store.compare_and_set("r/a", b"2", expected=old),
            lambda: store.renew("r/a", expected=old, ttl_s=1.0),
            lambda: store.watch("r/").next(0.1),
        ):
            with pytest.raises(StoreUnavailableError, match=r"the store \(Redis\) cannot be used"):
                await call()
        server.start()
        assert await store.get("r/a") is None  # nothing is kept on disk here
        new = await store.compare_and_set("r/a", b"3", expected=0)
        assert new is not None
        assert new > old  # though Redis came back empty

    _run(body, server.url)


def test_a_hung_redis_is_an_error_at_the_deadline_and_is_used_on_when_it_answers(server: RedisServer) -> None:
    async def body(store: RedisStore) -> None:
        version = await store.compare_and_set("r/a", b"1", expected=0) or 0
        loop = asyncio.get_running_loop()
        server.pause()
        begin = loop.time()
        with pytest.raises(UnavailableError, match="the store"):
            await store.get("r/a")
        assert 0.25 <= loop.time() - begin < DEADLINE_S / 3
        server.resume()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    assert await store.get("r/a") == Versioned(b"1", version)
                    break
                except StoreUnavailableError:  # this machine is slow, the deadline short
                    continue

    _run(body, server.url, op_timeout_s=0.3)


def test_a_watch_that_lost_redis_goes_on_with_a_snapshot_that_says_so(server: RedisServer) -> None:
    async def body(store: RedisStore) -> None:
        await store.compare_and_set("r/a", b"1", expected=0)
        watch = store.watch("r/")
        first = await watch.next(DEADLINE_S)
        assert isinstance(first, Snapshot)
        server.kill()
        with pytest.raises(StoreUnavailableError):
            await watch.next(0.2)
        waiting = asyncio.create_task(watch.next(DEADLINE_S))
        server.start()
        assert await waiting == Snapshot({}, "reconnected")
        version = await store.compare_and_set("r/b", b"2", expected=0)
        assert await watch.next(DEADLINE_S) == Put("r/b", b"2", version or 0)

    _run(body, server.url)


def test_a_watch_outlives_the_loss_of_its_connection_alone(server: RedisServer) -> None:
    async def body(store: RedisStore) -> None:
        watch = store.watch("r/")
        await watch.next(DEADLINE_S)
        waiting = asyncio.create_task(watch.next(DEADLINE_S))
        await _drop_connections(server.url)
        version = await store.compare_and_set("r/a", b"1", expected=0) or 0
        event = await waiting
        if isinstance(event, Snapshot):  # the loss was noticed before the change was
            assert event.reason == "reconnected"
            if not event.entries:
                event = await watch.next(DEADLINE_S)
        if isinstance(event, Snapshot):
            assert event.entries == {"r/a": Versioned(b"1", version)}
        else:
            assert event == Put("r/a", b"1", version)
        assert await watch.next(0.0) is None

    _run(body, server.url)


def test_a_redis_that_was_emptied_in_passing_gives_a_watch_a_new_snapshot(server: RedisServer) -> None:
    async def body(store: RedisStore) -> None:
        await store.compare_and_set("r/a", b"1", expected=0)
        watch = store.watch("r/")
        await watch.next(DEADLINE_S)
        redis = Redis.from_url(server.url)
        await redis.flushall()
        await redis.aclose()
        assert await watch.next(DEADLINE_S) == Snapshot({}, "behind")

    _run(body, server.url)


def test_what_somebody_else_wrote_is_passed_over_and_told_of_once(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(store: RedisStore) -> None:
        version = await store.compare_and_set("r/a", b"\xff", expected=0) or 0
        wanted = {"r/a": Versioned(b"\xff", version)}
        watch = store.watch("r/")
        assert await watch.next(DEADLINE_S) == Snapshot(wanted, "start")
        redis = Redis.from_url(server.url)
        room = "{foretoken/r}:"
        for key, written in ((b"r/\xff", b"1"), ("r/é".encode(), b"2"), (b"r/b", b"no number")):
            await redis.hset(f"{room}values", key, b"\xff")
            await redis.hset(f"{room}versions", key, written)
        following = await redis.incr(f"{room}version")
        await redis.xadd(f"{room}log", {"kind": "put", "key": b"r/\xff", "value": b""}, id=f"{following}-0")
        await redis.aclose()
        assert await store.entries("r/") == await store.entries("r/") == wanted
        assert await watch.next(DEADLINE_S) == Snapshot(wanted, "behind")
        later = await store.compare_and_set("r/c", b"", expected=0) or 0
        assert await watch.next(DEADLINE_S) == Put("r/c", b"", later)

    with caplog.at_level(logging.WARNING):
        _run(body, server.url)
    told = [record.getMessage() for record in caplog.records if record.name == "cluster.store.redis"]
    assert len(told) == 3
    assert all("cannot be read and is passed over" in line for line in told)


async def _drop_connections(url: str) -> None:
    redis = Redis.from_url(url)
    for kind in ("normal", "pubsub"):
        await redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
    await redis.aclose()


@pytest.mark.parametrize("name", ["version", "values", "versions"])
def test_a_room_that_somebody_else_damaged_is_as_if_the_store_were_away(server: RedisServer, name: str) -> None:
    async def body(store: RedisStore) -> None:
        version = await store.compare_and_set("r/a", b"1", expected=0) or 0
        redis = Redis.from_url(server.url)
        await redis.set(f"{{foretoken/r}}:{name}", b"no number of ours")
        for call in (
            lambda: store.compare_and_set("r/a", b"2", expected=version),
            lambda: store.compare_and_set("r/b", b"2", expected=0),
            lambda: store.entries("r/"),
        ):
            with pytest.raises(StoreUnavailableError):
                await call()
        with contextlib.suppress(StoreUnavailableError):  # one key can be read without its room's version
            await store.get("r/a")
        assert await store.compare_and_set("other/a", b"1", expected=0)
        await redis.flushall()
        await redis.aclose()
        assert await store.compare_and_set("r/a", b"1", expected=0)

    _run(body, server.url)


def test_namespaces_do_not_see_each_other(server: RedisServer) -> None:
    async def body(store: RedisStore) -> None:
        async with RedisStore(server.url, namespace="other") as other:
            await store.compare_and_set("r/a", b"1", expected=0)
            assert await other.get("r/a") is None
            assert await other.entries("r/") == {}

    _run(body, server.url)


@pytest.mark.parametrize("url", ["http://user:secret@host", "redis://user:secret/more@host", "no url: secret"])
def test_a_bad_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="the store's url") as raised:
        open_store(url)
    assert "secret" not in str(raised.value)


def test_without_a_url_the_store_is_embedded() -> None:
    assert isinstance(open_store(None), MemoryStore)
