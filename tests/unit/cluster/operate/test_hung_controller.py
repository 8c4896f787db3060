"""A real controller that is stopped is killed, and another one leads."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.config import Settings, load
from cluster.environment import PACKAGES
from cluster.operate.children import Child
from cluster.operate.controller import PULSE_NAME, hung_after_s
from cluster.operate.pulse import end_without_beat
from cluster.store import open_store
from cluster.store.records import ClusterStatus, read_status
from tests.support.processes import has_ended
from tests.support.redis_server import RedisServer
from tests.support.signals import send

pytestmark = pytest.mark.needs("redis", "demo", "linux")

DEADLINE_S = 90.0
POLL_S = 0.05


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("given", "expected_s"),
    [
        ({}, 15.0),
        ({"lease_s": 10, "orphan_timeout_s": 150, "reroute_timeout_s": 90}, 50.0),
        ({"orphan_timeout_s": 20}, 5.0),
        ({"orphan_timeout_s": 600}, 38.0),
        ({"orphan_timeout_s": 600, "reroute_timeout_s": 600}, 150.0),
        ({"reroute_timeout_s": 30}, 8.0),
        ({"reroute_timeout_s": 27}, 5.0),
    ],
)
def test_it_is_noticed_long_before_workers_end_and_requests_give_up_but_not_for_a_pause(
    given: dict[str, float], expected_s: float
) -> None:
    assert hung_after_s(load(given)) == expected_s


def test_a_controller_that_hangs_is_killed_and_the_next_one_leads(redis: RedisServer, tmp_path: Path) -> None:
    ours = {"STORE": redis.url, "HOME": str(tmp_path), "DEVICE": "cpu", "LEASE_S": "0.5", "TOKEN": "a token"}
    environment = os.environ | {f"FORETOKEN_{name}": value for name, value in ours.items()}
    environment["PYTHONPATH"] = str(PACKAGES)
    command = (sys.executable, "-P", "-m", "cluster.cli", "cluster", "controller", "--pods", "--folder", str(tmp_path))
    child = Child("controller", command, environment, tmp_path / "controller.log")
    settings: Settings = load({"lease_s": 0.5, "orphan_timeout_s": 20})

    async def run() -> None:
        store = open_store(redis.url)

        async def until(is_met: Callable[[ClusterStatus], bool]) -> None:
            async with asyncio.timeout(DEADLINE_S):
                while (status := await read_status(store)) is None or not is_met(status):
                    await asyncio.sleep(POLL_S)

        child.start()
        watching = end_without_beat(child, tmp_path / PULSE_NAME, hung_after_s(settings))
        tasks = [asyncio.create_task(child.keep_up()), asyncio.create_task(watching)]
        try:
            await until(lambda status: status.epoch == 1)
            first = child.pid
            assert first is not None
            send(first, signal.SIGSTOP)
            await until(lambda status: status.epoch == 2)
            assert child.pid not in (None, first)
            assert has_ended(first)
        finally:
            await child.stop()
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await store.close()

    asyncio.run(run())
