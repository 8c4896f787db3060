"""The pool follows the workers' records in the store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.errors import StoreUnavailableError
from cluster.gateway.discovery import WorkerDiscovery
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.store.memory import MemoryStore
from tests.support.eventually import eventually
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, hello

pytestmark = pytest.mark.anyio


class FickleStore(MemoryStore):
    """A store that can be out of reach, and that can come back empty."""

    def __init__(self) -> None:
        super().__init__()
        self.is_gone = False
        self.num_refusals = 0

    async def poll(self, room: str, after: int) -> Any:
        self._refuse()
        return await super().poll(room, after)

    async def snapshot(self, prefix: str) -> Any:
        self._refuse()
        return await super().snapshot(prefix)

    async def wait_for_change(self, room: str, after: int, timeout_s: float) -> None:
        self._refuse()
        await super().wait_for_change(room, after, min(timeout_s, 0.01))

    def _refuse(self) -> None:
        if self.is_gone:
            self.num_refusals += 1
            raise StoreUnavailableError("the store is gone")

    def forget(self) -> None:
        self._rooms.clear()


def record(name: str, role: str = "attention", address: str = "unix:/nowhere", worker_id: str = "") -> bytes:
    fields = {"name": name, "role": role, "address": address, "worker_id": worker_id}
    return msgspec.json.encode(fields | {"node_id": "n", "device_id": "cpu", "pid": 1, "memory_bytes": 1})


@pytest.fixture
async def store() -> FickleStore:
    return FickleStore()


@pytest.fixture
async def pool(store: FickleStore) -> AsyncIterator[WorkerPool]:
    """A pool that a registry keeps."""
    async with WorkerPool(reconnect_delay_s=0.01) as pool:
        task = asyncio.create_task(WorkerDiscovery(store, pool).run())
        yield pool
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def names(pool: WorkerPool) -> list[str]:
    return sorted(endpoint.name for endpoint in pool.endpoints)


async def test_workers_come_change_and_go(store: FickleStore, pool: WorkerPool) -> None:
    assert pool.endpoints == ()
    assert pool.last_failure == "none is registered"
    first = await store.compare_and_set("workers/attention-0", record("attention-0", worker_id="p"), expected=0)
    assert first is not None
    await store.compare_and_set("workers/expert-0", record("expert-0", "expert"), expected=0)
    await store.compare_and_set("workers/attention-1", record("attention-1"), expected=0)
    await eventually(lambda: names(pool) == ["attention-0", "attention-1"])
    again = await store.compare_and_set("workers/attention-0", record("attention-0", worker_id="q"), expected=first)
    assert again is not None
    await eventually(lambda: Endpoint("attention-0", "unix:/nowhere", "q") in pool.endpoints)
    assert len(pool.endpoints) == 2
    await store.compare_and_set("workers/attention-0", None, expected=again)
    await eventually(lambda: names(pool) == ["attention-1"])


async def test_a_record_that_cannot_be_read_is_left_out(
    store: FickleStore, pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await store.compare_and_set("workers/attention-0", b"{", expected=0)
    await store.compare_and_set("workers/attention-1", record("attention-1"), expected=0)
    await eventually(lambda: names(pool) == ["attention-1"])
    assert "workers/attention-0" in caplog.text


async def test_without_the_store_what_is_known_goes_on(store: FickleStore, pool: WorkerPool, tmp_path: Path) -> None:
    worker = ScriptedWorker(f"unix:{tmp_path}/a.sock")
    worker.hello = hello(worker_id="a")
    await worker.start()
    await store.compare_and_set("workers/attention-0", record("attention-0", address=worker.address), expected=0)
    await store.compare_and_set("workers/attention-1", record("attention-1"), expected=0)
    await eventually(lambda: len(pool.endpoints) == 2)
    await pool.ready(DEADLINE_S)
    store.is_gone = True
    await eventually(lambda: store.num_refusals > 1)
    assert len(pool.endpoints) == 2
    assert pool.hello is not None
    store.forget()
    store.is_gone = False
    await eventually(lambda: names(pool) == ["attention-0"])  # it is connected; nobody knows of the other
    await store.compare_and_set("workers/attention-2", record("attention-2"), expected=0)
    await eventually(lambda: names(pool) == ["attention-0", "attention-2"])
    await worker.kill()
