"""One fixture for both stores: `world` is a store of its own that several clients can open."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from cluster.store.base import Store
from cluster.store.memory import MemoryStore
from cluster.store.redis import RedisStore
from tests.support.redis_server import RedisServer

World = Callable[[], Store]  # a new client of the same store
NewWorld = Callable[..., World]  # an empty store; `log_length`

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.fixture(
    params=["memory", pytest.param("redis", marks=pytest.mark.needs("redis"))],
    scope="module",
)
def new_world(request: pytest.FixtureRequest) -> NewWorld:
    if request.param == "memory":

        def new_memory(**options: int) -> World:
            store = MemoryStore(**options)
            return lambda: store

        return new_memory

    server: RedisServer = request.getfixturevalue("redis_server")

    def new_redis(**options: int) -> World:
        namespace = f"test-{next(_NUMBERS)}"
        return lambda: RedisStore(server.url, namespace=namespace, op_timeout_s=10.0, **options)

    return new_redis


@pytest.fixture
def world(new_world: NewWorld) -> World:
    return new_world()
