"""What every user of such an API expects, row by row: a request, and what its reply must be.

A row is honoured where all that it checks holds. Where a model cannot do a thing, the right reply is a refusal that
names the field.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from loadtests.api_client import ApiClient, Reply
from loadtests.processes import BenchError

LEAVE_TIMEOUT_S = 20.0
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    },
}
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "maximum": 9}},
    "required": ["age"],
    "additionalProperties": False,
}


class NotHonouredError(Exception):
    """A row's reply is not what its users expect."""


Check = Callable[[ApiClient], Awaitable[None]]


@dataclass(frozen=True)
class ApiRow:
    name: str
    check: Check


async def honoured(api: ApiClient, expected: ApiRow) -> str:
    """ "" where a row is honoured, else why it is not."""
    try:
        await expected.check(api)
    except (NotHonouredError, BenchError) as error:
        return f"{expected.name}: {error}"
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return f"{expected.name}: the reply has another shape ({error!r})"
    return ""


def need(holds: object, words: str) -> None:
    if not holds:
        raise NotHonouredError(words)


def ok(reply: Reply) -> Any:
    need(reply.status == 200, f"HTTP {reply.status}: {reply.text[:200]}")
    return reply.body


def ok_events(reply: Reply) -> list[Any]:
    need(reply.status == 200, f"HTTP {reply.status}: {reply.text[:200]}")
    need(reply.headers["content-type"].startswith("text/event-stream"), "it is no event stream")
    return reply.events


def refused(reply: Reply, status: int, *, param: str | None = None, code: str | None = None) -> None:
    need(reply.status == status, f"HTTP {reply.status} where {status} was expected: {reply.text[:200]}")
    error = reply.body["error"]
    need({"message", "type", "param", "code"} <= error.keys(), "the error lacks a member")
    need(param is None or error["param"] == param, f"the error names {error['param']}, not {param}")
    need(code is None or error["code"] == code, f"the error's code is {error['code']}, not {code}")


def text_of(completion: Any, index: int = 0) -> str:
    return str(completion["choices"][index]["text"])


# ---------------------------------------------------------------------------------------------------------- endpoints


async def _models(api: ApiClient) -> None:
    listed = ok(await api.get("/v1/models"))
    need(any(model["id"] == api.model for model in listed["data"]), "the model is not listed")
    need(ok(await api.get(f"/v1/models/{api.model}"))["id"] == api.model, "the model is not found by its id")
    refused(await api.get("/v1/models/other"), 404, code="model_not_found")


async def _generation(api: ApiClient) -> None:
    whole = ok(await api.complete(temperature=0))
    events = ok_events(await api.complete(temperature=0, stream=True))
    need(events[-1] == "[DONE]", "the stream does not end with [DONE]")
    need("".join(text_of(event) for event in events[:-1]) == text_of(whole), "streamed and whole text differ")
    chat = ok(await api.chat(temperature=0))
    chunks = ok_events(await api.chat(temperature=0, stream=True))
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks[:-1])
    need(streamed == chat["choices"][0]["message"]["content"], "streamed and whole chat differ")


async def _embeddings(api: ApiClient) -> None:
    made = ok(await api.post("/v1/embeddings", input=["one", "two"]))
    vectors = [item["embedding"] for item in made["data"]]
    need(len(vectors) == 2 and vectors[0] != vectors[1], "two inputs do not give two vectors")
    need(abs(math.hypot(*vectors[0]) - 1) < 1e-3, "a vector's length is not 1")
    packed = ok(await api.post("/v1/embeddings", input="one", encoding_format="base64"))["data"][0]["embedding"]
    raw = base64.b64decode(packed)
    unpacked = struct.unpack(f"<{len(raw) // 4}f", raw)
    need(max(map(abs, (a - b for a, b in zip(unpacked, vectors[0], strict=True)))) < 1e-3, "base64 is another vector")
    refused(await api.post("/v1/embeddings", input=""), 400, param="input")


