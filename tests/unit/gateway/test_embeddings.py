"""`POST /v1/embeddings`: what comes back for an input, what is refused, and how a request ends early."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import struct
from typing import Any

import httpx
import openai
import pytest

from cluster.gateway import embeddings
from cluster.gateway.auth import Keys, parse_keys
from cluster.protocol import Finish, RequestOutput, Submit
from tests.support.eventually import eventually
from tests.support.scripted_worker import BEGIN_ID, VOCAB_SIZE, ScriptedWorker, text_ids
from tests.support.worker_team import Team
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio

KEY, OTHER_KEY = "a-key-of-sixteen-letters", "another-key-of-sixteen-letters"


async def embed(served: Served, given: Any, **body: Any) -> httpx.Response:
    return await served.http.post("/v1/embeddings", json={"model": MODEL, "input": given} | body)


def vector(ids: list[int]) -> list[float]:
    return [1.0, float(len(ids)), float(ids[-1]), -0.5]


async def test_every_form_of_an_input(served: Served, worker: ScriptedWorker) -> None:
    hi, yo = [BEGIN_ID, *text_ids("Hi")], [BEGIN_ID, *text_ids("Yo!")]
    for given, prompts in (
        ("Hi", [hi]),
        (["Hi", "Yo!"], [hi, yo]),
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8, 9], [4]], [[7, 8, 9], [4]]),
    ):
        worker.submits.clear()
        reply = (await embed(served, given)).json()
        assert reply["object"] == "list"
        assert reply["model"] == MODEL
        assert [item["object"] for item in reply["data"]] == ["embedding"] * len(prompts)
        assert [item["index"] for item in reply["data"]] == list(range(len(prompts)))
        assert [item["embedding"] for item in reply["data"]] == [vector(ids) for ids in prompts]
        num_tokens = sum(map(len, prompts))
        assert reply["usage"]["prompt_tokens"] == reply["usage"]["total_tokens"] == num_tokens
        assert [list(submit.prompt_ids) for submit in worker.submits] == prompts
        assert {(submit.pooling, submit.stopping.max_tokens) for submit in worker.submits} == {("last", 0)}
    reply = (await embed(served, "Hi", pooling="mean", add_special_tokens=False)).json()
    assert reply["data"][0]["embedding"] == [1.0, 2.0, 0.0, -0.5]
    reply = (await embed(served, "x" * 130)).json()
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 128}
    reply = (await embed(served, [7, 8], encoding_format="base64")).json()
    assert struct.unpack("<4f", base64.b64decode(reply["data"][0]["embedding"])) == (1.0, 2.0, 8.0, -0.5)
    assert await served.metric('foretoken:request_success_total{finished_reason="stop"') == 9


@pytest.mark.needs("openai")
async def test_openais_client(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
        found = await client.embeddings.create(model=MODEL, input=["Hi", "Yo!"])  # asks for base64, and decodes it
        assert [item.embedding for item in found.data] == [[1.0, 3.0, 105.0, -0.5], [1.0, 4.0, 33.0, -0.5]]
        floats = await client.embeddings.create(model=MODEL, input=["Hi", "Yo!"], encoding_format="float", user="u")
        assert floats.data == found.data
        assert (floats.usage.prompt_tokens, floats.usage.total_tokens) == (7, 7)
        coded = await client.embeddings.create(model=MODEL, input="Hi", encoding_format="base64")
        assert coded.data[0].embedding == base64.b64encode(struct.pack("<4f", 1.0, 3.0, 105.0, -0.5)).decode()
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            await client.embeddings.create(model=MODEL, input="Hi", dimensions=2)
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="another", input="Hi")


async def test_what_is_refused_names_its_field(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "MAX_TOKENS", 1000)
    longest = worker.hello.max_model_len
    for given, code in (
        ("", "invalid_value"),
        ([], "invalid_value"),
        (["Hi", ""], "invalid_value"),
        ([[1], []], "invalid_value"),
        (["Hi", [1]], "invalid_value"),
        ([1.5], "invalid_value"),
        ({"text": "Hi"}, "invalid_value"),
        ([[1]] * (embeddings.MAX_INPUTS + 1), "invalid_value"),
        ([VOCAB_SIZE], "invalid_value"),
        ([[1], [-1]], "invalid_value"),
        ([[1] * 500] * 3, "invalid_value"),  # of too many tokens together
        ([[1], [1] * (longest + 1)], "context_length_exceeded"),
        ("x" * longest, "context_length_exceeded"),  # with the token that begins every text
        ("x" * 2**20, "context_length_exceeded"),
    ):
        response = await embed(served, given)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, code, "input"), given
    assert (await embed(served, [1] * longest)).status_code == 200, "as long as the context"
    response = await served.http.post("/v1/embeddings", json={"model": MODEL})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")
    assert len(worker.submits) == 1


async def test_many_inputs_leave_room_for_others(served: Served, worker: ScriptedWorker) -> None:
    num = 2 * embeddings.WAVE + 5
    worker.gate.clear()
    task = asyncio.create_task(embed(served, [[n % 256, n // 256] for n in range(num)]))
    await worker.wait_until(lambda: worker.num_running == embeddings.WAVE)
    worker.gate.set()
    reply = (await task).json()
    assert [item["embedding"][2] for item in reply["data"]] == [n // 256 for n in range(num)]
    assert len(worker.submits) == num
    assert served.app.state.gateway.admission.held_bytes == 0


async def test_replies_that_would_hold_too_much_memory_are_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.limits.MAX_HELD_BYTES", 2000)
    response = await embed(served, [[1]] * 100)
    assert response.status_code == 429
    assert served.app.state.gateway.admission.held_bytes == 0


async def test_a_client_that_leaves_ends_its_inputs(served: Served, worker: ScriptedWorker) -> None:
    worker.gate.clear()
    task = asyncio.create_task(embed(served, ["Hi", "Yo!"]))
    await worker.wait_for_submits(2)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert sorted(await worker.wait_for_aborts(2)) == sorted(submit.request_id for submit in worker.submits)
    assert await served.metric('foretoken:requests_aborted_total{model_name="org/scripted",reason="disconnect"}') == 2


async def test_an_administrator_ends_them_too(served: Served, worker: ScriptedWorker) -> None:
    worker.gate.clear()
    task = asyncio.create_task(embed(served, "Hi"))
    await worker.wait_for_submits()
    (listed,) = (await served.http.get("/admin/requests")).json()["data"]
    assert listed["prompt_tokens"] == 3
    assert listed["held_bytes"] == len(b'{"model":"org/scripted","input":"Hi"}')
    assert (await served.http.post(f"/admin/requests/{listed['id']}/abort")).status_code == 200
    assert (await task).json()["error"]["code"] == "request_aborted"
    await worker.wait_for_aborts()


async def test_the_deadline_and_a_workers_own_error(serve: Serve, served: Served, worker: ScriptedWorker) -> None:
    worker.raw = lambda submit: [failed(submit)]
    response = await embed(served, "Hi")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
    worker.raw = lambda submit: []
    hasty = await serve(request_timeout_s=0.2)
    response = await embed(hasty, "Hi")
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


def failed(submit: Submit) -> RequestOutput:
    finish = Finish(reason="error", error_code="engine_error", error_message="no direction")
    return RequestOutput(request_id=submit.request_id, index=0, finish=finish)


async def test_a_worker_that_dies_is_replaced(crowd: Served, team: Team) -> None:
    for worker in team.workers.values():
        worker.gate.clear()
    task = asyncio.create_task(embed(crowd, [[n] for n in range(6)]))
    workers = list(team.workers.values())
    await eventually(lambda: sum(worker.num_running for worker in workers) == 6, "six inputs at the workers")
    victim = max(workers, key=lambda worker: worker.num_running)
    await victim.kill()
    for worker in workers:
        worker.gate.set()
    reply = (await task).json()
    assert [item["embedding"] for item in reply["data"]] == [vector([n]) for n in range(6)]


async def test_a_first_wave_that_would_wait_for_too_long_is_refused(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(max_ttft_s=1.0)
    await served.ready()
    assert (await embed(served, [1])).status_code == 200
    worker.gate.clear()
    before = [asyncio.create_task(embed(served, [[n] * 500 for n in range(8)]))]
    await worker.wait_for_submits(9)
    refused = await embed(served, [[n] * 50 for n in range(64)])
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert len(worker.submits) == 9
    worker.gate.set()
    assert [(await task).status_code for task in before] == [200]
    assert await served.metric("foretoken:request_prompt_tokens_count") == 2, "what was refused has no prompt"


async def test_a_tenant_finds_no_others_pages(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(keys=Keys.of(parse_keys(f"a:{KEY}\nb:{OTHER_KEY}", "the test"), None))
    await served.ready()
    for key in (KEY, OTHER_KEY):
        served.http.headers["authorization"] = f"Bearer {key}"
        assert (await embed(served, "Hi", cache_salt="mine")).status_code == 200
    assert [submit.cache_salt for submit in worker.submits] == ["a\0mine", "b\0mine"]
    del served.http.headers["authorization"]
    assert (await embed(served, "Hi")).status_code == 401
