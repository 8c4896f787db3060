"""A real worker with the demo model under a mixed load: what it tells of its times, and predictions that hold."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.control.model import DEMO_PATH
from cluster.gateway.pool import Endpoint, WorkerPool
from tests.support.worker_process import RunningWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = [pytest.mark.anyio, pytest.mark.needs("demo")]

START_S = 120.0
NUM_USERS, NUM_REQUESTS = 6, 36
MAX_MEDIAN_ERROR = 10.0  # how small it is, is for a bench: this machine has other things to do


async def test_predictions_of_a_real_worker_under_a_mixed_load(serve: Serve) -> None:
    with tempfile.TemporaryDirectory() as folder, RunningWorker(DEMO_PATH, Path(folder)) as worker:
        served = await serve(endpoints=[Endpoint("a", worker.address)], model_path=DEMO_PATH)
        pool: WorkerPool = served.app.state.gateway.pool
        hello = await pool.ready(START_S)
        assert hello.token_budget > 0
        assert hello.max_num_seqs > 0
        assert 0 < hello.startup_s < START_S
        errors = await errors_of(served)
        assert len(errors) == NUM_REQUESTS
        assert statistics.median(errors) < MAX_MEDIAN_ERROR
        labels = f'{{model_name="{MODEL}"}}'
        name = "foretoken:ttft_prediction_error_ratio"
        assert await served.metric(f"{name}_count{labels}") == NUM_REQUESTS
        near = f'{name}_bucket{{le="{MAX_MEDIAN_ERROR}",model_name="{MODEL}"}}'
        assert await served.metric(near) > NUM_REQUESTS / 2
        for part in ("queue", "prefill", "decode"):
            assert await served.metric(f"foretoken:request_{part}_time_seconds_count{labels}") == NUM_REQUESTS
        prefill_s = await served.metric(f"foretoken:request_prefill_time_seconds_sum{labels}")
        queue_s = await served.metric(f"foretoken:request_queue_time_seconds_sum{labels}")
        ttft_s = await served.metric(f"foretoken:time_to_first_token_seconds_sum{labels}")
        assert prefill_s > 0
        assert queue_s >= 0
        assert queue_s + prefill_s < ttft_s
        steps = await served.metric(f"foretoken:engine_steps_total{labels}")
        assert await served.metric(f"foretoken:iteration_tokens_total_count{labels}") == steps > 0
        assert await served.metric("foretoken:prompt_tokens_ahead") == 0


async def errors_of(served: Served) -> list[float]:
    """|predicted - real| / real time to first token of each request of a few users."""
    draw = random.Random(5)
    bodies: list[dict[str, Any]] = [
        {
            "model": MODEL,
            "prompt": "walnut tree " * draw.choice([2, 20, 100]),
            "max_tokens": draw.choice([2, 8, 16]),
            "ignore_eos": True,
            "stream": True,
        }
        for _ in range(NUM_REQUESTS)
    ]
    errors: list[float] = []

    async def user() -> None:
        while bodies:
            began = time.perf_counter()
            async with served.http.stream("POST", "/v1/completions", json=bodies.pop()) as reply:
                assert reply.status_code == 200
                predicted_s = float(reply.headers["x-foretoken-predicted-ttft-ms"]) / 1e3
                chunks = reply.aiter_bytes()
                await anext(chunks)
                real_s = time.perf_counter() - began
                errors.append(abs(predicted_s - real_s) / real_s)
                async for _ in chunks:
                    pass

    await asyncio.gather(*(user() for _ in range(NUM_USERS)))
    return errors
