from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from cluster.errors import ConfigError, StoreUnavailableError
from cluster.operate.children import Child
from cluster.operate.redis_server import is_answering, redis_child
from cluster.store.redis import RedisStore

PASSWORD = "p/w?d#with%signs"
DEADLINE_S = 20.0


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def redis(folder: Path) -> Iterator[tuple[Child, str]]:
    child, url = redis_child(folder, SecretStr(PASSWORD), folder / "redis.log", os.environ)
    _start(child, folder)
    yield child, url.get_secret_value()
    child.end_session()


def _start(child: Child, folder: Path) -> None:
    child.start()
    deadline = time.monotonic() + DEADLINE_S
    while not is_answering(folder):
        child.check()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.needs("redis", "linux")
def test_the_store_in_it_outlives_its_process(redis: tuple[Child, str], folder: Path) -> None:
    child, url = redis

    async def scenario() -> None:
        async with RedisStore(url) as store:
            assert await store.compare_and_set("room/key", b"value", expected=0)
            await child.stop()
            _start(child, folder)
            found = await store.get("room/key")
            assert found is not None
            assert found.value == b"value"

    asyncio.run(scenario())


@pytest.mark.needs("redis", "linux")
def test_it_wants_its_password_which_nobody_can_see(redis: tuple[Child, str], folder: Path) -> None:
    child, _ = redis

    async def scenario() -> None:
        async with RedisStore(f"unix://{folder}/redis.sock") as store:
            with pytest.raises(StoreUnavailableError):
                await store.get("room/key")

    asyncio.run(scenario())
    assert PASSWORD not in Path(f"/proc/{child.pid}/cmdline").read_text()
    assert PASSWORD not in repr(child)
    assert (folder / "redis.sock").stat().st_mode & 0o077 == 0


def test_without_the_program_it_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(
        ConfigError, match=r"apt-get install redis-server.*FORETOKEN_STORE or the config file: store: redis://"
    ):
        redis_child(folder, SecretStr(PASSWORD), folder / "redis.log", os.environ)
