"""The API through OpenAI's own client, over a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.support.scripted_worker import END_ID, ScriptedWorker, say, text_ids
from tests.unit.gateway.conftest import MODEL, Served

pytestmark = [pytest.mark.anyio, pytest.mark.needs("openai")]

TEXT = "Hello, wörld! 🦀"
CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chat(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    reply = await client.chat.completions.create(model=MODEL, messages=CHAT)
    assert reply.object == "chat.completion"
    assert reply.model == MODEL
    assert [choice.index for choice in reply.choices] == [0]
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].message.content == TEXT
    assert reply.choices[0].finish_reason == "stop"
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert b"".join(bytes([token]) for token in worker.submits[0].prompt_ids if token < 256) == (
        prompt.replace("<|im_start|>", "").replace("<|im_end|>", "").encode()
    )
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(worker.submits[0].prompt_ids)
    assert reply.usage.completion_tokens == len(text_ids(TEXT)) + 1
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text_ids(TEXT)) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_completion(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="Hi", max_tokens=5)
    assert (reply.object, reply.choices[0].text, reply.choices[0].finish_reason) == (
        "text_completion",
        "Hello",
        "length",
    )


async def test_completion_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model=MODEL, prompt="Hi", stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


async def test_cached_prompt_tokens_are_reported(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="a" * 130, max_tokens=1, n=2)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 131
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 128


@pytest.mark.parametrize("stream", [False, True])
async def test_samples_of_several_prompts(client: openai.AsyncOpenAI, worker: ScriptedWorker, stream: bool) -> None:
    worker.answer = lambda submit: [*submit.prompt_ids[1:], ord("0") + submit.sampling.choice, END_ID]
    reply = await client.completions.create(model=MODEL, prompt=["ab", "cd"], n=2, seed=7, stream=stream)
    texts = ["", "", "", ""]
    finishes = []
    for chunk in [part async for part in reply] if stream else [reply]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes += [choice.index] if choice.finish_reason else []
    assert texts == ["ab0", "ab1", "cd0", "cd1"]
    assert sorted(finishes) == [0, 1, 2, 3]
    assert {submit.sampling.seed for submit in worker.submits} == {7}
    groups = [submit.group for submit in worker.submits]
    assert groups[0] == groups[1] != groups[2] == groups[3]


async def test_chat_logprobs(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    worker.answer = say("ö")
    for stream in (False, True):
        reply = await client.chat.completions.create(
            model=MODEL, messages=CHAT, logprobs=True, top_logprobs=2, max_tokens=2, stream=stream
        )
        parts = [part async for part in reply] if stream else [reply]
        content = [item for part in parts if part.choices[0].logprobs for item in part.choices[0].logprobs.content]
        assert [item.bytes for item in content] == [[0xC3], [0xB6]], "a token that is no whole character has its bytes"
        assert [item.logprob for item in content] == [-1.0, -1.0]
        assert [[top.token for top in item.top_logprobs] for item in content] == [["!", "\ufffd"]] * 2


async def test_chat_logprobs_without_alternatives(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model=MODEL, messages=CHAT, logprobs=True, max_tokens=1)
    assert reply.choices[0].logprobs is not None
    assert reply.choices[0].logprobs.content is not None
    assert reply.choices[0].logprobs.content[0].top_logprobs == []


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_errors_reach_the_client_typed(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=CHAT, temperature=-1)
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "invalid_value",
        "temperature",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=CHAT)
    assert missing.value.code == "model_not_found"


async def test_structured_output(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    worker.answer = say('{"a":1}')
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=CHAT,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
    )
    assert reply.choices[0].message.content == '{"a":1}'
    grammar = worker.submits[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source) == (
        "json_schema",
        '{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}',
    )


async def test_tokens_asked_for_by_bytes_and_ids(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(
        model=MODEL, prompt=[72, 105], max_tokens=2, extra_body={"return_token_ids": True}
    )
    choice = reply.choices[0].to_dict()
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([72, 105], [72, 101])
