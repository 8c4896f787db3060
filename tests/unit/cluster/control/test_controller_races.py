"""What happens to a controller at the worst moment, and workers that do not let themselves be led."""

from __future__ import annotations

import asyncio

from cluster.control.topology import Topology
from cluster.errors import UnavailableError
from cluster.store.records import WorkerRecord
from tests.support.controlled_workers import ControlledLauncher
from tests.support.led_cluster import TOKEN, FaultyStore, LedCluster, nodes, run, running, stored_records


class _Launcher(ControlledLauncher):
    """Its nodes are not known before `knows`; its first stops fail."""

    def __init__(self) -> None:
        super().__init__(nodes(), token=TOKEN)
        self.knows = asyncio.Event()
        self.knows.set()
        self.num_failing_stops = 0

    async def topology(self) -> Topology:
        await self.knows.wait()
        return await super().topology()

    async def stop(self, record: WorkerRecord, *, kill: bool) -> None:
        if self.num_failing_stops:
            self.num_failing_stops -= 1
            raise UnavailableError("the launcher is away")
        await super().stop(record, kill=kill)


def test_one_that_takes_over_keeps_the_records_of_what_runs_from_the_first_moment() -> None:
    async def body() -> None:
        store, launcher = FaultyStore(), _Launcher()
        first = LedCluster(store, launcher)
        await first.until(first.is_well)
        before = await stored_records(store)
        await first.kill()
        launcher.knows.clear()
        second = LedCluster(store, launcher)
        scans = store.num_scans
        await second.until(lambda: store.num_scans >= scans + 3)  # it has read them, and written what it wants
        assert await stored_records(store) == before
        launcher.knows.set()
        await second.until(second.is_well)
        await second.kill()
        await launcher.close()

    run(body)


def test_a_worker_that_could_not_be_ended_is_ended_later() -> None:
    async def body() -> None:
        store, launcher = FaultyStore(), _Launcher()
        first = LedCluster(store, launcher)
        await first.until(first.is_well)
        await first.kill()
        launcher.num_failing_stops = 2
        second = LedCluster(store, launcher, expert_workers=1)
        await second.until(lambda: not launcher.workers["expert-1"].is_running)
        assert launcher.num_failing_stops == 0
        await second.kill()
        await launcher.close()

    run(body)


def test_a_worker_of_another_release_is_named_in_the_status_and_then_replaced() -> None:
    async def body() -> None:
        async with running() as first:
            await first.until(first.is_well)
            await first.kill()
            old = first.launcher.workers["expert-0"]
            old.refusal = "worker expert-0 speaks protocol version 1, this controller 2: run all from one release"
            second = LedCluster(first.store, first.launcher)

            async def is_told() -> bool:
                status = await second.status()
                return status is not None and status.problem == old.refusal

            await second.until(is_told)
            await second.until(second.is_well)
            assert not old.is_running
            await second.kill()

    run(body)