async def _responses(api: ApiClient) -> None:
    made = ok(await api.post("/v1/responses", input="Say hello.", max_output_tokens=8))
    need(made["object"] == "response" and made["output"], "there is no output")
    again = ok(await api.get(f"/v1/responses/{made['id']}"))
    need(again["id"] == made["id"], "a kept response is not found")
    ok(await api.post("/v1/responses", input="And now?", previous_response_id=made["id"], max_output_tokens=8))
    events = ok_events(await api.post("/v1/responses", input="Say hello.", max_output_tokens=8, stream=True))
    kinds = [event["type"] for event in events if event != "[DONE]"]
    need(kinds[0] == "response.created", "the stream does not begin with response.created")
    need(kinds[-1] in ("response.completed", "response.incomplete"), "the stream does not end with the response")
    refused(await api.ask("POST", f"/v1/responses/{made['id']}/cancel"), 400)


async def _messages(api: ApiClient) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    made = ok(await api.post("/v1/messages", messages=messages, max_tokens=8))
    need(made["type"] == "message" and made["content"][0]["type"] == "text", "there is no text")
    counted = ok(await api.post("/v1/messages/count_tokens", messages=messages))["input_tokens"]
    usage = made["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    need(counted == read, "count_tokens is not what was read")
    events = ok_events(await api.post("/v1/messages", messages=messages, max_tokens=8, stream=True))
    kinds = [event["type"] for event in events]
    need((kinds[0], kinds[-1]) == ("message_start", "message_stop"), "the stream's ends are missing")


async def _tokens(api: ApiClient) -> None:
    found = ok(await api.post("/tokenize", prompt="Hello, world"))
    need(found["count"] == len(found["tokens"]) and found["max_model_len"] > 0, "the counts are wrong")
    need(ok(await api.post("/detokenize", tokens=found["tokens"]))["prompt"].endswith("Hello, world"), "no round trip")
    ok(await api.post("/tokenize", messages=[{"role": "user", "content": "Hi"}]))


async def _health(api: ApiClient) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/health/startup", "/ping", "/health/generate"):
        need((await api.get(path)).status == 200, f"{path} is not well")
    need(ok(await api.get("/version"))["version"], "there is no version")


async def _metrics(api: ApiClient) -> None:
    text = (await api.get("/metrics")).text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds"):
        need(f"foretoken:{name}" in text, f"{name} is missing")


# ------------------------------------------------------------------------------------------------------------- fields


async def _stream_options(api: ApiClient) -> None:
    events = ok_events(await api.complete(stream=True, stream_options={"include_usage": True}))
    need(events[-2]["choices"] == [] and events[-2]["usage"]["completion_tokens"] > 0, "the last chunk has no usage")
    continuous = {"include_usage": True, "continuous_usage_stats": True}
    events = ok_events(await api.complete(stream=True, stream_options=continuous))
    need(all(event["usage"] for event in events[:-1]), "a chunk has no usage")
    refused(await api.complete(stream_options={"include_usage": True}), 400, param="stream_options")


async def _n(api: ApiClient) -> None:
    made = ok(await api.complete(n=4, seed=1, temperature=1.0, max_tokens=24))
    need([choice["index"] for choice in made["choices"]] == [0, 1, 2, 3], "the indices are wrong")
    need(len({choice["text"] for choice in made["choices"]}) > 1, "the samples are all the same")
    need(all(choice["finish_reason"] in ("stop", "length") for choice in made["choices"]), "a sample has no finish")


async def _best_of(api: ApiClient) -> None:
    ok(await api.complete(best_of=1))
    refused(await api.complete(best_of=2), 400, param="best_of")


async def _logprobs(api: ApiClient) -> None:
    made = ok(await api.complete(logprobs=2, max_tokens=2))["choices"][0]["logprobs"]
    need(len(made["token_logprobs"]) == 2 and all(len(top) in (2, 3) for top in made["top_logprobs"]), "too few")
    chat = ok(await api.chat(logprobs=True, top_logprobs=3, max_tokens=2))["choices"][0]["logprobs"]["content"]
    need(all(len(token["top_logprobs"]) == 3 for token in chat), "a chat's alternatives are missing")
    refused(await api.complete(logprobs=21), 400, param="logprobs")


async def _echo(api: ApiClient) -> None:
    made = ok(await api.complete(prompt="Hello there", echo=True, logprobs=1, max_tokens=0))["choices"][0]
    need(made["text"].endswith("Hello there") and made["logprobs"]["token_logprobs"], "the prompt is not echoed")
    need(ok(await api.complete(prompt_logprobs=1))["choices"][0]["prompt_logprobs"][0] is None, "no prompt_logprobs")


async def _stop(api: ApiClient) -> None:
    plain = ok(await api.complete(temperature=0, max_tokens=24, return_token_ids=True))["choices"][0]
    word = plain["text"][3:6]
    cut = ok(await api.complete(temperature=0, max_tokens=24, stop=word))["choices"][0]
    need(word not in cut["text"] and cut["stop_reason"] == word, "the stop string does not stop")
    kept = ok(await api.complete(temperature=0, max_tokens=24, stop=[word], include_stop_str_in_output=True))
    need(text_of(kept).endswith(word), "the stop string is not kept")
    token = plain["token_ids"][4]
    cut = ok(await api.complete(temperature=0, max_tokens=24, stop_token_ids=[token]))["choices"][0]
    need(cut["stop_reason"] == token, "the stop token does not stop")
    long = ok(await api.complete(temperature=0, ignore_eos=True, min_tokens=32, max_tokens=32))
    need(long["usage"]["completion_tokens"] == 32, "min_tokens is not reached")


async def _sampling(api: ApiClient) -> None:
    greedy = text_of(ok(await api.complete(temperature=0, max_tokens=16)))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        made = text_of(ok(await api.complete(temperature=1.0, max_tokens=16, **narrow)))
        need(made == greedy, f"{next(iter(narrow))} leaves more than the likeliest token")
    drawn = {text_of(ok(await api.complete(temperature=1.5, seed=7, max_tokens=16))) for _ in range(3)}
    need(len(drawn) == 1, "one seed gives several texts")
    many = {text_of(ok(await api.complete(temperature=1.5, seed=seed, max_tokens=16))) for seed in range(4)}
    need(len(many) > 1, "several seeds give one text")


async def _penalties(api: ApiClient) -> None:
    plain = ok(await api.complete(temperature=0, max_tokens=48, ignore_eos=True))
    for changed in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 2.0}):
        made = ok(await api.complete(temperature=0, max_tokens=48, ignore_eos=True, **changed))
        need(text_of(made) != text_of(plain), f"{next(iter(changed))} changes nothing")
    ids = ok(await api.complete(temperature=0, max_tokens=4, logit_bias={"9": 100}, return_token_ids=True))
    need(ids["choices"][0]["token_ids"] == [9] * 4, "a bias of 100 does not force a token")
    refused(await api.complete(logit_bias={"99999999": 1}), 400, param="logit_bias")
    refused(await api.complete(logit_bias={"word": 1}), 400, param="logit_bias")


