from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cluster.control.leadership import Leadership, LostLeadError
from cluster.protocol import Lead
from cluster.silence import LASTING_LEASES
from cluster.store.memory import MemoryStore
from cluster.store.records import EPOCH_KEY, LEAD_KEY

DEADLINE_S = 20.0
LEASE_S = 0.3


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await body()

    asyncio.run(bounded())


def test_epochs_grow_from_one_leader_to_the_next() -> None:
    async def body() -> None:
        store = MemoryStore()
        for epoch in (1, 2, 3):
            leader = Leadership(store, f"controller-{epoch}", lease_s=LEASE_S)
            assert await leader.acquire()
            assert (leader.epoch, leader.message.controller_id) == (epoch, f"controller-{epoch}")
            await leader.resign()

    _run(body)


def test_while_one_leads_another_waits_and_may_give_up() -> None:
    async def body() -> None:
        clock = _Clock()
        store = MemoryStore(clock=clock)
        first, second = (Leadership(store, name, lease_s=LEASE_S) for name in ("first", "second"))
        assert await first.acquire()
        looks = iter([False, False, True])
        assert not await second.acquire(lambda: next(looks))
        assert second.epoch == 0
        clock.now_s += 2 * LEASE_S
        await first.renew()
        clock.now_s += 2 * LEASE_S
        looks = iter([False, True])
        assert not await second.acquire(lambda: next(looks))
        clock.now_s += 2 * LEASE_S  # the first has said nothing for as long as its lead lasts
        assert await second.acquire()
        assert second.epoch == 2
        with pytest.raises(LostLeadError, match="controller second leads with epoch 2"):
            await first.renew()

    _run(body)


def test_a_store_that_came_back_empty_gets_the_lead_and_the_epoch_again() -> None:
    async def body() -> None:
        store = MemoryStore()
        leader = Leadership(store, "first", lease_s=LEASE_S)
        await leader.acquire()
        await leader.raise_above(6)
        await store.compare_and_set(LEAD_KEY, None, expected=(await store.get(LEAD_KEY)).version)
        await store.compare_and_set(EPOCH_KEY, None, expected=(await store.get(EPOCH_KEY)).version)
        await leader.renew()
        assert (await store.get(EPOCH_KEY)).value == b"7"
        assert await store.get(LEAD_KEY) is not None

    _run(body)


def test_of_two_that_an_emptied_store_let_lead_the_higher_epoch_wins() -> None:
    async def body() -> None:
        store, emptied = MemoryStore(), MemoryStore()
        first = Leadership(store, "first", lease_s=LEASE_S)
        await first.acquire()
        await first.raise_above(4)
        second = Leadership(emptied, "second", lease_s=LEASE_S)
        await second.acquire()
        first._store = emptied  # what it knew is gone
        await first.renew()
        with pytest.raises(LostLeadError, match="controller first leads with epoch 5"):
            await second.renew()

    _run(body)


def test_an_epoch_above_ours_in_the_store_ends_our_lead() -> None:
    async def body() -> None:
        store = MemoryStore()
        leader = Leadership(store, "first", lease_s=LEASE_S)
        await leader.acquire()
        await store.compare_and_set(EPOCH_KEY, b"5", expected=(await store.get(EPOCH_KEY)).version)
        with pytest.raises(LostLeadError, match="the store knows of epoch 5, above ours, 1"):
            await leader.renew()

    _run(body)


def test_a_lead_that_cannot_be_read_is_waited_for_as_long_as_a_lead_lasts() -> None:
    async def body() -> None:
        loop, store = asyncio.get_running_loop(), MemoryStore()
        await store.compare_and_set(LEAD_KEY, b"{", expected=0)
        await store.compare_and_set(EPOCH_KEY, b"no number", expected=0)
        began = loop.time()
        leader = Leadership(store, "first", lease_s=LEASE_S)
        assert await leader.acquire()
        assert loop.time() - began >= LASTING_LEASES * LEASE_S
        assert (leader.epoch, (await store.get(EPOCH_KEY)).value) == (1, b"1")
        await leader.renew()

    _run(body)


@pytest.mark.parametrize("epoch", [b"-1", b"%d" % 2**63, b"9" * 400], ids=["negative", "too-large", "endless"])
def test_an_epoch_that_no_order_could_carry_is_none(epoch: bytes) -> None:
    async def body() -> None:
        store = MemoryStore()
        await store.compare_and_set(EPOCH_KEY, epoch, expected=0)
        leader = Leadership(store, "first", lease_s=LEASE_S)
        assert await leader.acquire()
        assert leader.epoch == 1

    _run(body)


def test_a_predecessor_that_has_ended_is_not_waited_for_and_its_words_are_said_until_then() -> None:
    async def body() -> None:
        clock = _Clock()  # on which the first one's lead never ends
        store = MemoryStore(clock=clock)
        first = Leadership(store, "first", lease_s=LEASE_S)
        assert await first.acquire()
        second = Leadership(store, "second", lease_s=LEASE_S, before=first.message)
        assert second.message == first.message
        assert await second.acquire()
        assert second.message == Lead(epoch=2, controller_id="second")
        assert second.found_epoch == 1

    _run(body)


def test_one_that_waits_to_lead_looks_often_however_long_a_lease_is() -> None:
    async def body() -> None:
        store = MemoryStore()
        first, second = (Leadership(store, name, lease_s=600.0) for name in ("first", "second"))
        assert await first.acquire()
        num_looks = 0

        def look() -> None:
            nonlocal num_looks
            num_looks += 1

        assert not await second.acquire(lambda: num_looks == 3, look)

    _run(body)


def test_an_emptied_store_does_not_bring_back_the_epochs_that_a_predecessor_had() -> None:
    async def body() -> None:
        leader = Leadership(MemoryStore(), "second", lease_s=LEASE_S, before=Lead(epoch=7, controller_id="first"))
        assert await leader.acquire()
        assert (leader.epoch, leader.found_epoch) == (8, 0)

    _run(body)


def test_a_renewal_and_a_higher_epoch_at_the_same_time_keep_the_lead() -> None:
    async def body() -> None:
        store = MemoryStore()
        leader = Leadership(store, "first", lease_s=LEASE_S)
        await leader.acquire()
        await asyncio.gather(leader.renew(), leader.raise_above(8), leader.renew())
        assert (await store.get(EPOCH_KEY)).value == b"9"
        await leader.resign()
        assert await store.get(LEAD_KEY) is None

    _run(body)
