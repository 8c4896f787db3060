from __future__ import annotations

import asyncio

import msgspec
import pytest

from cluster.control.leadership import LostLeadError
from cluster.control.placement import PlacedWorker
from cluster.protocol import Launch, Lead
from cluster.silence import RENEWALS
from cluster.store.base import Versioned
from tests.support.controlled_workers import ControlledLauncher
from tests.support.led_cluster import (
    DEADLINE_S,
    NAMES,
    SHAPE,
    TOKEN,
    FaultyStore,
    LedCluster,
    nodes,
    run,
    running,
    stored_records,
)


@pytest.fixture(autouse=True)
def _starts_are_tried_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.restarts.RARE_S", 0.3)


def test_workers_are_started_led_and_told_what_to_hold_and_where_experts_are() -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            workers = cluster.launcher.workers
            assert workers.keys() == NAMES
            held = [workers["expert-0"].held, workers["expert-1"].held]
            assert all(layers[0] == () for layers in held)
            for layer in SHAPE.moe_layers:
                assert sorted(held[0][layer] + held[1][layer]) == list(range(SHAPE.num_experts))
            route = workers["attention-0"].route
            assert route is not None
            for layer in SHAPE.moe_layers:
                for expert, owners in enumerate(route.owners[layer]):
                    assert all(expert in workers[route.peers[place].name].held[layer] for place in owners)
            records = await stored_records(cluster.store)
            assert records == {f"workers/{name}": worker.record for name, worker in workers.items()}

    run(body)


def test_a_workers_launch_says_its_place_and_its_part_of_the_machine() -> None:
    async def body() -> None:
        async with running(orphan_timeout_s=27, peer_timeout_s=3, reroute_timeout_s=50) as cluster:
            await cluster.until(cluster.is_well)
            launches = {launch.name: launch for launch in cluster.launcher.launches}
            attention = launches["attention-0"]
            assert (attention.role, attention.node_id) == ("attention", "n0")
            assert attention.kv_cache_bytes == 64 * 64  # every sequence at full length: no more is of use
            assert launches["expert-1"].kv_cache_bytes is None
            assert all(launch.num_threads == 1 for launch in launches.values())  # 4 cores, 3 workers
            assert all(launch.token == TOKEN and not launch.exit_with_parent for launch in launches.values())
            times = (attention.orphan_timeout_s, attention.peer_timeout_s, attention.reroute_timeout_s)
            assert times == (27, 3, 50)

    run(body)


def test_its_loop_shows_that_it_goes_round_however_long_a_lease_is() -> None:
    async def body() -> None:
        num_beats = 0

        def beat() -> None:
            nonlocal num_beats
            num_beats += 1

        launcher = ControlledLauncher(nodes(), token=TOKEN)
        cluster = LedCluster(
            FaultyStore(), launcher, beat=beat, lease_s=600.0, orphan_timeout_s=9000.0, reroute_timeout_s=4220.0
        )
        await cluster.until(cluster.is_well)
        before = num_beats
        await cluster.until(lambda: num_beats > before + 4)
        await cluster.kill()
        await launcher.close()

    run(body)


def test_a_killed_worker_is_replaced_and_its_experts_are_held_by_the_other_meanwhile() -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            workers, before = cluster.launcher.workers, cluster.ids()
            cluster.launcher.refusals["expert-0"] = "not yet"
            await workers["expert-0"].kill()
            await cluster.until(lambda: sum(map(len, workers["expert-1"].held)) == 8)
            del cluster.launcher.refusals["expert-0"]
            await cluster.until(cluster.is_well)
            after = cluster.ids()
            assert after["expert-0"] != before["expert-0"]
            assert after["expert-1"] == before["expert-1"]

    run(body)


def test_a_hung_worker_is_killed_and_replaced() -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            hung = cluster.launcher.workers["expert-1"]
            hung.is_hung = True
            await cluster.until(lambda: not hung.is_running)
            await cluster.until(cluster.is_well)

    run(body)


def test_a_start_that_keeps_failing_is_a_problem_in_the_status_and_ends_with_its_cause() -> None:
    async def body() -> None:
        async with running() as cluster:
            cluster.launcher.refusals["attention-0"] = "no such checkpoint"

            async def is_told() -> bool:
                status = await cluster.status()
                return status is not None and status.problem == "attention-0 does not start: no such checkpoint"

            await cluster.until(is_told)
            cluster.launcher.refusals.clear()
            await cluster.until(cluster.is_well)

    run(body)


def test_the_next_controller_takes_over_what_runs_under_a_higher_epoch() -> None:
    async def body() -> None:
        async with running() as first:
            await first.until(first.is_well)
            before, held = first.ids(), [worker.held for worker in first.launcher.workers.values()]
            await first.kill()
            second = LedCluster(first.store, first.launcher)
            await second.until(second.is_well)
            assert first.ids() == before
            assert [worker.held for worker in first.launcher.workers.values()] == held
            epochs = [worker.leader.epoch for worker in first.launcher.workers.values() if worker.leader]
            assert epochs == [2, 2, 2]
            await second.kill()

    run(body)


def test_a_record_whose_process_is_gone_is_removed_and_the_worker_started() -> None:
    async def body() -> None:
        async with running() as first:
            await first.until(first.is_well)
            await first.kill()
            gone = first.launcher.workers["expert-0"]
            await gone.kill()
            second = LedCluster(first.store, first.launcher)
            await second.until(second.is_well)
            assert first.launcher.workers["expert-0"] is not gone
            assert len(await stored_records(first.store)) == 3
            await second.kill()

    run(body)


