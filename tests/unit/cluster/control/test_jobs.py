from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cluster.control.jobs import Jobs

DEADLINE_S = 20.0


def _run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), DEADLINE_S))


def test_one_of_a_kind_runs_at_a_time_and_again_after_a_failure() -> None:
    async def body() -> None:
        jobs = Jobs(0.0, lambda: None)
        begun, go_on, num_runs = asyncio.Event(), asyncio.Event(), 0

        async def work() -> None:
            nonlocal num_runs
            num_runs += 1
            begun.set()
            await go_on.wait()
            raise RuntimeError("it fails")

        jobs.once(("start", "a"), work)
        await begun.wait()
        jobs.once(("start", "a"), work)
        assert jobs.named("start") == {"a"}
        go_on.set()
        while jobs.named("start"):
            await asyncio.sleep(0)
        assert (num_runs, jobs.failure) == (1, None)
        jobs.once(("start", "a"), work)
        while num_runs == 1:
            await asyncio.sleep(0)
        await jobs.cancel()

    _run(body)


def test_the_end_of_a_loop_by_an_error_is_its_owners_failure() -> None:
    async def body() -> None:
        failed = asyncio.Event()
        jobs = Jobs(0.0, failed.set)

        async def loop(error: Exception) -> None:
            raise error

        jobs.keep("first", lambda: loop(KeyError("first")))
        await failed.wait()
        jobs.keep("second", lambda: loop(KeyError("second")))
        assert repr(jobs.failure) == "KeyError('first')"
        await jobs.cancel()

    _run(body)


def test_those_of_a_kind_are_cancelled_and_others_go_on() -> None:
    async def body() -> None:
        jobs = Jobs(0.0, lambda: None)
        ended: list[str] = []

        async def wait(name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        for key in (("start", "a"), ("end", "b"), "lead"):
            jobs.once(key, lambda key=key: wait(str(key)))  # type: ignore[misc]
        await asyncio.sleep(0)
        await jobs.cancel("start")
        await jobs.cancel("lead")
        assert ended == ["('start', 'a')", "lead"]
        await jobs.cancel()
        assert len(ended) == 3

    _run(body)
