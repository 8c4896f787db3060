"""Clients that go away or do not read, workers that die and come back, the server's end."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from cluster.gateway import limits
from cluster.protocol import Finish, RequestOutput, Submit
from tests.support.eventually import eventually
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio

ANSWER = "Hello, wörld! 🦀"  # of the scripted worker


def output(submit: Submit, index: int, text: str, **more: Any) -> RequestOutput:
    ids = list(text.encode())
    return RequestOutput(request_id=submit.request_id, index=index, token_ids=ids, text=text, **more)


async def open_request(port: int, **body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A completion request on a socket of its own, sent whole."""
    content = json.dumps({"model": MODEL, "prompt": "Hi"} | body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


async def idle(served: Served) -> None:
    assert await served.app.state.gateway.admission.wait_idle(DEADLINE_S)


def events(text: str) -> list[Any]:
    """The events of a stream, `[DONE]` as a string."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
async def test_a_client_that_leaves_is_aborted(
    served: Served, worker: ScriptedWorker, stream: bool, half: bool, tokens: bool
) -> None:
    worker.raw = lambda submit: [output(submit, 0, "He")] if tokens else []
    reader, writer = await open_request(served.port, stream=stream, n=2)
    submits = await worker.wait_for_submits(2)
    if stream and tokens:
        await reader.readuntil(b"data: ")
    if half:
        writer.write_eof()
    else:
        writer.close()
    assert sorted(await worker.wait_for_aborts(2)) == sorted(submit.request_id for submit in submits)
    await idle(served)
    writer.close()
    assert await served.metric('foretoken:requests_aborted_total{model_name="org/scripted",reason="disconnect"}') == 2


async def test_a_client_that_leaves_before_there_is_a_worker(served: Served, worker: ScriptedWorker) -> None:
    await worker.kill()
    _, writer = await open_request(served.port)
    gateway = served.app.state.gateway
    async with asyncio.timeout(DEADLINE_S):
        while gateway.admission.num_open == 0:
            await asyncio.sleep(0.001)
    writer.close()
    await idle(served)
    await worker.restart()
    assert (await served.complete(max_tokens=1)).status_code == 200
    assert len(worker.submits) == 1


async def test_finished_choices_are_not_aborted(served: Served, worker: ScriptedWorker) -> None:
    worker.raw = lambda submit: [
        output(submit, 0, "He", finish=None if submit.sampling.choice else Finish(reason="stop"))
    ]
    reader, writer = await open_request(served.port, n=2, stream=True)
    submits = await worker.wait_for_submits(2)
    await asyncio.wait_for(reader.readuntil(b'"finish_reason":"stop"'), DEADLINE_S)
    writer.close()
    await idle(served)
    assert await worker.wait_for_aborts() == [submits[1].request_id]
    assert await served.metric('foretoken:requests_aborted_total{model_name="org/scripted",reason="disconnect"}') == 1


async def test_a_reader_that_stalls_is_cut(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(pool={"max_buffered": 8})
    await served.ready()
    worker.raw = lambda submit: [output(submit, i * 65536, "x" * 65536) for i in range(200)]
    reader, writer = await open_request(served.port, stream=True)
    assert await worker.wait_for_aborts() == [worker.submits[0].request_id]
    body = b""
    async with asyncio.timeout(DEADLINE_S):
        while b'"error"' not in body[-4096:]:
            body += await reader.read(2**20)
    assert b"[DONE]" not in body
    writer.close()
    await idle(served)
    assert await served.metric('foretoken:requests_aborted_total{model_name="org/scripted",reason="slow_reader"}') == 1


async def test_a_client_that_takes_nothing_is_cut_after_a_while(
    serve: Serve, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(send_timeout_s=0.05)
    await served.ready()
    worker.raw = lambda submit: [output(submit, i * 65536, "x" * 65536) for i in range(200)]
    reader, writer = await open_request(served.port, stream=True)
    assert await worker.wait_for_aborts() == [worker.submits[0].request_id]
    await idle(served)
    rest = await asyncio.wait_for(reader.read(), DEADLINE_S)
    assert not rest.endswith(b"\r\n0\r\n\r\n"), "a chunked body that is not whole"
    writer.close()
    assert "without completing" not in caplog.text


# ---------------------------------------------------------------------------------------------------- workers that die


async def test_a_request_goes_on_where_its_worker_died(served: Served, worker: ScriptedWorker) -> None:
    for stream in (False, True):
        worker.steps_left = 5
        worker.gate.set()
        request = asyncio.create_task(served.complete(stream=stream))
        await worker.wait_until(lambda: not worker.gate.is_set())
        await worker.kill()
        worker.steps_left = None
        worker.gate.set()
        await worker.restart()
        response = await request
        assert response.status_code == 200
        if stream:
            *parts, done = events(response.text)
            assert done == "[DONE]"
            assert "".join(part["choices"][0]["text"] for part in parts) == ANSWER
        else:
            assert response.json()["choices"][0]["text"] == ANSWER
            assert response.json()["usage"]["completion_tokens"] == len(ANSWER.encode()) + 1
        first, second = worker.submits[-2:]
        assert ANSWER.encode()[:5].startswith(bytes(second.output_ids))  # the last may have been lost on its way
        assert first.request_id != second.request_id
    assert await served.metric("foretoken:requests_resumed_total") == 2
    assert await served.metric("foretoken:worker_lost_total") == 2


async def test_a_request_that_kills_its_workers_ends(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(pool={"max_resumptions": 2})
    for stream in (False, True):
        num_submits = len(worker.submits)
        worker.steps_left = 3 if stream else 0
        worker.gate.set()
        request = asyncio.create_task(served.complete(stream=stream))
        for life in range(3):
            await worker.wait_for_submits(num_submits + life + 1)
            await worker.wait_until(lambda: not worker.gate.is_set())
            await worker.kill()
            worker.steps_left = 0
            worker.gate.set()
            await worker.restart()
        response = await request
        if stream:
            *parts, last = events(response.text)
            assert ANSWER.startswith("".join(part["choices"][0]["text"] for part in parts))
            assert last["error"]["code"] == "worker_lost"
            assert "[DONE]" not in response.text
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
        assert len(worker.submits) == num_submits + 3


async def test_new_requests_wait_for_the_next_worker(served: Served, worker: ScriptedWorker) -> None:
    await worker.kill()
    gateway = served.app.state.gateway
    async with asyncio.timeout(DEADLINE_S):
        while gateway.pool.hello is not None:
            await asyncio.sleep(0.001)
    assert (await served.http.get("/health/ready")).status_code == 503
    assert (await served.http.get("/health/startup")).status_code == 200
    assert (await served.http.get("/health/live")).status_code == 200
    assert await served.metric("foretoken:worker_up") == 0
    request = asyncio.create_task(served.complete())
    await worker.restart("worker-2")
    assert (await request).status_code == 200
    assert gateway.pool.hello.worker_id == "worker-2"
    assert (await served.http.get("/health/ready")).status_code == 200
    assert await served.metric("foretoken:worker_connections") == 2


async def test_a_request_waits_until_its_deadline_only(serve: Serve, worker: ScriptedWorker) -> None:
    await worker.kill()
    served = await serve(request_timeout_s=0.1)
    response = await served.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert (await served.http.get("/health/startup")).status_code == 503


async def test_a_worker_that_keeps_no_deadline(
    serve: Serve, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.pool.DEADLINE_GRACE_S", 0.1 - 60.0)
    served = await serve(request_timeout_s=60.0)
    await served.ready()
    worker.gate.clear()
    response = await served.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert await worker.wait_for_aborts() == [worker.submits[0].request_id]
    assert worker.submits[0].deadline_s is not None
    assert 0 < worker.submits[0].deadline_s <= 60


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("finish", "status", "code"),
    [
        (Finish(reason="error", error_code="overloaded", error_message="full"), 429, "overloaded"),
        (Finish(reason="error", error_code="invalid_grammar", error_message="too big"), 400, "invalid_grammar"),
        (Finish(reason="error", error_code="no such code", error_message="?"), 500, "engine_error"),
        (Finish(reason="abort"), 503, "unavailable"),
    ],
    ids=["overloaded", "grammar", "unknown", "abort"],
)
async def test_a_worker_that_refuses(
    served: Served, worker: ScriptedWorker, stream: bool, finish: Finish, status: int, code: str
) -> None:
    worker.raw = lambda submit: [RequestOutput(request_id=submit.request_id, index=0, finish=finish)]
    response = await served.complete(stream=stream)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert error["param"] == ("response_format" if code == "invalid_grammar" else None)


async def test_one_choice_that_fails_ends_the_others(served: Served, worker: ScriptedWorker) -> None:
    finish = Finish(reason="error", error_code="engine_error", error_message="a NaN")
    worker.raw = lambda submit: [output(submit, 0, "He", finish=finish if submit.sampling.choice else None)]
    text = (await served.complete(n=2, stream=True)).text
    assert events(text)[-1]["error"]["message"] == "a NaN"
    assert await worker.wait_for_aborts() == [worker.submits[0].request_id]


# -------------------------------------------------------------------------------------------------- order of the tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_a_duplicate_is_dropped(served: Served, worker: ScriptedWorker, stream: bool) -> None:
    worker.raw = lambda submit: [
        output(submit, 0, "ab"),
        output(submit, 0, "ab"),
        output(submit, 2, "c"),
        output(submit, 1, "b"),
        output(submit, 3, "", finish=Finish(reason="stop")),
        output(submit, 3, "d"),
    ]
    response = await served.complete(stream=stream)
    if stream:
        assert "".join(event["choices"][0]["text"] for event in events(response.text)[:-1]) == "abc"
        assert response.text.count("[DONE]") == 1
    else:
        assert response.json()["choices"][0]["text"] == "abc"
        assert response.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("index", "text"), [(3, "d"), (1, "bcd")], ids=["hole", "overlap"])
async def test_a_hole_is_an_error(served: Served, worker: ScriptedWorker, index: int, text: str) -> None:
    worker.raw = lambda submit: [output(submit, 0, "ab"), output(submit, index, text)]
    found = events((await served.complete(stream=True)).text)
    assert found[0]["choices"][0]["text"] == "ab"
    assert found[-1]["error"]["code"] == "engine_error"
    assert await worker.wait_for_aborts() == [worker.submits[0].request_id]


async def test_the_end_counts_where_its_tokens_were_there(served: Served, worker: ScriptedWorker) -> None:
    end = Finish(reason="stop", stop_reason="b")
    worker.raw = lambda submit: [output(submit, 0, "a"), output(submit, 1, "b"), output(submit, 1, "b", finish=end)]
    choice = (await served.complete()).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "b")
    worker.raw = lambda submit: [output(submit, 0, "abc"), output(submit, 0, "a", finish=end)]
    response = await served.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")


# ----------------------------------------------------------------------------------------------------- load and the end


async def test_too_many_open_requests(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(max_open_requests=1)
    await served.ready()
    worker.gate.clear()
    first = asyncio.create_task(served.complete())
    await worker.wait_for_submits()
    response = await served.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
    assert response.headers["retry-after"] == "1"
    worker.gate.set()
    assert (await first).status_code == 200
    assert (await served.complete()).status_code == 200


async def test_the_bodies_of_open_requests_have_a_bound(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", 700)
    worker.gate.clear()
    first = asyncio.create_task(served.complete(prompt="x" * 400, max_tokens=1))
    await worker.wait_for_submits()
    for _ in range(2):  # what was refused holds nothing
        response = await served.complete(prompt="x" * 400, max_tokens=1)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "overloaded")
        assert response.headers["retry-after"] == "1"
    small = asyncio.create_task(served.complete(prompt="x" * 100, max_tokens=1, stream=True))
    await worker.wait_for_submits(2)
    worker.gate.set()
    assert [(await task).status_code for task in (first, small)] == [200, 200]
    assert (await served.complete(prompt="x" * 400, max_tokens=1)).status_code == 200
    await idle(served)
    assert served.app.state.gateway.admission.held_bytes == 0


async def test_a_body_that_is_still_coming_counts(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", 1000)
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n" + b" " * 700)
    async with asyncio.timeout(DEADLINE_S):
        while served.app.state.gateway.admission.held_bytes < 700:
            await asyncio.sleep(0.001)
    assert (await served.complete(prompt="x" * 400)).status_code == 429
    writer.close()
    await idle(served)
    assert (await served.complete(prompt="x" * 400, max_tokens=1)).status_code == 200


async def test_draining_finishes_what_runs(served: Served, worker: ScriptedWorker) -> None:
    worker.gate.clear()
    running = asyncio.create_task(served.complete(stream=True))
    await worker.wait_for_submits()
    served.app.state.gateway.begin_drain()
    refused = await served.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]
    assert (await served.http.get("/health/ready")).json() == {"status": "unavailable", "reason": "draining"}
    assert (await served.http.get("/health/live")).status_code == 200
    worker.gate.set()
    assert events((await running).text)[-1] == "[DONE]"


async def test_draining_has_an_end(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(drain_timeout_s=0.05)
    await served.ready()
    worker.raw = lambda submit: [output(submit, 0, "He")]
    streamed = asyncio.create_task(served.complete(stream=True))
    whole = asyncio.create_task(served.complete())
    await worker.wait_for_submits(2)
    served.app.state.gateway.begin_drain()
    first, *_, last = events((await streamed).text)
    assert first["choices"][0]["text"] == "He"
    assert last["error"]["code"] == "draining"
    response = await whole
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    assert len(await worker.wait_for_aborts(2)) == 2


# ------------------------------------------------------------------------------------------------ ids, logs and metrics


async def test_the_request_id_goes_through(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with httpx.AsyncClient(base_url=served.base_url) as http:
        response = await http.get("/health/live", headers={"x-request-id": "abc-1.2_3"})
        assert response.headers["x-request-id"] == "abc-1.2_3"
        assert "abc-1.2_3" in caplog.text
        for wrong in ("", "a b", "x" * 129, "a;b"):
            response = await http.get("/health/live", headers={"x-request-id": wrong})
            assert response.headers["x-request-id"] not in ("", wrong)


async def test_no_text_of_a_user_is_logged(
    served: Served, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    worker.raw = lambda submit: [output(submit, 0, "sesame!"), output(submit, 9, "sesame!")]
    await served.complete(prompt="sesame", stop="sesame")
    await served.complete(prompt="sesame", temperature="sesame")
    await served.chat(messages=[{"role": "sesame", "content": "sesame"}])
    await served.complete(prompt="sesame", stream=True)
    await served.http.post("/v1/completions", content=b'{"prompt": "sesame"')
    assert "sesame" not in caplog.text


async def test_a_fault_of_ours_is_an_error_like_any_other(
    served: Served, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = "a prompt with sesame"

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr("cluster.gateway.service.make_submits", fail)
    response = await served.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
    monkeypatch.undo()
    monkeypatch.setattr("cluster.gateway.dialects.completions.CompletionEvents._output_events", fail)
    found = events((await served.complete(stream=True)).text)
    assert [event["error"]["code"] for event in found] == ["engine_error"]
    assert "RuntimeError" in caplog.text
    assert "sesame" not in caplog.text
    await idle(served)


async def test_metrics(served: Served, worker: ScriptedWorker) -> None:
    await served.complete(max_tokens=5)
    await served.chat(n=2)
    await served.complete(temperature=-1)
    label = 'model_name="org/scripted"'
    assert await served.metric(f'foretoken:request_success_total{{finished_reason="length",{label}}}') == 1
    assert await served.metric(f'foretoken:request_success_total{{finished_reason="stop",{label}}}') == 2
    assert await served.metric(f"foretoken:time_to_first_token_seconds_count{{{label}}}") == 3
    assert await served.metric(f"foretoken:inter_token_latency_seconds_count{{{label}}}") == 4 + 2 * 19
    assert await served.metric(f"foretoken:e2e_request_latency_seconds_count{{{label}}}") == 3
    assert await served.metric(f"foretoken:request_generation_tokens_sum{{{label}}}") == 5 + 2 * 20
    assert await served.metric(f'foretoken:request_errors_total{{code="invalid_value",{label}}}') == 1
    assert await served.metric(f"foretoken:num_requests_running{{{label}}}") == worker.state.num_running
    assert await served.metric(f"foretoken:generation_tokens_total{{{label}}}") == worker.state.generated_tokens
    assert await served.metric(f"foretoken:kv_cache_usage_perc{{{label}}}") == 0.25
    answered = f'foretoken:http_requests_total{{method="POST",{label},route="/v1/completions",status="400"}}'
    assert await served.metric(answered) == 1


async def test_without_a_worker_nobody_waits_longer_than_for_a_first_token(
    serve: Serve, worker: ScriptedWorker
) -> None:
    served = await serve(max_ttft_s=0.2)
    await served.ready()
    assert (await served.complete()).status_code == 200
    await worker.kill()
    await eventually(lambda: served.app.state.gateway.pool.num_alive == 0, "the worker's end")
    refused = await served.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert refused.headers["retry-after"] == "1"