async def _structured(api: ApiClient) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    message = ok(await api.chat(response_format=schema, max_tokens=64))["choices"][0]["message"]
    need(isinstance(json.loads(message["content"])["age"], int), "the schema is not followed")
    made = ok(await api.chat(response_format={"type": "json_object"}, max_tokens=200, temperature=0))["choices"][0]
    need(made["finish_reason"] == "length" or json.loads(made["message"]["content"]) is not None, "it is no JSON")
    for asked, allowed in (
        ({"structured_outputs": {"choice": ["red", "blue"]}}, ("red", "blue")),
        ({"structured_outputs": {"regex": "ab?c"}}, ("abc", "ac")),
        ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, ("yes", "no")),
        ({"guided_choice": ["red", "blue"]}, ("red", "blue")),
    ):
        need(text_of(ok(await api.complete(**asked))) in allowed, f"{asked} is not followed")
    refused(await api.complete(structured_outputs={"regex": "("}), 400)


async def _tools(api: ApiClient) -> None:
    """Where the model's chat template knows no tools, a clear refusal of them."""
    made = await api.chat(tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0)
    if made.status == 400:
        refused(made, 400, param="tools")
        return
    calls = ok(made)["choices"][0]["message"]["tool_calls"]
    need(calls[0]["function"]["name"] == "get_weather", "the tool is not called")
    need(json.loads(calls[0]["function"]["arguments"])["city"] in ("Rome", "Oslo"), "the arguments are not as declared")
    chunks = ok_events(await api.chat(tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0, stream=True))
    deltas = [call for chunk in chunks[:-1] for call in chunk["choices"][0]["delta"].get("tool_calls") or ()]
    need(
        "".join(call["function"].get("arguments", "") for call in deltas) == calls[0]["function"]["arguments"], "deltas"
    )
    none = ok(await api.chat(tools=[TOOL], tool_choice="none"))["choices"][0]["message"]
    need(not none.get("tool_calls"), "a call in spite of none")


