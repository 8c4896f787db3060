"""A worker that does not answer is killed; one that answers late, or was started anew, is not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cluster.operate.pulse import watch_pulse

PATIENCE_S = 0.4
BOUND_S = 10.0


async def _watch_until(
    is_over: asyncio.Event, pid: Callable[[], int | None], ask: Callable[[], Awaitable[bool]], kill: Callable[[], None]
) -> None:
    watching = asyncio.create_task(watch_pulse(pid, ask, kill, PATIENCE_S))
    try:
        async with asyncio.timeout(BOUND_S):
            await is_over.wait()
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "never-answers"])
def test_a_silent_worker_is_killed_after_the_patience(refuses: bool) -> None:
    async def run() -> float:
        loop, killed = asyncio.get_running_loop(), asyncio.Event()

        async def ask() -> bool:
            await asyncio.sleep(0.01 if refuses else 3600.0)
            return False

        started = loop.time()
        await _watch_until(killed, lambda: 1, ask, killed.set)
        return loop.time() - started

    assert PATIENCE_S <= asyncio.run(run()) < BOUND_S


def test_an_answer_that_takes_most_of_the_patience_is_an_answer() -> None:
    async def run() -> int:
        answered, num_answers, num_kills = asyncio.Event(), 0, 0

        async def ask() -> bool:
            nonlocal num_answers
            await asyncio.sleep(PATIENCE_S / 2)
            num_answers += 1
            if num_answers == 4:
                answered.set()
            return True

        def kill() -> None:
            nonlocal num_kills
            num_kills += 1

        await _watch_until(answered, lambda: 1, ask, kill)
        return num_kills

    assert asyncio.run(run()) == 0


def test_silence_counts_for_one_process_only() -> None:
    async def run() -> tuple[list[int], int]:
        killed, asked = asyncio.Event(), []
        pids = iter([7] * 10 + [8] * 10_000)  # the first ends by itself, before the patience is over
        now = 7

        def pid() -> int:
            nonlocal now
            now = next(pids)
            return now

        async def ask() -> bool:
            asked.append(now)
            await asyncio.sleep(3600.0)
            return True

        await _watch_until(killed, pid, ask, killed.set)
        return asked, now

    asked, killed_pid = asyncio.run(run())
    assert asked == [7, 8]
    assert killed_pid == 8


def test_a_worker_that_is_not_ready_is_not_asked() -> None:
    async def run() -> int:
        num_asked = 0
        looked, num_looks = asyncio.Event(), 0

        def pid() -> None:
            nonlocal num_looks
            num_looks += 1
            if num_looks == 60:  # for longer than the patience
                looked.set()

        async def ask() -> bool:
            nonlocal num_asked
            num_asked += 1
            return True

        await _watch_until(looked, pid, ask, lambda: pytest.fail("nobody is there to be killed"))
        return num_asked

    assert asyncio.run(run()) == 0
