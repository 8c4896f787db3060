"""The health routes: what is open and cheap, and what generates a token."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import WorkerLostError
from cluster.gateway import health
from cluster.gateway.auth import Keys, parse_keys
from cluster.protocol import EngineState
from cluster.version import version
from tests.support.scripted_worker import ScriptedWorker
from tests.unit.gateway.conftest import Serve, Served

pytestmark = pytest.mark.anyio

KEY = "a-key-of-sixteen-letters"


async def test_ping_says_what_ready_says(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=Keys.of(parse_keys(KEY, "the test"), None))
    await served.ready()
    for method in ("GET", "POST"):
        response = await served.http.request(method, "/ping")
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
    served.app.state.gateway.admission.draining = True
    for path in ("/ping", "/health", "/health/ready"):
        response = await served.http.get(path)
        assert (response.status_code, response.json()["reason"]) == (503, "draining")
    assert (await served.http.get("/health/live")).status_code == 200


async def test_version_and_the_deep_check_need_a_key(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=Keys.of(parse_keys(KEY, "the test"), None))
    await served.ready()
    for path in ("/version", "/health/generate", "/health_generate"):
        assert (await served.http.get(path)).status_code == 401
    assert worker.submits == []
    served.http.headers["authorization"] = f"Bearer {KEY}"
    assert (await served.http.get("/version")).json() == {"version": version()}
    assert (await served.http.get("/health_generate")).json() == {"status": "ok"}


async def test_the_deep_check_generates_one_token_for_all_who_ask(served: Served, worker: ScriptedWorker) -> None:
    worker.gate.clear()
    asked = [asyncio.create_task(served.http.get("/health/generate")) for _ in range(5)]
    (submit,) = await worker.wait_for_submits()
    assert (len(submit.prompt_ids), submit.stopping.max_tokens, submit.priority) == (1, 1, -(2**31))
    worker.gate.set()
    for task in asked:
        assert (await task).json() == {"status": "ok"}
    assert len(worker.submits) == 1
    assert await served.metric("foretoken:request_success_total") == 0, "it is nobody's request"


async def test_the_deep_check_says_why_no_token_comes(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH_S", 0.0)
    gateway = served.app.state.gateway
    served.app.state.generation_check = health.GenerationCheck(gateway, deadline_s=0.1)
    worker.gate.clear()  # its engine hangs
    response = await served.http.get("/health/generate")
    assert response.status_code == 503
    assert "longer than" in response.json()["reason"]
    await worker.wait_for_aborts()

    counts = iter(range(1, 10))  # it is busy with others' requests

    async def states(_: float) -> dict[str, EngineState]:
        return {"worker": EngineState(worker_id="worker-1", generated_tokens=next(counts))}

    monkeypatch.setattr(gateway.pool, "states", states)
    assert (await served.http.get("/health/generate")).status_code == 200
    await worker.kill()
    async with asyncio.timeout(20):
        while gateway.pool.num_alive:
            await asyncio.sleep(0.001)
    response = await served.http.get("/health/generate")
    assert response.status_code == 503
    assert response.json()["reason"].startswith("no worker")
    gateway.pool.fail(WorkerLostError("it does not start"))


def test_whether_anything_was_generated() -> None:
    def states(worker_id: str, num_tokens: int) -> dict[str, EngineState]:
        return {"a": EngineState(worker_id=worker_id, generated_tokens=num_tokens)}

    assert not health._has_generated({}, {})
    assert not health._has_generated(states("1", 5), states("1", 5))
    assert health._has_generated(states("1", 5), states("1", 6))
    assert health._has_generated(states("1", 5), states("2", 1))  # started anew in between
    assert not health._has_generated(states("1", 5), states("2", 0))
    assert not health._has_generated(states("1", 5), {})
