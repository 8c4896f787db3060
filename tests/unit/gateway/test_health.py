"""The health routes: what is open and cheap, and what generates a token."""

from __future__ import annotations

import asyncio

import pytest

from cluster.gateway import health
from cluster.gateway.auth import Keys, parse_admin_key, parse_keys
from cluster.protocol import EngineState, Finish, RequestOutput, Submit
from cluster.version import version
from tests.support.eventually import eventually
from tests.support.scripted_worker import ScriptedWorker
from tests.unit.gateway.conftest import Serve, Served

pytestmark = pytest.mark.anyio

KEY, ADMIN_KEY = "a-key-of-sixteen-letters", "the-key-of-an-administrator"


async def test_ping_says_what_ready_says(serve: Serve) -> None:
    served = await serve(keys=Keys.of(parse_keys(KEY, "the test"), parse_admin_key(ADMIN_KEY, "the test")))
    await served.ready()
    for method in ("GET", "POST"):
        response = await served.http.request(method, "/ping")
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
    drain = await served.http.post("/admin/drain", headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert drain.status_code == 202
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
    assert await served.metric("foretoken:request_success_total", default=0) == 0, "it is nobody's request"


async def test_the_deep_check_says_why_no_token_comes(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH_S", 0.0)
    monkeypatch.setattr(health, "DEADLINE_S", 0.1)
    worker.gate.clear()  # its engine hangs
    response = await served.http.get("/health/generate")
    assert response.status_code == 503
    assert "longer than" in response.json()["reason"]
    await worker.wait_for_aborts()
    await worker.kill()

    async def is_gone() -> bool:
        return (await served.http.get("/health/ready")).status_code == 503

    await eventually(is_gone, "whether the gateway knows that the worker is gone")
    response = await served.http.get("/health/generate")
    assert response.status_code == 503
    assert response.json()["reason"].startswith("no worker")


async def test_a_worker_that_generates_for_others_meanwhile_does_well(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH_S", 0.0)
    finish = Finish(reason="error", error_code="engine_error", error_message="no place")
    for worker_id, num_tokens, status in (
        ("worker-1", 7, 503),
        ("worker-1", 8, 200),
        ("worker-2", 1, 200),  # started anew in between
        ("worker-2", 0, 503),
    ):
        worker.state = EngineState(worker_id="worker-1", generated_tokens=7)
        after = EngineState(worker_id=worker_id, generated_tokens=num_tokens)

        def fail(submit: Submit, after: EngineState = after) -> list[RequestOutput]:
            worker.state = after
            return [RequestOutput(request_id=submit.request_id, index=0, finish=finish)]

        worker.raw = fail
        response = await served.http.get("/health/generate")
        assert response.status_code == status, (worker_id, num_tokens)
        assert response.json().get("reason") == (None if status == 200 else "no place")