def test_a_second_controller_waits_until_the_first_is_gone() -> None:
    async def body() -> None:
        async with running() as first:
            await first.until(first.is_well)
            second = LedCluster(first.store, first.launcher)
            looks = first.store.num_looks
            await first.until(lambda: first.store.num_looks > looks + RENEWALS)  # longer than a lead lasts by itself
            assert all(len(worker.leads) == 1 for worker in first.launcher.workers.values())
            await first.kill()
            await second.until(second.is_well)
            await second.kill()

    run(body)


def test_a_controller_whose_worker_obeys_a_higher_epoch_steps_down() -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            cluster.launcher.workers["expert-0"].obey(Lead(epoch=9, controller_id="another"))
            with pytest.raises(LostLeadError, match="expert-0 obeys another controller, with epoch 9"):
                async with asyncio.timeout(DEADLINE_S):
                    await cluster.task
            assert all(worker.is_running for worker in cluster.launcher.workers.values())

    run(body)


def test_an_epoch_that_only_workers_remember_is_topped() -> None:
    async def body() -> None:
        async with running() as first:
            await first.until(first.is_well)
            await first.kill()
            for worker in first.launcher.workers.values():
                worker.obey(Lead(epoch=41, controller_id="another"))
            second = LedCluster(first.store, first.launcher)
            await second.until(second.is_well)
            stored = await first.store.get("controller/epoch")
            assert stored is not None
            assert stored.value == b"42"
            await second.kill()

    run(body)


def test_without_the_store_it_goes_on_and_an_empty_one_is_filled_again() -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            cluster.store.is_away = True
            killed = cluster.launcher.workers["expert-0"]
            await killed.kill()
            await cluster.until(
                lambda: (
                    cluster.launcher.workers["expert-0"] is not killed
                    and sum(map(len, cluster.launcher.workers["expert-0"].held)) == 4
                )
            )
            cluster.store.empty()
            cluster.store.is_away = False
            await cluster.until(cluster.is_well)

            async def is_filled() -> bool:
                keys: list[Versioned | None] = [
                    await cluster.store.get(key) for key in ("controller/lead", "controller/epoch", "placement/current")
                ]
                return all(keys) and len(await stored_records(cluster.store)) == 3

            await cluster.until(is_filled)

    run(body)


def test_without_the_launcher_what_runs_goes_on_and_what_died_is_started_when_it_is_back() -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            cluster.launcher.is_away = True
            killed = cluster.launcher.workers["expert-0"]
            await killed.kill()
            await cluster.until(lambda: sum(map(len, cluster.launcher.workers["expert-1"].held)) == 8)

            async def is_told() -> bool:
                status = await cluster.status()
                return status is not None and status.problem == "the launcher is away"

            await cluster.until(is_told)
            cluster.launcher.is_away = False
            await cluster.until(cluster.is_well)

    run(body)


def test_a_stop_ends_the_workers_and_leaves_no_records() -> None:
    async def body() -> None:
        async with running() as cluster:
            await cluster.until(cluster.is_well)
            cluster.stop.set()
            async with asyncio.timeout(DEADLINE_S):
                await cluster.task
            assert not any(worker.is_running for worker in cluster.launcher.workers.values())
            assert await stored_records(cluster.store) == {}
            assert await cluster.store.get("controller/lead") is None

    run(body)


def test_another_token_leads_nobody() -> None:
    async def body() -> None:
        async with running(token="another") as cluster:
            await cluster.until(lambda: len(cluster.launcher.workers) == 3)

            async def is_lost() -> bool:
                status = await cluster.status()
                return status is not None and any(worker.condition == "lost" for worker in status.workers)

            await cluster.until(is_lost)
            assert not any(worker.leads for worker in cluster.launcher.workers.values())

    run(body)


class _Pods(ControlledLauncher):
    """Workers that come by themselves: the test starts them and writes their records."""

    @property
    def starts_workers(self) -> bool:
        return False

    async def register(self, store: FaultyStore, worker: PlacedWorker) -> None:
        record = await super().start(worker, Launch(address="", model_path="", served_name=""))
        key = f"workers/{record.name}"
        held = await store.get(key)
        expected = held.version if held is not None else 0
        assert await store.compare_and_set(key, msgspec.json.encode(record), expected=expected) is not None


def test_pods_are_led_where_they_are_and_the_first_wait_for_the_others() -> None:
    async def body() -> None:
        store, launcher = FaultyStore(), _Pods(nodes(), token=TOKEN)
        await launcher.register(store, PlacedWorker("attention", 0, "n0", "cpu", 5000, 1000))
        await launcher.register(store, PlacedWorker("expert", 1000, "n1", "cpu", 8000))
        cluster = LedCluster(store, launcher)
        attention, first = launcher.workers["attention-0"], launcher.workers["expert-1000"]
        await cluster.until(lambda: first.leader is not None and attention.leader is not None)
        await launcher.register(store, PlacedWorker("expert", 2000, "n1", "cpu", 8000))
        await cluster.until(cluster.is_well)
        assert first.num_assigns == 1  # it was not told to hold all first

        await launcher.workers["expert-2000"].kill()
        await cluster.until(lambda: sum(map(len, first.held)) == 8)
        await launcher.register(store, PlacedWorker("expert", 2000, "n1", "cpu", 8000))
        await cluster.until(cluster.is_well)

        cluster.stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await cluster.task
        assert all(worker.is_running for worker in launcher.workers.values())
        assert len(await stored_records(store)) == 3
        await launcher.close()

    run(body)
