"""A Redis, a gateway and Ray's servers that are stopped do not answer; they are killed, and others take their place."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest
from pydantic import SecretStr

from cluster.environment import PACKAGES
from cluster.machine import free_port
from cluster.operate.children import Child
from cluster.operate.pulse import end_unanswering
from cluster.operate.ray_nodes import are_answering
from cluster.operate.redis_server import is_answering, redis_child
from cluster.operate.up import is_live
from tests.support.processes import has_ended
from tests.support.redis_server import RedisServer
from tests.support.signals import send

pytestmark = pytest.mark.needs("linux", "redis")

DEADLINE_S = 90.0
PATIENCE_S = 4.0
PROBE_S = 0.2
POLL_S = 0.05


@pytest.fixture
def folder() -> Iterator[Path]:
    found = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))  # a socket's path is short
    yield found
    shutil.rmtree(found)


@pytest.fixture
def store() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await asyncio.to_thread(what):
            await asyncio.sleep(POLL_S)


def _is_replaced_when_it_hangs(child: Child, answers: Callable[[], bool]) -> None:
    async def run() -> None:
        ask, answered = child.is_answering, asyncio.Event()
        assert ask is not None

        async def is_answering(timeout_s: float) -> bool:
            if is_there := await ask(timeout_s):
                answered.set()
            return is_there

        child.start()
        watching = end_unanswering(child, is_answering, PATIENCE_S)
        tasks = [asyncio.create_task(child.keep_up()), asyncio.create_task(watching)]
        try:
            async with asyncio.timeout(DEADLINE_S):
                await answered.wait()  # it counts as begun
            first = child.pid
            assert first is not None
            send(first, signal.SIGSTOP)
            assert not await ask(PROBE_S)
            await _until(lambda: child.pid not in (None, first))
            assert has_ended(first)
            await _until(answers)
        finally:
            await child.stop()
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


def test_a_redis_that_hangs_is_killed_and_started_anew(folder: Path) -> None:
    child, _ = redis_child(folder, SecretStr("secret"), folder / "redis.log", os.environ)
    _is_replaced_when_it_hangs(child, lambda: is_answering(folder))


@pytest.mark.needs("demo")
def test_a_gateway_that_hangs_is_killed_and_started_anew(store: RedisServer, tmp_path: Path) -> None:
    """Without a worker it is not ready, and not hung."""
    port = free_port("127.0.0.1")
    ours = {"STORE": store.url, "HOME": str(tmp_path), "PORT": str(port), "TOKEN": "a token"}
    environment = os.environ | {f"FORETOKEN_{name}": value for name, value in ours.items()}
    environment["PYTHONPATH"] = str(PACKAGES)
    command = (sys.executable, "-P", "-m", "cluster.cli", "cluster", "gateway")
    url = f"http://127.0.0.1:{port}"
    child = Child("gateway", command, environment, tmp_path / "gateway.log", grace_s=0.0)
    child.is_answering = lambda timeout_s: asyncio.to_thread(is_live, url, timeout_s)
    _is_replaced_when_it_hangs(child, lambda: is_live(url, PROBE_S))


async def _are_answering(port: int, timeout_s: float) -> bool:
    return await are_answering((port,), timeout_s)


def test_a_server_that_takes_connections_and_says_nothing_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not asyncio.run(_are_answering(port, PROBE_S))
    assert not asyncio.run(_are_answering(port, PROBE_S))  # nor does nobody answer


def test_a_refusal_is_an_answer_and_all_must_give_one() -> None:
    async def run() -> tuple[bool, bool]:
        server = grpc.aio.server()  # it knows no method
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                both = await are_answering((port, listener.getsockname()[1]), PROBE_S)
            return await _are_answering(port, DEADLINE_S), both
        finally:
            await server.stop(None)

    assert asyncio.run(run()) == (True, False)
