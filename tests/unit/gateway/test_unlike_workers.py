"""Workers that would compute other tokens: none gets what another began, nor, with another model, anything at all."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from cluster.gateway.pool import WorkerPool
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker
from tests.support.worker_team import Team
from tests.unit.gateway.conftest import Serve, Served, all_ready

pytestmark = pytest.mark.anyio

ANSWER = "Hello, wörld! 🦀"
STEPS = 5  # that a worker makes before it is lost
WAIT_S = 0.3


def pool_of(served: Served) -> WorkerPool:
    pool: WorkerPool = served.app.state.gateway.pool
    return pool


def differ(worker: ScriptedWorker, **changes: Any) -> None:
    """It will say so at its next start, or to who has not connected yet."""
    worker.hello = msgspec.structs.replace(worker.hello, **changes)


async def problem(served: Served) -> str | None:
    found: str | None = (await served.http.get("/cluster")).json()["problem"]
    return found


async def until_left_out(served: Served, name: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while f"worker {name} has another model" not in (pool_of(served).problem or ""):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numerics": "fast"}, "numerics 'fast' instead of 'invariant'"),
        ({"arithmetic": "AVX2"}, "arithmetic 'AVX2' instead of 'scripted'"),
        ({"checkpoint": "decaf"}, "checkpoint 'decaf' instead of 'c0ffee'"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_ends_with_what_differs(
    serve: Serve, team: Team, changes: dict[str, Any], words: str, stream: bool
) -> None:
    a, b = team.workers.values()
    served = await serve(endpoints=team.endpoints[:1], pool={"alike_timeout_s": WAIT_S})
    await all_ready(served, 1)
    differ(b, **changes)
    team.pause_after(STEPS)
    request = asyncio.create_task(served.complete(stream=stream))
    assert await team.busy() is a
    pool_of(served).set_workers(team.endpoints)
    await all_ready(served, 2)
    clock = asyncio.get_running_loop().time
    lost_s = clock()
    await team.lose(a)
    response = await request
    assert clock() - lost_s > 0.9 * WAIT_S, "one that computes the same may come"
    assert '"code":"worker_lost"' in response.text
    assert f"b has {words}" in response.text
    assert stream or response.status_code == 503
    assert not b.submits


async def test_another_one_that_is_alike_goes_on(serve: Serve, team: Team, tmp_path: Any) -> None:
    a, b = team.workers.values()
    served = await serve(endpoints=team.endpoints[:1], pool={"alike_timeout_s": 60.0})
    await all_ready(served, 1)
    differ(b, arithmetic="AVX2")
    team.pause_after(STEPS)
    request = asyncio.create_task(served.complete())
    await team.busy()
    pool_of(served).set_workers(team.endpoints)
    await all_ready(served, 2)
    await team.lose(a)
    await all_ready(served, 1)
    b_alone = asyncio.create_task(served.complete())  # what has not begun may go to it
    assert (await b_alone).json()["choices"][0]["text"] == ANSWER
    assert not request.done()
    a.steps_left = None
    a.gate.set()
    await a.restart("worker-9")
    assert (await request).json()["choices"][0]["text"] == ANSWER
    assert len(b.submits) == 1
    assert a.submits[-1].output_ids


async def test_a_pool_that_is_closed_leaves_no_timer_behind(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = team.workers.values()
    differ(b, checkpoint="decaf")
    loop = asyncio.get_running_loop()
    call_later, timers = loop.call_later, []

    def noting(delay: float, callback: Any, *args: Any, **options: Any) -> asyncio.TimerHandle:
        timer = call_later(delay, callback, *args, **options)
        if delay == 60.0:
            timers.append(timer)
        return timer

    monkeypatch.setattr(loop, "call_later", noting)
    async with asyncio.timeout(DEADLINE_S), WorkerPool(team.endpoints[:1], alike_timeout_s=60.0) as pool:
        await pool.ready(DEADLINE_S)
        pool.set_workers(team.endpoints)
        while pool.num_alive < 2:
            await asyncio.sleep(0.001)
        await a.kill()
        while pool.num_alive > 1:
            await asyncio.sleep(0.001)
        assert pool.hello is None
        assert not timers[-1].cancelled()
    assert all(timer.cancelled() for timer in timers)


async def test_in_the_fast_class_any_of_that_class_goes_on(serve: Serve, team: Team) -> None:
    a, b = team.workers.values()
    differ(a, numerics="fast")
    differ(b, numerics="fast", arithmetic="AVX2")
    served = await serve(endpoints=team.endpoints)
    await all_ready(served)
    team.pause_after(STEPS)
    request = asyncio.create_task(served.complete())
    busy = await team.busy()
    await team.lose(busy)
    assert (await request).json()["choices"][0]["text"] == ANSWER
    assert team.others(busy)[0].submits[-1].output_ids


async def test_a_worker_of_another_model_gets_nothing(
    serve: Serve, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = team.workers.values()
    served = await serve(endpoints=team.endpoints[:1])
    await all_ready(served, 1)
    assert await problem(served) is None
    differ(b, dtype="bfloat16")
    with caplog.at_level(logging.WARNING, "cluster.gateway.likeness"):
        pool_of(served).set_workers(team.endpoints)
        await until_left_out(served, "b")
        for _ in range(3):  # its connection breaks and comes back
            await b.kill()
            await all_ready(served, 1)
            await b.start()
            await all_ready(served, 2)
    told = [record.getMessage() for record in caplog.records if "another model" in record.getMessage()]
    assert told == [
        "worker b has another model than this pool and gets no new requests: dtype 'bfloat16' instead of 'float32'"
    ]
    assert await problem(served) == (
        "worker b has another model (dtype 'bfloat16' instead of 'float32'): no new requests go there"
    )
    requests = [served.complete(prompt=f"{i}" * 70) for i in range(8)]
    assert {response.status_code for response in await asyncio.gather(*requests)} == {200}
    assert (len(a.submits), len(b.submits)) == (8, 0)
    await b.kill()
    await b.restart("worker-9")
    await all_ready(served, 2)
    assert await problem(served) is None


async def test_what_most_have_takes_over_as_in_an_update(serve: Serve, team: Team) -> None:
    a, b = team.workers.values()
    served = await serve(endpoints=team.endpoints)
    await all_ready(served)
    for worker, is_taken in ((a, False), (b, True)):
        await worker.kill()
        await all_ready(served, 1)
        differ(worker, worker_id=f"{worker.hello.worker_id}-new", checkpoint="decaf")
        await worker.start()
        await all_ready(served, 2)
        assert (await problem(served) is None) == is_taken
        assert (await served.complete(max_tokens=1)).status_code == 200
        assert len(b.submits) == 1 or is_taken


async def test_another_model_waits_for_its_turn(serve: Serve, team: Team) -> None:
    """Where all workers of the model have gone, those of another one get requests after a while, not at once."""
    a, b = team.workers.values()
    served = await serve(endpoints=team.endpoints[:1], pool={"alike_timeout_s": 1.0})
    await all_ready(served, 1)
    differ(b, checkpoint="decaf")
    pool_of(served).set_workers(team.endpoints)
    await until_left_out(served, "b")
    clock = asyncio.get_running_loop().time
    gone_s = clock()
    await a.kill()
    await all_ready(served, 1)
    response = await served.http.get("/health/ready")
    assert (response.status_code, "another model" in response.text) == (503, True)
    assert (await served.complete()).json()["choices"][0]["text"] == ANSWER
    assert clock() - gone_s >= 0.95
    assert (len(a.submits), len(b.submits)) == (0, 1)
    assert await problem(served) is None
