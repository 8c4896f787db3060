"""Taking over takes its time: the lead is kept meanwhile, and who decides beats as it goes round."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cluster.control.reconcile import reconcile
from cluster.errors import UnavailableError
from cluster.silence import RENEWALS
from cluster.store.records import WorkerRecord
from tests.support.controlled_workers import ControlledLauncher
from tests.support.led_cluster import LEASE_S, TOKEN, FaultyStore, LedCluster, nodes, run, running


class _Launcher(ControlledLauncher):
    """It says nothing of the workers in `silent` before `speaks`."""

    def __init__(self) -> None:
        super().__init__(nodes(), token=TOKEN)
        self.silent: set[str] = set()
        self.speaks = asyncio.Event()
        self.asked: list[str] = []

    async def adopt(self, record: WorkerRecord) -> bool:
        self.asked.append(record.name)
        if record.name in self.silent:
            await self.speaks.wait()
        return await super().adopt(record)


class _Store(FaultyStore):
    """It counts how often the lead was renewed."""

    num_renewals = 0

    async def renew(self, key: str, *, expected: int, ttl_s: float) -> bool:
        self.num_renewals += 1
        return await super().renew(key, expected=expected, ttl_s=ttl_s)


def test_workers_are_adopted_at_once_and_one_that_nobody_can_ask_about_is_waited_for_by_none() -> None:
    async def body() -> None:
        store, launcher = _Store(), _Launcher()
        first = LedCluster(store, launcher)
        await first.until(first.is_well)
        before = first.ids()
        await first.kill()
        launcher.silent = {"attention-0", "expert-1"}
        second = LedCluster(store, launcher)
        await second.until(second.is_well)
        assert sorted(launcher.asked) == sorted(before)
        renewals = store.num_renewals
        await second.until(lambda: store.num_renewals > renewals + 2 * RENEWALS)  # the lead outlasts what it waits for
        launcher.speaks.set()
        await second.until(second.is_well)
        assert second.ids() == before
        await second.kill()
        await launcher.close()

    run(body)


def test_one_that_turns_out_to_be_gone_after_the_takeover_is_started_again() -> None:
    async def body() -> None:
        store, launcher = _Store(), _Launcher()
        first = LedCluster(store, launcher)
        await first.until(first.is_well)
        before = first.ids()
        await first.kill()
        await launcher.workers["expert-0"].kill()
        launcher.silent = {"expert-0"}
        second = LedCluster(store, launcher)
        await second.until(lambda: sum(map(len, launcher.workers["expert-1"].held)) == 8)  # it leads
        launcher.speaks.set()
        await second.until(second.is_well)
        after = second.ids()
        assert after["expert-0"] != before["expert-0"]
        assert after["expert-1"] == before["expert-1"]
        await second.kill()
        await launcher.close()

    run(body)


def test_the_lead_is_kept_while_a_hung_worker_is_waited_for() -> None:
    async def body() -> None:
        store, launcher = _Store(), _Launcher()
        first = LedCluster(store, launcher)
        await first.until(first.is_well)
        await first.kill()
        for worker in launcher.workers.values():
            worker.is_hung = True
        second = LedCluster(store, launcher, lease_s=5 * LEASE_S)  # so long it waits for reports
        await second.until(lambda: second.controller._leadership.epoch == 2)
        begun, renewals = second.controller, store.num_renewals
        await second.until(lambda: store.num_renewals > renewals + 1 or not begun._is_taking_over)
        assert begun._is_taking_over  # and yet it has renewed its lead
        await second.kill()
        await launcher.close()

    run(body)


def test_a_loop_that_ends_by_an_error_ends_the_controller_and_workers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)

            async def fail() -> None:
                raise RuntimeError("the store is not what it was")

            monkeypatch.setattr(cluster.controller._registry, "try_sync", fail)
            with pytest.raises(RuntimeError, match="not what it was"):
                async with asyncio.timeout(20.0):
                    await cluster.task
            assert all(worker.is_running for worker in cluster.launcher.workers.values())

    run(body)


def test_it_beats_while_it_waits_to_lead_and_as_it_decides_but_not_while_it_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_beats = 0
    is_stuck, go_on = threading.Event(), threading.Event()

    def beat() -> None:
        nonlocal num_beats
        num_beats += 1

    async def body() -> None:
        store, launcher = FaultyStore(), ControlledLauncher(nodes(), token=TOKEN)
        store.is_away = True
        cluster = LedCluster(store, launcher, beat=beat)
        await cluster.until(lambda: num_beats > 5)
        store.is_away = False
        await cluster.until(cluster.is_well)
        before = num_beats
        await cluster.until(lambda: num_beats > before + 5)

        def stuck(*arguments: object) -> object:
            is_stuck.set()
            go_on.wait(60.0)
            return reconcile(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr("cluster.control.controller.reconcile", stuck)
        await cluster.until(is_stuck.is_set)
        at_once, looks = num_beats, store.num_looks
        renewals = {name: worker.num_renewals for name, worker in launcher.workers.items()}
        # Its event loop runs on, and with it the leases: that is no sign of life.
        await cluster.until(lambda: all(w.num_renewals > renewals[n] + 10 for n, w in launcher.workers.items()))
        assert num_beats == at_once
        assert store.num_looks >= looks
        go_on.set()
        await cluster.until(lambda: num_beats > at_once)
        await cluster.kill()
        await launcher.close()

    try:
        run(body)
    finally:
        go_on.set()


def test_a_launcher_that_is_away_leaves_it_to_the_reports_who_is_there() -> None:
    class _Away(_Launcher):
        async def adopt(self, record: WorkerRecord) -> bool:
            raise UnavailableError("the launcher is away")

    async def body() -> None:
        store, launcher = FaultyStore(), _Away()
        first = LedCluster(store, launcher)
        await first.until(first.is_well)
        before = first.ids()
        await first.kill()
        second = LedCluster(store, launcher)
        await second.until(second.is_well)
        assert second.ids() == before
        await second.kill()
        await launcher.close()

    run(body)
