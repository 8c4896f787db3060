"""Who is in the pool, who gets a request, and who is asked no more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cluster.errors import WorkerLostError
from cluster.gateway.generation import Unobserved
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.protocol import Finish, RequestOutput, Submit
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, hello, say
from tests.support.worker_team import Team
from tests.unit.gateway.conftest import Serve, Served, all_ready

pytestmark = pytest.mark.anyio

ANSWER = "Hello, wörld! 🦀"
STEPS = 5  # that a worker makes before it is lost
LABEL = 'model_name="org/scripted"'


# ------------------------------------------------------------------------------------------------------ who is draining


DRAINING = Finish(reason="error", error_code="draining", error_message="the server is shutting down")


def refuse(submit: Submit) -> list[RequestOutput]:
    return [RequestOutput(request_id=submit.request_id, index=0, finish=DRAINING)]


@pytest.mark.parametrize("n", [1, 3])
async def test_what_a_draining_worker_refuses_goes_to_another(crowd: Served, team: Team, n: int) -> None:
    first = await crowd.complete(max_tokens=1)
    assert first.status_code == 200
    draining = next(worker for worker in team.workers.values() if worker.submits)
    (other,) = team.others(draining)
    draining.raw = refuse
    response = await crowd.complete(n=n)
    assert [choice["text"] for choice in response.json()["choices"]] == [ANSWER] * n
    assert len({submit.group for submit in other.submits}) == 1
    assert (await crowd.complete()).status_code == 200
    assert len(draining.submits) == 1 + n, "it is asked no more"
    assert await crowd.metric(f"foretoken:requests_resumed_total{{{LABEL}}}") == 0


async def test_a_refusal_reaches_the_client_where_all_drain(crowd: Served, team: Team) -> None:
    for worker in team.workers.values():
        worker.raw = refuse
    response = await crowd.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert len(team.submits) == 2


async def test_a_refusal_where_nobody_starts_a_worker_again_leaves_the_connection(
    crowd: Served, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    crowd.app.state.gateway.pool.stop_resuming()
    for worker in team.workers.values():
        worker.raw = refuse
    response = await crowd.complete()
    assert response.status_code == 503
    assert "failed" not in caplog.text
    assert crowd.app.state.gateway.pool.num_lost == 0


async def test_a_reply_that_has_begun_is_not_refused(crowd: Served, team: Team) -> None:
    team.pause_after(STEPS)
    request = asyncio.create_task(crowd.complete())
    busy = await team.busy()
    (other,) = team.others(busy)
    other.raw = refuse
    await team.lose(busy)
    await other.wait_for_submits()
    await other.kill()
    other.raw = None
    await other.restart("worker-9")
    assert (await request).json()["choices"][0]["text"] == ANSWER


# -------------------------------------------------------------------------------------------------- who is in the pool


async def test_the_workers_may_change(serve: Serve, team: Team, tmp_path: Path) -> None:
    a, b = team.workers.values()
    served = await serve(endpoints=team.endpoints[:1])
    await all_ready(served, 1)
    pool: WorkerPool = served.app.state.gateway.pool
    a.steps_left = STEPS
    running = asyncio.create_task(served.complete())
    await team.busy()
    pool.set_workers(team.endpoints[1:])
    await all_ready(served, 1)
    assert (await served.complete()).status_code == 200
    assert (len(a.submits), len(b.submits)) == (1, 1)
    a.steps_left = None
    a.gate.set()
    assert (await running).json()["choices"][0]["text"] == ANSWER
    assert len(b.submits) == 1, "what ran on the worker that left was finished there"
    pool.set_workers([])
    async with asyncio.timeout(DEADLINE_S):
        while a.num_streams or b.num_streams:
            await asyncio.sleep(0.001)
    late = asyncio.create_task(served.complete())
    pool.set_workers(team.endpoints)
    assert (await late).status_code == 200


async def test_a_worker_that_left_and_dies_is_replaced(serve: Serve, team: Team) -> None:
    a, b = team.workers.values()
    served = await serve(endpoints=team.endpoints[:1])
    await all_ready(served, 1)
    a.steps_left = STEPS
    running = asyncio.create_task(served.complete())
    await team.busy()
    served.app.state.gateway.pool.set_workers(team.endpoints[1:])
    await a.kill()
    assert (await running).json()["choices"][0]["text"] == ANSWER
    assert len(b.submits) == 1


async def test_a_worker_of_another_version_is_refused(tmp_path: Path) -> None:
    worker = ScriptedWorker(f"unix:{tmp_path}/worker.sock")
    worker.hello = hello(version=99)
    await worker.start()
    async with WorkerPool([Endpoint("worker", worker.address)], reconnect_delay_s=0.01) as pool:
        async with asyncio.timeout(DEADLINE_S):
            while "version 99" not in pool.last_failure:
                await asyncio.sleep(0.001)
        assert pool.hello is None
        await worker.kill()
        worker.hello = hello()
        await worker.start()
        assert (await pool.ready(DEADLINE_S)).worker_id == "worker-1"
    await worker.kill()


async def test_only_the_process_that_is_meant_is_taken(team: Team) -> None:
    a = team.workers["a"]
    async with WorkerPool([Endpoint("a", a.address, "worker-z")], reconnect_delay_s=0.01) as pool:
        async with asyncio.timeout(DEADLINE_S):
            while "worker-a answers there" not in pool.last_failure:
                await asyncio.sleep(0.001)
        assert pool.hello is None
        pool.set_workers([Endpoint("a", a.address, "worker-a")])
        assert (await pool.ready(DEADLINE_S)).worker_id == "worker-a"


@pytest.mark.parametrize("token", [None, "wrong"])
async def test_a_worker_with_a_token_wants_it(team: Team, token: str | None, caplog: pytest.LogCaptureFixture) -> None:
    a = team.workers["a"]
    a.token = "right"
    async with WorkerPool([Endpoint("a", a.address)], token=token, reconnect_delay_s=0.01) as pool:
        async with asyncio.timeout(DEADLINE_S):
            while "no valid token" not in pool.last_failure:
                await asyncio.sleep(0.001)
        assert pool.hello is None
    async with WorkerPool([Endpoint("a", a.address)], token="right") as pool:
        await pool.ready(DEADLINE_S)
        assert "a" in await pool.states(DEADLINE_S)
    assert "right" not in caplog.text


async def test_requests_that_begin_alike_go_together_and_others_spread(crowd: Served, team: Team) -> None:
    for _ in range(4):
        assert (await crowd.complete(prompt="y" * 100, max_tokens=2)).status_code == 200
    assert sorted(len(worker.submits) for worker in team.workers.values()) == [0, 4]
    team.pause_after(0)
    requests = [asyncio.create_task(crowd.complete(prompt=f"{i}", n=2)) for i in range(4)]
    async with asyncio.timeout(DEADLINE_S):
        while len(team.submits) < 4 + 8:
            await asyncio.sleep(0.001)
    assert all(len(worker.submits) >= 4 for worker in team.workers.values())
    for worker in team.workers.values():
        groups = {submit.group for submit in worker.submits if submit.group}
        assert all(sum(submit.group == group for submit in worker.submits) == 2 for group in groups)
        worker.steps_left = None
        worker.gate.set()
    assert {response.status_code for response in await asyncio.gather(*requests)} == {200}


async def test_a_killer_ends_alone(serve: Serve, team: Team) -> None:
    """A prompt that ends every worker that takes it fails in the end; the others go on and finish."""
    served = await serve(endpoints=team.endpoints, pool={"max_resumptions": 3})
    await all_ready(served)
    team.pause_after(2)
    innocent = asyncio.create_task(served.complete(prompt="good"))
    await team.busy()
    kills: list[Awaitable[None]] = []

    def answer(worker: ScriptedWorker) -> Callable[[Submit], list[int]]:
        def reply(submit: Submit) -> list[int]:
            if b"bad" in bytes(submit.prompt_ids[1:]):
                worker.gate.clear()  # it dies before it can say a thing
                kills.append(asyncio.ensure_future(end(worker)))
            return say(ANSWER)(submit)

        return reply

    async def end(worker: ScriptedWorker) -> None:
        await worker.kill()
        worker.gate.set()
        await worker.restart(worker.hello.worker_id)

    for worker in team.workers.values():
        worker.answer = answer(worker)
        worker.steps_left = None
    bad = asyncio.create_task(served.complete(prompt="bad", max_tokens=50))
    response = await bad
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
    await asyncio.gather(*kills)
    assert len(kills) == 4
    for worker in team.workers.values():
        worker.gate.set()
    assert (await innocent).json()["choices"][0]["text"] == ANSWER


async def test_nothing_waits_where_nobody_starts_a_worker_again(serve: Serve, team: Team) -> None:
    served = await serve(endpoints=team.endpoints[:1], pool={"max_resumptions": 0})
    await all_ready(served, 1)
    pool: WorkerPool = served.app.state.gateway.pool
    a = team.workers["a"]
    a.steps_left = STEPS
    request = asyncio.create_task(served.complete())
    await team.busy()
    await a.kill()
    response = await request
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
    with (
        pool.submit(a.submits[:1], timeout_s=60.0, observer=Unobserved()) as generation,
        pytest.raises(WorkerLostError),
    ):
        await generation.read()
