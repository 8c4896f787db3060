"""Several workers behind one gateway: what one of them loses, another goes on with, and the client sees no seam."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest

from cluster.gateway.pool import WorkerPool
from cluster.protocol import RequestOutput, Submit
from tests.support.scripted_worker import DEADLINE_S
from tests.support.worker_team import Team
from tests.unit.gateway.conftest import Serve, Served, all_ready

pytestmark = pytest.mark.anyio

ANSWER = "Hello, wörld! 🦀"
STEPS = 5  # that the first worker makes before it is lost
LABEL = 'model_name="org/scripted"'


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def merged(response: httpx.Response, chat: bool) -> list[dict[str, Any]]:
    """A reply's choices, whole or put together from a stream, without what only one of the two has."""
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        choices = response.json()["choices"]
        return [
            {
                "text": choice["message"]["content"] if chat else choice["text"],
                "logprobs": choice["logprobs"],
                "finish": (choice["finish_reason"], choice["stop_reason"]),
                "ids": choice.get("token_ids"),
            }
            for choice in choices
        ]
    found: dict[int, dict[str, Any]] = {}
    for event in events(response.text):
        for part in event["choices"]:
            choice = found.setdefault(part["index"], {"text": "", "logprobs": None, "finish": None, "ids": None})
            choice["text"] += part["delta"].get("content", "") if chat else part["text"]
            if "token_ids" in part:
                choice["ids"] = (choice["ids"] or []) + part["token_ids"]
            for name, values in (part["logprobs"] or {}).items():
                if values is not None:
                    choice["logprobs"] = choice["logprobs"] or {}
                    choice["logprobs"][name] = choice["logprobs"].get(name, []) + values
            if part["finish_reason"] is not None:
                assert choice["finish"] is None, "an end comes once"
                choice["finish"] = (part["finish_reason"], part["stop_reason"])
    return [found[index] for index in sorted(found)]


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "completion": (False, {"return_token_ids": True}),
    "samples": (False, {"n": 3, "return_token_ids": True}),
    "prompts": (False, {"prompt": ["Hi", "Ho"], "n": 2}),
    "logprobs": (False, {"logprobs": 2}),
    "echo": (False, {"echo": True, "logprobs": 2, "return_token_ids": True}),
    "stop string": (False, {"stop": ["rld"]}),
    "stop string held": (False, {"stop": ["o, w\u00f6rld", "zzz"], "include_stop_str_in_output": True}),
    "length": (False, {"max_tokens": 9}),
    "grammar": (False, {"response_format": SCHEMA, "seed": 7}),
    "chat": (True, {"return_token_ids": True}),
    "chat samples": (True, {"n": 2, "logprobs": True, "top_logprobs": 3}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", list(CASES))
async def test_the_reply_is_the_undisturbed_one(crowd: Served, team: Team, case: str, stream: bool) -> None:
    chat, body = CASES[case]
    ask = crowd.chat if chat else crowd.complete
    undisturbed = merged(await ask(**body, stream=stream), chat)
    num_before = len(team.submits)
    team.pause_after(STEPS)
    request = asyncio.create_task(ask(**body, stream=stream))
    busy = await team.busy()
    await team.lose(busy)
    assert merged(await request, chat) == undisturbed
    num_again = len(team.submits) - num_before - len(undisturbed)
    assert num_again in ((2,) if case == "prompts" else (len(undisturbed),)), "each lost sequence came again once"
    (other,) = team.others(busy)
    assert case == "prompts" or any(again.output_ids for again in other.submits[-num_again:])
    for again in other.submits[-num_again:]:
        first = next(s for s in busy.submits if again.request_id == f"{s.request_id}.1")
        assert len(again.output_ids) <= STEPS
        assert (again.prompt_ids, again.stopping) == (first.prompt_ids, first.stopping)
        assert (again.sampling.seed, again.sampling.choice) == (first.sampling.seed, first.sampling.choice)
        assert again.sampling.grammar == first.sampling.grammar
        assert again.deadline_s is not None
        assert first.deadline_s is not None
        assert 0 < again.deadline_s < first.deadline_s
    assert await crowd.metric(f"foretoken:requests_resumed_total{{{LABEL}}}") == num_again
    assert await crowd.metric(f"foretoken:worker_lost_total{{{LABEL}}}") == 1
    assert await crowd.metric(f"foretoken:worker_up{{{LABEL}}}") == 1


@pytest.mark.parametrize("num_steps", [0, STEPS])
async def test_what_concerns_the_prompt_is_told_once(crowd: Served, team: Team, num_steps: int) -> None:
    body: dict[str, Any] = {"prompt": "x" * 130, "prompt_logprobs": 1, "max_tokens": 8}
    undisturbed = (await crowd.complete(**body)).json()
    team.pause_after(num_steps)
    request = asyncio.create_task(crowd.complete(**body))
    await team.lose(await team.busy())
    reply = (await request).json()
    assert reply["choices"] == undisturbed["choices"]
    assert reply["usage"] == undisturbed["usage"]
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 128


async def test_a_hung_worker_is_lost_when_its_lease_ends(serve: Serve, team: Team) -> None:
    lease_s = 0.8
    for worker in team.workers.values():
        worker.beat_s = 0.02
    served = await serve(endpoints=team.endpoints, pool={"lease_s": lease_s})
    pool: WorkerPool = served.app.state.gateway.pool
    await all_ready(served)
    team.pause_after(STEPS)
    request = asyncio.create_task(served.complete())
    busy = await team.busy()
    team.go_on(busy)
    first = busy.num_beats
    async with asyncio.timeout(DEADLINE_S):
        while busy.num_beats < first + 1.5 * lease_s / 0.02:
            await asyncio.sleep(0.01)
    assert (pool.num_lost, request.done()) == (0, False), "its beats keep it"
    busy.beat_s = None
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert (await request).json()["choices"][0]["text"] == ANSWER
    assert 0.5 * lease_s < loop.time() - started < 10 * lease_s
    assert (pool.num_lost, pool.num_resumed) == (1, 1)


async def test_a_worker_may_be_away_for_a_while(crowd: Served, team: Team) -> None:
    team.pause_after(STEPS)
    request = asyncio.create_task(crowd.complete())
    busy = await team.busy()
    (other,) = team.others(busy)
    await other.kill()
    await busy.kill()
    await all_ready(crowd, 0)
    assert (await crowd.http.get("/health/ready")).status_code == 503
    assert not request.done()
    team.go_on(busy)
    await other.restart("worker-9")
    assert (await request).json()["choices"][0]["text"] == ANSWER


async def test_the_deadline_ends_what_waits_for_a_worker(
    serve: Serve, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.pool.DEADLINE_GRACE_S", 0.0)
    served = await serve(endpoints=team.endpoints, request_timeout_s=1.0)
    await all_ready(served)
    team.pause_after(STEPS)
    request = asyncio.create_task(served.complete())
    for worker in [await team.busy(), *team.workers.values()]:
        await worker.kill()
    response = await request
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    for worker in team.workers.values():
        num_submits = len(worker.submits)
        await worker.restart(worker.hello.worker_id)
        assert len(worker.submits) == num_submits, "nobody waits for it"
    await all_ready(served)
    assert not team.aborts


async def test_a_client_that_leaves_while_no_worker_is_there(crowd: Served, team: Team) -> None:
    team.pause_after(STEPS)
    request = asyncio.create_task(crowd.complete())
    await team.busy()
    for worker in team.workers.values():
        await worker.kill()
    await all_ready(crowd, 0)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    assert await crowd.app.state.gateway.admission.wait_idle(DEADLINE_S)
    num_submits = len(team.submits)
    for worker in team.workers.values():
        worker.steps_left = None
        worker.gate.set()
        await worker.restart(worker.hello.worker_id)
    await all_ready(crowd)
    assert (await crowd.complete(max_tokens=1)).status_code == 200
    assert len(team.submits) == num_submits + 1


async def test_an_abort_goes_to_whoever_has_it(crowd: Served, team: Team) -> None:
    team.pause_after(STEPS)
    request = asyncio.create_task(crowd.complete())
    busy = await team.busy()
    (other,) = team.others(busy)
    await busy.kill()
    await other.wait_until(lambda: bool(other.submits) and not other.gate.is_set())
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    assert await other.wait_for_aborts() == [other.submits[-1].request_id]
    assert not busy.aborts


async def test_the_end_alone_is_still_to_come(crowd: Served, team: Team) -> None:
    """A worker that is lost between a last token and its finish."""
    ids = list(ANSWER.encode())

    def cut(submit: Submit) -> list[RequestOutput]:
        return [RequestOutput(request_id=submit.request_id, index=0, token_ids=ids, text=ANSWER)]

    for worker in team.workers.values():
        worker.raw = cut
    request = asyncio.create_task(crowd.complete(max_tokens=len(ids), stream=True))
    async with asyncio.timeout(DEADLINE_S):
        while not team.submits:
            await asyncio.sleep(0.001)
    async with asyncio.timeout(DEADLINE_S):
        while not await crowd.metric(f"foretoken:time_to_first_token_seconds_count{{{LABEL}}}"):
            await asyncio.sleep(0.001)
    busy = next(worker for worker in team.workers.values() if worker.submits)
    for worker in team.workers.values():
        worker.raw = None
    await busy.kill()
    (choice,) = merged(await request, chat=False)
    assert (choice["text"], choice["finish"]) == (ANSWER, ("length", None))
    assert team.others(busy)[0].submits[0].output_ids == tuple(ids)
