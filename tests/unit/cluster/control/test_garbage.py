"""Bytes that nobody can read stand in the store, at one key after the other: all goes on, and they are replaced."""

from __future__ import annotations

import logging

import msgspec
import pytest

from cluster.control.placement import PlacedWorker
from cluster.control.pod_launcher import PodLauncher
from cluster.control.topology import Topology
from cluster.errors import UnavailableError
from cluster.operate.worker import Registration
from cluster.protocol import Announcement, Launch
from cluster.store.memory import MemoryStore
from cluster.store.records import WorkerRecord
from tests.support.controlled_workers import ControlledLauncher
from tests.support.led_cluster import TOKEN, FaultyStore, LedCluster, nodes, run, running, stored_records
from tests.support.worker_records import RECORD

GARBAGE = [b"", b"\xff\x00\xfe", b'{"epoch": "x"}', b"[[[", b"-7"]
KEYS = ("controller/lead", "controller/epoch", "placement/current", "status/cluster", "workers/expert-0", "workers/x")
each_value = pytest.mark.parametrize("garbage", GARBAGE, ids=repr)


async def _put(store: MemoryStore, key: str, value: bytes) -> None:
    held = await store.get(key)
    assert await store.compare_and_set(key, value, expected=held.version if held is not None else 0) is not None


async def _is_gone(store: MemoryStore, garbage: bytes) -> bool:
    found = [await store.get(key) for key in KEYS]
    return not any(entry is not None and entry.value == garbage for entry in found)


@each_value
def test_a_controller_that_leads_writes_over_it(garbage: bytes) -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            before = cluster.ids()
            for key in KEYS:
                await _put(cluster.store, key, garbage)
            await cluster.until(lambda: _is_gone(cluster.store, garbage))
            await cluster.until(cluster.is_well)
            assert cluster.ids() == before
            epoch = await cluster.store.get("controller/epoch")
            assert epoch is not None
            assert epoch.value == b"1"

    run(body)


@each_value
def test_a_controller_that_starts_passes_over_it(garbage: bytes) -> None:
    async def body() -> None:
        async with running() as first:
            await first.until(first.is_well)
            before = first.ids()
            await first.kill()
            for key in KEYS:
                if key != "workers/expert-0":  # what is led there is known from nowhere else
                    await _put(first.store, key, garbage)
            second = LedCluster(first.store, first.launcher)
            await second.until(lambda: _is_gone(first.store, garbage))
            await second.until(second.is_well)
            assert second.ids() == before
            # Only workers still knew the epoch.
            assert {worker.leader.epoch for worker in first.launcher.workers.values() if worker.leader} == {2}
            await second.kill()

    run(body)


class _Pods(ControlledLauncher):
    """Workers that come by themselves; who is there is read from the store, as for real pods."""

    def __init__(self, store: FaultyStore) -> None:
        super().__init__(nodes(), token=TOKEN)
        self._pods = PodLauncher(store)

    @property
    def starts_workers(self) -> bool:
        return False

    async def topology(self) -> Topology:
        return await self._pods.topology()

    async def is_running(self, record: WorkerRecord) -> bool:
        return await self._pods.is_running(record)


def test_pods_are_led_on_beside_it_and_it_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        store = FaultyStore()
        launcher = _Pods(store)
        for placed in (
            PlacedWorker("attention", 0, "n0", "cpu", 5000, 1000),
            PlacedWorker("expert", 0, "n1", "cpu", 8000),
            PlacedWorker("expert", 1, "n2", "cpu", 8000),
        ):
            record = await launcher.start(placed, Launch(address="", model_path="", served_name=""))
            await _put(store, f"workers/{record.name}", msgspec.json.encode(record))
        await _put(store, "workers/other", b"{")
        cluster = LedCluster(store, launcher)
        await cluster.until(cluster.is_well)
        before = cluster.ids()
        await _put(store, "workers/expert-1", b"\xff")
        scans = store.num_scans
        await cluster.until(lambda: store.num_scans > scans + 10)
        await cluster.until(cluster.is_well)  # it reports, whatever stands in the store
        await _put(store, "workers/expert-1", msgspec.json.encode(launcher.workers["expert-1"].record))
        await cluster.until(cluster.is_well)
        assert cluster.ids() == before
        await cluster.kill()
        await launcher.close()

    with caplog.at_level(logging.WARNING):
        run(body)
    told = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    readers = 2  # the controller and its launcher
    assert len(told) <= 2 * readers
    assert {message.split()[2] for message in told} == {"workers/other", "workers/expert-1"}


@each_value
def test_a_pod_writes_its_record_over_it_and_leaves_it_at_its_end(garbage: bytes) -> None:
    async def body() -> None:
        store = FaultyStore()
        registration = Registration(store, RECORD, ttl_s=10.0)
        await _put(store, "workers/expert-0", garbage)
        await registration.renew(None)  # it raises nothing: an end goes on
        entry = await store.get("workers/expert-0")
        assert entry is not None
        assert entry.value == garbage
        await registration.renew(Announcement(pid=7, address="", worker_id="w"))
        assert await stored_records(store) == {"workers/expert-0": RECORD}
        await registration.renew(None)
        assert await stored_records(store) == {}

    run(body)


def test_nobody_can_say_whether_a_pod_runs_whose_record_cannot_be_read() -> None:
    async def body() -> None:
        store = MemoryStore()
        await _put(store, "workers/expert-0", b"{")
        with pytest.raises(UnavailableError, match="workers/expert-0 cannot be read"):
            await PodLauncher(store).is_running(RECORD)

    run(body)
