"""Two real workers with the demo model: one hangs or is killed in mid-stream, and the tokens are the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cluster.control.model import DEMO_PATH
from cluster.gateway.pool import Endpoint, WorkerPool
from tests.support.worker_process import RunningWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = [pytest.mark.anyio, pytest.mark.needs("demo")]

START_S = 120.0
TOKEN = "a-token"
REQUEST = {
    "prompt": "Once upon a time there was a",
    "seed": 11,
    "temperature": 0.9,
    "max_tokens": 120,
    "ignore_eos": True,
    "logprobs": 2,
    "presence_penalty": 0.5,
    "return_token_ids": True,
    "stream": True,
}
BEFORE_THE_BLOW = 10  # tokens


async def generate(served: Served, pool: WorkerPool, blow: Any = None) -> tuple[list[int], str, list[float]]:
    """Token ids, text and log probabilities; `blow` is called with the busy worker's name in mid-stream."""
    ids: list[int] = []
    text, logprobs = "", []
    async with served.http.stream("POST", "/v1/completions", json={"model": MODEL} | REQUEST) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            ids += choice["token_ids"]
            text += choice["text"]
            logprobs += choice["logprobs"]["token_logprobs"]
            if blow is not None and len(ids) >= BEFORE_THE_BLOW:
                busy = [name for name, state in (await pool.states(5.0)).items() if state.num_running]
                assert len(busy) == 1, "it still runs"
                blow(busy[0])
                blow = None
    assert blow is None
    return ids, text, logprobs


async def test_a_real_worker_that_hangs_or_dies(serve: Serve) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = {
            name: stack.enter_context(RunningWorker(DEMO_PATH, folder, name, token=TOKEN)) for name in ("a", "b")
        }
        served = await serve(
            endpoints=[Endpoint(name, worker.address) for name, worker in workers.items()],
            model_path=DEMO_PATH,
            pool={"token": TOKEN, "lease_s": 1.0},
        )
        pool: WorkerPool = served.app.state.gateway.pool

        async def all_there() -> None:
            async with asyncio.timeout(START_S):
                while pool.num_alive < 2:
                    await asyncio.sleep(0.01)

        await all_there()
        undisturbed = await generate(served, pool)
        assert len(undisturbed[0]) == REQUEST["max_tokens"]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            hit: list[str] = []

            def blow(name: str, number: int = number, hit: list[str] = hit) -> None:
                hit.append(name)
                os.kill(workers[name].process.pid, number)

            assert await generate(served, pool, blow) == undisturbed
            assert pool.num_lost == pool.num_resumed == (1 if number == signal.SIGSTOP else 2)
            if number == signal.SIGSTOP:
                workers[hit[0]].process.send_signal(signal.SIGCONT)
                await all_there()
        assert pool.num_alive == 1
        (left,) = (await pool.states(5.0)).values()
        assert (left.num_running, left.pages_free) == (0, left.pages_total)
