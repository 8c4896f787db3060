"""What a caller may get wrong: a clear error that names the field, and nothing reaches the worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.scripted_worker import ScriptedWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio

INVALID, UNSUPPORTED = "invalid_value", "unsupported_parameter"
LONG = {"prompt": "x" * 600}

TAG = {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": {}}]}
BOTH: list[tuple[dict[str, Any], str, str | None]] = [
    ({"temperature": -0.1}, INVALID, "temperature"),
    ({"temperature": 2.1}, INVALID, "temperature"),
    ({"temperature": True}, INVALID, "temperature"),
    ({"temperature": "1"}, INVALID, "temperature"),
    ({"top_p": 0}, INVALID, "top_p"),
    ({"top_p": 1.01}, INVALID, "top_p"),
    ({"top_k": -2}, INVALID, "top_k"),
    ({"top_k": 1.5}, INVALID, "top_k"),
    ({"min_p": 2}, INVALID, "min_p"),
    ({"typical_p": 0}, INVALID, "typical_p"),
    ({"repetition_penalty": 0}, INVALID, "repetition_penalty"),
    ({"presence_penalty": 2.5}, INVALID, "presence_penalty"),
    ({"frequency_penalty": -2.5}, INVALID, "frequency_penalty"),
    ({"n": 0}, INVALID, "n"),
    ({"n": 10**9}, INVALID, "n"),
    ({"n": 10**30}, INVALID, "n"),
    ({"n": 1.0}, INVALID, "n"),
    ({"n": True}, INVALID, "n"),
    ({"seed": 2**63}, INVALID, "seed"),
    ({"max_tokens": 0}, INVALID, "max_tokens"),
    ({"max_tokens": -1}, INVALID, "max_tokens"),
    ({"max_tokens": 2**31}, INVALID, "max_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, INVALID, "min_tokens"),
    ({"min_tokens": 5, "response_format": {"type": "json_object"}}, INVALID, "min_tokens"),
    ({"ignore_eos": True, "response_format": {"type": "json_object"}}, INVALID, "ignore_eos"),
    ({"repetition_penalty": 1e-300}, INVALID, "repetition_penalty"),
    ({"stop": ["a", ""]}, INVALID, "stop[1]"),
    ({"stop": ["a", 1]}, INVALID, "stop[1]"),
    ({"stop": ["a"] * 65}, INVALID, "stop"),
    ({"stop_token_ids": [1, 10**6]}, INVALID, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, INVALID, "stop_token_ids[0]"),
    ({"logit_bias": {"a": 1}}, INVALID, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, INVALID, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, INVALID, "logit_bias"),
    ({"logit_bias": {"1000000": 1}}, INVALID, "logit_bias"),
    ({"logit_bias": {"1": 101}}, INVALID, "logit_bias"),
    ({"logit_bias": [1]}, INVALID, "logit_bias"),
    ({"bad_words": [""]}, INVALID, "bad_words[0]"),
    ({"prompt_logprobs": 21}, INVALID, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, INVALID, "prompt_logprobs"),
    ({"stream": "yes"}, INVALID, "stream"),
    ({"stream_options": {"include_usage": True}}, INVALID, "stream_options"),
    ({"stream": True, "stream_options": {"what": 1}}, UNSUPPORTED, "stream_options.what"),
    ({"response_format": {"type": "grammar"}}, INVALID, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, INVALID, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, INVALID, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}},
        INVALID,
        "response_format.json_schema.schema",
    ),
    ({"model": 5}, INVALID, "model"),
    ({"best_of": 2}, UNSUPPORTED, "best_of"),
    ({"request_id": "mine"}, UNSUPPORTED, "request_id"),
    ({"data_parallel_rank": 0}, UNSUPPORTED, "data_parallel_rank"),
    ({"truncate_prompt_tokens": 0}, INVALID, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, INVALID, "truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, INVALID, "truncation_side"),
    ({"structured_outputs": {}}, INVALID, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, INVALID, "structured_outputs"),
    ({"structured_outputs": {"regex": 5}}, INVALID, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, INVALID, "structured_outputs.choice"),
    ({"structured_outputs": {"json": "{"}}, INVALID, "structured_outputs.json"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, INVALID, "guided_regex"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, INVALID, "guided_choice"),
    ({"guided_choice": ["a"], "ignore_eos": True}, INVALID, "ignore_eos"),
    ({"response_format": {"type": "structural_tag"}}, INVALID, "response_format.structures"),
    ({"response_format": TAG | {"triggers": ["<g"]}}, INVALID, "response_format.triggers"),
    ({"response_format": {"type": "structural_tag", "format": {}}}, UNSUPPORTED, "response_format.format"),
    ({"priority": 2**40}, INVALID, "priority"),
    ({"store": True}, UNSUPPORTED, "store"),
    ({"service_tier": "flex"}, UNSUPPORTED, "service_tier"),
    ({"temprature": 1}, UNSUPPORTED, "temprature"),
    ({"max_tokens": 512}, "context_length_exceeded", None),
    ({"min_tokens": 512}, "context_length_exceeded", None),
]
COMPLETIONS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": None}, INVALID, "prompt"),
    ({"prompt": []}, INVALID, "prompt"),
    ({"prompt": [[]]}, INVALID, "prompt"),
    ({"prompt": ["a", 1]}, INVALID, "prompt"),
    ({"prompt": [True]}, INVALID, "prompt"),
    ({"prompt": [1, 10**6]}, INVALID, "prompt"),
    ({"prompt": [-1]}, INVALID, "prompt"),
    ({"prompt": {"text": "a"}}, INVALID, "prompt"),
    ({"prompt": "", "add_special_tokens": False}, INVALID, "prompt"),
    ({"prompt": ["a"] * 20, "n": 100}, INVALID, "prompt"),
    ({"logprobs": 21}, INVALID, "logprobs"),
    ({"logprobs": True}, INVALID, "logprobs"),
    ({"suffix": "x"}, UNSUPPORTED, "suffix"),
    (LONG, "context_length_exceeded", "prompt"),
    ({"messages": []}, UNSUPPORTED, "messages"),
]
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
FILE = {"type": "file", "file": {"file_id": "https://example.org/a.pdf"}}
CHAT: list[tuple[dict[str, Any], str, str | None]] = [
    ({"messages": None}, INVALID, "messages"),
    ({"messages": []}, INVALID, "messages"),
    ({"messages": "Hi"}, INVALID, "messages"),
    ({"messages": ["Hi"]}, INVALID, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, INVALID, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, INVALID, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, INVALID, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, INVALID, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, UNSUPPORTED, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "what": 1}]}, UNSUPPORTED, "messages[0].what"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "context_length_exceeded", "messages"),
    ({"logprobs": 2}, INVALID, "logprobs"),
    ({"top_logprobs": 2}, INVALID, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, INVALID, "top_logprobs"),
    ({"max_completion_tokens": 0}, INVALID, "max_completion_tokens"),
    ({"add_generation_prompt": True, "continue_final_message": True}, INVALID, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, INVALID, "chat_template_kwargs"),
    ({"messages": [{"role": "user", "content": [AUDIO]}]}, UNSUPPORTED, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [FILE]}]}, UNSUPPORTED, "messages[0].content"),
    ({"functions": [{"name": "f"}]}, UNSUPPORTED, "functions"),
    ({"function_call": "auto"}, UNSUPPORTED, "function_call"),
    ({"prompt": "Hi"}, UNSUPPORTED, "prompt"),
]


@pytest.mark.parametrize(
    ("endpoint", "table"), [("completions", BOTH + COMPLETIONS), ("chat/completions", BOTH + CHAT)]
)
async def test_a_wrong_field_is_named(
    served: Served, worker: ScriptedWorker, endpoint: str, table: list[tuple[dict[str, Any], str, str | None]]
) -> None:
    base = {"prompt": "Hi"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    for change, code, param in table:
        response = await served.http.post(f"/v1/{endpoint}", json={"model": MODEL} | base | change)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, code), (change, error)
        assert error["type"] == "invalid_request_error"
        if param is not None:
            assert error["param"] == param, (change, error)
            assert param in error["message"] or code == "context_length_exceeded", error
    assert worker.submits == []
    assert (await served.complete(max_tokens=1)).status_code == 200


async def test_the_context_error_has_both_numbers(served: Served) -> None:
    error = (await served.complete(prompt="Hi", max_tokens=600)).json()["error"]
    assert "512" in error["message"], "what the model has"
    assert "603" in error["message"], "what was asked for"


async def test_without_max_tokens_the_rest_of_the_context_is_there(served: Served, worker: ScriptedWorker) -> None:
    await served.complete(prompt="x" * 100)
    await served.chat()
    for submit in worker.submits:
        assert submit.stopping.max_tokens == 512 - len(submit.prompt_ids)


async def test_an_operator_may_allow_fewer_choices(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(max_choices=2)
    response = await served.complete(n=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


NO_REQUESTS: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "must be a JSON object, not an array"),
    (b"null", "must be a JSON object, not null"),
    (b"1", "must be a JSON object, not a number"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (b'{"prompt": "\\ud800"}', "not valid JSON"),
    (b'{"temperature": NaN}', "temperature is NaN"),
    (b'{"temperature": -Infinity}', "temperature is -Infinity"),
    (b'{"temperature": 1e999}', "infinity"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "depth"),
    (b'{"a":' * 100_000, "depth"),
    (b"[" * 100_000, "depth"),
    (b'{"metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 201, "deeper than 128"),
    (b'{"chat_template_kwargs": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}", "deeper than 128"),
]


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
async def test_a_body_that_is_no_request(served: Served, endpoint: str) -> None:
    for body, says in NO_REQUESTS:
        response = await served.http.post(f"/v1/{endpoint}", content=body)
        assert response.status_code == 400, body[:40]
        assert says in response.json()["error"]["message"]


async def test_nan_names_its_field(served: Served) -> None:
    content = json.dumps({"model": MODEL, "prompt": "Hi", "temperature": float("nan")}).encode()
    error = (await served.http.post("/v1/completions", content=content)).json()["error"]
    assert (error["param"], error["type"]) == ("temperature", "invalid_request_error")


async def test_a_body_that_is_too_large(serve: Serve, worker: ScriptedWorker) -> None:
    served = await serve(max_body_bytes=1000)

    async def unannounced() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    for content in (b" " * 1001, unannounced()):
        response = await served.http.post("/v1/completions", content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    await served.ready()
    assert (await served.complete()).status_code == 200


async def test_a_body_that_does_not_come(serve: Serve) -> None:
    served = await serve(body_timeout_s=0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert b" 400 " in await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert await served.app.state.gateway.admission.wait_idle(5)


async def test_wrong_paths(served: Served) -> None:
    for method, path, status, code in (
        ("GET", "/v2/models", 404, "unknown_url"),
        ("POST", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/", 404, "model_not_found"),
    ):
        response = await served.http.request(method, path)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
async def test_an_unknown_model(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    prompt = {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}
    del prompt["messages" if endpoint == "/v1/completions" else "prompt"]
    response = await served.http.post(endpoint, json={"model": "org/other"} | prompt)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "org/other" in error["message"]
    assert worker.submits == []
