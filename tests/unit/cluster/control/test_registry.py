from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from cluster.control.placement import PlacedWorker, Placement
from cluster.control.pod_launcher import PodLauncher
from cluster.control.registry import Registry, decode_placement, encode_placement
from cluster.control.topology import Device, Node, Topology
from cluster.errors import UnavailableError
from cluster.operate.worker import Registration
from cluster.protocol import Announcement, Launch
from cluster.store.memory import MemoryStore
from cluster.store.records import ClusterStatus, WorkerRecord
from tests.support.worker_records import RECORD

STATUS = ClusterStatus(
    cluster="c", model="m", epoch=1, controller_id="x", at_s=1.0, num_layers=2, num_experts=4, problem=None
)
NODE = Node("n0", "rack-1", 50, (Device("cpu", "cpu", 40),), 8, "host")
PLACEMENT = Placement((PlacedWorker("attention", 0, "n0", "cpu", 30, 10), PlacedWorker("expert", 3, "n0", "cpu", 10)))


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 20.0))


def test_a_placement_survives_the_store() -> None:
    assert decode_placement(encode_placement(PLACEMENT, [NODE])) == (PLACEMENT, Topology((NODE,)))


def test_a_stored_placement_that_fits_on_no_machine_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="more than one node is called n0"):
        decode_placement(encode_placement(PLACEMENT, [NODE, NODE]))


def test_what_is_wanted_is_written_once_and_what_is_not_is_deleted() -> None:
    async def body() -> None:
        store = MemoryStore()
        await store.compare_and_set("workers/old", b"what another release wrote", expected=0)
        registry = Registry(store, owns_workers=True)
        assert await registry.load() == ({}, None)
        registry.want_workers({"expert-0": RECORD})
        registry.want_placement(encode_placement(PLACEMENT, [NODE]))
        registry.want_status(STATUS)
        await registry.sync()
        assert await registry.records() == {"expert-0": RECORD}
        assert (await store.entries("workers/")).keys() == {"workers/expert-0"}
        versions = {key: entry.version for key, entry in (await store.entries("workers/")).items()}
        await registry.sync()
        assert versions == {key: entry.version for key, entry in (await store.entries("workers/")).items()}
        registry.want_workers({})
        await registry.sync()
        assert await store.entries("workers/") == {}
        assert await store.get("status/cluster") is not None

    _run(body)


@pytest.mark.parametrize(
    ("key", "record"),
    [
        ("workers/expert-1", RECORD),
        ("workers/attention-0", msgspec.structs.replace(RECORD, name="attention-0")),
        ("workers/x", msgspec.structs.replace(RECORD, name="x")),
    ],
)
def test_a_record_that_does_not_fit_its_name_is_passed_over(key: str, record: WorkerRecord) -> None:
    async def body() -> None:
        store = MemoryStore()
        await store.compare_and_set(key, msgspec.json.encode(record), expected=0)
        assert await Registry(store, owns_workers=True).records() == {}

    _run(body)


def test_records_of_others_are_left_alone() -> None:
    async def body() -> None:
        store = MemoryStore()
        await Registration(store, RECORD, ttl_s=1.0).renew(Announcement(pid=7, address="", worker_id="w"))
        registry = Registry(store, owns_workers=False)
        registry.want_workers({})
        await registry.sync()
        assert await registry.records() == {"expert-0": RECORD}

    _run(body)


def test_a_pods_record_lasts_while_it_is_renewed_and_names_the_process_that_runs() -> None:
    async def body() -> None:
        clock = _Clock()
        store = MemoryStore(clock=clock)
        registration = Registration(store, RECORD, ttl_s=1.0)
        launcher = PodLauncher(store)
        first = Announcement(pid=1, address="", worker_id="first")
        for _ in range(3):
            await registration.renew(first)
            clock.now_s += 0.9
        (record,) = (await Registry(store, owns_workers=False).records()).values()
        assert (record.worker_id, record.pid, record.address) == ("first", 1, "a:1")
        assert await launcher.adopt(record)
        await registration.renew(Announcement(pid=2, address="", worker_id="second"))
        assert not await launcher.is_running(record)
        await registration.renew(None)
        assert await store.entries("workers/") == {}
        await registration.renew(first)
        clock.now_s += 1.1
        assert await store.entries("workers/") == {}
        await registration.renew(first)
        assert len(await store.entries("workers/")) == 1

    _run(body)


def test_pods_nodes_are_those_that_registered_workers_are_on() -> None:
    async def body() -> None:
        store = MemoryStore()
        launcher = PodLauncher(store)
        assert await launcher.topology() == Topology(())
        await Registration(store, RECORD, ttl_s=1.0).renew(Announcement(pid=1, address="", worker_id="w"))
        (node,) = (await launcher.topology()).nodes
        assert (node.id, node.devices) == ("n0", (Device("cpu", "cpu", 100),))
        assert not launcher.starts_workers
        with pytest.raises(UnavailableError, match="for Kubernetes to start"):
            await launcher.start(PLACEMENT.workers[0], Launch(address="", model_path="", served_name=""))

    _run(body)
