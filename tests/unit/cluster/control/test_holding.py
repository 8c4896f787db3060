"""A controller that starts while the store is away, or has lost what it held: workers go on, and none is led by two."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.control.last_known import LastKnown, open_last_known
from cluster.protocol import Lead
from tests.support.controlled_workers import ControlledLauncher
from tests.support.led_cluster import TOKEN, FaultyStore, LedCluster, nodes, run, stored_records

RENEWALS = 20  # far more than what is on its way when a controller ends


class _Machine:
    """A store, workers, and the folder of the controllers that run here one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = FaultyStore()
        self.launcher = ControlledLauncher(nodes(), token=TOKEN)

    @contextlib.asynccontextmanager
    async def controller(self) -> AsyncIterator[LedCluster]:
        with open_last_known(self.folder) as last_known:
            cluster = self.lead(last_known)
            try:
                yield cluster
            finally:
                await cluster.kill()

    def lead(self, last_known: LastKnown | None = None) -> LedCluster:
        return LedCluster(self.store, self.launcher, last_known=last_known)

    async def until_renewed(self, cluster: LedCluster) -> None:
        """Until the leases of all workers were renewed for a while."""
        before = {name: worker.num_renewals for name, worker in self.launcher.workers.items()}
        await cluster.until(
            lambda: all(w.num_renewals > before[name] + RENEWALS for name, w in self.launcher.workers.items())
        )

    def leaders(self) -> set[Lead | None]:
        return {worker.leader for worker in self.launcher.workers.values()}


@contextlib.asynccontextmanager
async def _machine(folder: Path) -> AsyncIterator[_Machine]:
    machine = _Machine(folder)
    try:
        yield machine
    finally:
        await machine.launcher.close()


def test_without_the_store_the_next_one_holds_the_workers_as_the_last_one_and_leads_once_it_is_back(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        async with _machine(tmp_path) as machine:
            async with machine.controller() as first:
                await first.until(first.is_well)
                before, held = first.ids(), [worker.held for worker in machine.launcher.workers.values()]
                lead = Lead(epoch=1, controller_id=first.controller.controller_id)
            machine.store.is_away = True
            num_assigns = [worker.num_assigns for worker in machine.launcher.workers.values()]
            async with machine.controller() as second:
                await machine.until_renewed(second)
                assert machine.leaders() == {lead}  # nobody new leads
                assert [worker.num_assigns for worker in machine.launcher.workers.values()] == num_assigns
                machine.store.is_away = False
                await second.until(second.is_well)
                assert second.ids() == before
                assert [worker.held for worker in machine.launcher.workers.values()] == held
                assert machine.leaders() == {Lead(epoch=2, controller_id=second.controller.controller_id)}

    run(body)


def test_one_after_the_other_holds_while_the_store_stays_away(tmp_path: Path) -> None:
    async def body() -> None:
        async with _machine(tmp_path) as machine:
            async with machine.controller() as first:
                await first.until(first.is_well)
            machine.store.is_away = True
            for _ in range(2):
                async with machine.controller() as next_one:
                    await machine.until_renewed(next_one)
            assert {lead.controller_id for lead in machine.leaders() if lead} == {first.controller.controller_id}

    run(body)


def test_what_another_leads_is_let_go_and_not_taken(tmp_path: Path) -> None:
    async def body() -> None:
        async with _machine(tmp_path) as machine:
            async with machine.controller() as first:
                await first.until(first.is_well)
            elsewhere = machine.lead()
            await elsewhere.until(elsewhere.is_well)
            lead = Lead(epoch=2, controller_id=elsewhere.controller.controller_id)
            async with machine.controller() as second:
                refused = machine.launcher.workers.values()
                # It lets go of a worker at its first refusal, whatever the store says.
                await second.until(lambda: not list(second.controller._roster))
                await machine.until_renewed(elsewhere)
                assert machine.leaders() == {lead}
                assert all(len(worker.leads) == 2 for worker in refused)
            await elsewhere.kill()

    run(body)


def test_a_store_that_lost_everything_is_filled_from_what_the_last_one_knew(tmp_path: Path) -> None:
    async def body() -> None:
        async with _machine(tmp_path) as machine:
            async with machine.controller() as first:
                await first.until(first.is_well)
                before, records = first.ids(), await stored_records(machine.store)
                placement = await machine.store.get("placement/current")
            machine.store.empty()
            async with machine.controller() as second:
                await second.until(second.is_well)
                assert second.ids() == before
                assert await stored_records(machine.store) == records
                again = await machine.store.get("placement/current")
                assert placement is not None
                assert again is not None
                assert again.value == placement.value
                assert machine.leaders() == {Lead(epoch=2, controller_id=second.controller.controller_id)}

    run(body)


def test_a_worker_that_was_started_while_the_store_was_away_is_adopted(tmp_path: Path) -> None:
    async def body() -> None:
        async with _machine(tmp_path) as machine:
            async with machine.controller() as first:
                await first.until(first.is_well)
                machine.store.is_away = True
                killed = machine.launcher.workers["expert-0"]
                await killed.kill()

                def is_replaced() -> bool:
                    worker = machine.launcher.workers["expert-0"]
                    return worker is not killed and sum(map(len, worker.held)) == 4

                await first.until(is_replaced)
                before = first.ids()
            machine.store.is_away = False  # with the record of the one that was killed
            async with machine.controller() as second:
                await second.until(second.is_well)
                assert second.ids() == before

    run(body)


def test_where_another_has_led_since_the_store_says_who_runs(tmp_path: Path) -> None:
    async def body() -> None:
        async with _machine(tmp_path) as machine:
            async with machine.controller() as first:
                await first.until(first.is_well)
            elsewhere = machine.lead()
            await elsewhere.until(elsewhere.is_well)
            old = machine.launcher.workers["expert-1"]
            await old.kill()
            await elsewhere.until(lambda: machine.launcher.workers["expert-1"] is not old)
            await elsewhere.until(elsewhere.is_well)
            before = elsewhere.ids()
            await elsewhere.kill()
            async with machine.controller() as second:
                await second.until(second.is_well)
                assert second.ids() == before

    run(body)


def test_nothing_is_held_after_an_orderly_end_and_a_stop_ends_one_that_only_holds(tmp_path: Path) -> None:
    async def body() -> None:
        async with _machine(tmp_path) as machine:
            async with machine.controller() as first:
                await first.until(first.is_well)
            machine.store.is_away = True
            async with machine.controller() as second:
                await machine.until_renewed(second)
                second.stop.set()
                await asyncio.wait_for(second.task, 10.0)
            machine.store.is_away = False
            async with machine.controller() as third:
                await third.until(third.is_well)
                third.stop.set()
                await asyncio.wait_for(third.task, 10.0)
            with open_last_known(tmp_path) as last_known:
                assert last_known.read() is None

    run(body)