async def _reasoning(api: ApiClient) -> None:
    """Where the model does not think, effort and budget ask for nothing."""
    for asked in ({"reasoning_effort": "low"}, {"include_reasoning": False}, {"thinking_token_budget": 8}):
        reply = await api.chat(**asked)
        if reply.status == 400:
            refused(reply, 400, param=next(iter(asked)))
            continue
        message = ok(reply)["choices"][0]["message"]
        need(message.get("reasoning") == message.get("reasoning_content"), "the two names differ")


async def _max_tokens(api: ApiClient) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        made = ok(await api.post("/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}], **{name: 3}))
        need(made["usage"]["completion_tokens"] <= 3, f"{name} is not kept to")
    refused(await api.complete(max_tokens=10**7), 400, code="context_length_exceeded")


async def _cached(api: ApiClient) -> None:
    prompt = "The walnut is a tree of the north. " * 20
    ok(await api.complete(prompt=prompt))
    usage = ok(await api.complete(prompt=prompt))["usage"]
    need(usage["prompt_tokens_details"]["cached_tokens"] > 0, "the prefix cache finds nothing")


async def _leaves(api: ApiClient) -> None:
    """Its sequence ends, and is counted."""

    async def aborted() -> float:
        lines = (await api.get("/metrics")).text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("foretoken:requests_aborted_total")
        )

    before = await aborted()
    await api.leave_a_stream()
    try:
        async with asyncio.timeout(LEAVE_TIMEOUT_S):
            while await aborted() <= before:
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise NotHonouredError("the sequence was not ended") from None


async def _errors(api: ApiClient) -> None:
    refused(await api.ask("POST", "/v1/completions", data=b"{"), 400)
    refused(
        await api.ask("POST", "/v1/completions", json={"model": "other", "prompt": "Hi"}), 404, code="model_not_found"
    )
    refused(await api.complete(temperature=9), 400, param="temperature")
    refused(await api.complete(colour="red"), 400, param="colour")
    refused(await api.get("/v1/nothing"), 404)
    refused(await api.get("/v1/completions"), 405)
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]
    refused(await api.chat(messages=[{"role": "user", "content": image}]), 400)
    refused(await api.complete(prompt="word " * 100_000), 400, code="context_length_exceeded")


async def _sizes(api: ApiClient) -> None:
    refused(await api.ask("POST", "/v1/completions", data=io.BytesIO(b" " * (17 * 2**20))), 413)
    refused(await api.ask("POST", "/v1/completions", data=b'{"a":' * 500 + b"1" + b"}" * 500), 400)


ROWS = (
    ApiRow("models", _models),
    ApiRow("completions and chat, whole and streamed", _generation),
    ApiRow("embeddings", _embeddings),
    ApiRow("responses", _responses),
    ApiRow("Anthropic's messages and count_tokens", _messages),
    ApiRow("tokenize and detokenize", _tokens),
    ApiRow("health and version", _health),
    ApiRow("Prometheus metrics", _metrics),
    ApiRow("stream_options", _stream_options),
    ApiRow("n", _n),
    ApiRow("best_of", _best_of),
    ApiRow("logprobs", _logprobs),
    ApiRow("prompt_logprobs and echo", _echo),
    ApiRow("stop, stop_token_ids, min_tokens, ignore_eos", _stop),
    ApiRow("temperature, top_p, top_k, min_p, seed", _sampling),
    ApiRow("penalties and logit_bias", _penalties),
    ApiRow("response_format and structured outputs", _structured),
    ApiRow("tools", _tools),
    ApiRow("reasoning", _reasoning),
    ApiRow("max_tokens and max_completion_tokens", _max_tokens),
    ApiRow("cached_tokens", _cached),
    ApiRow("a client that leaves", _leaves),
    ApiRow("errors", _errors),
    ApiRow("size caps", _sizes),
)
