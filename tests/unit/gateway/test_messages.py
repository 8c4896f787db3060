"""Anthropic's Messages API through its own client, over a socket: whole, streamed, with tools, and its errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from tokenizers import AddedToken

from cluster.gateway.auth import Keys, parse_keys
from cluster.protocol import Finish, RequestOutput, Thinking
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.event_order import MessageOrder
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello, say
from tests.unit.gateway.conftest import MODEL, Serve, Served
from tests.unit.gateway.test_responses import FULL, THOUGHTS, in_pieces, prompt_of
from tests.unit.gateway.test_tools import KOELN, TWO_CALLS, ULM

pytestmark = [pytest.mark.anyio, pytest.mark.needs("anthropic", "openai")]

TEXT = "Hello, wörld! 🦀"
USER: Any = {"role": "user", "content": "Hi"}
WEATHER: Any = {
    "name": "weather",
    "description": "The weather <now>",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
ONE = {"disable_parallel_tool_use": True}
CLOCK: Any = {"type": "custom", "name": "clock", "input_schema": {"type": "object"}}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks and calls; the end of its thoughts is a token."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
    return write_tokenizer(tmp_path_factory.mktemp("qwen"), tokenizer, QWEN_LIKE)


@pytest.fixture
async def served(serve: Serve, worker: ScriptedWorker, qwen: Path) -> Served:
    worker.hello = hello(max_model_len=8192, vocab_size=300)
    served = await serve(model_path=qwen)
    await served.ready()
    return served


@pytest.fixture
async def client(served: Served) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=served.base_url, api_key="none", max_retries=0) as client:
        yield client


async def ask(served: Served, **body: Any) -> httpx.Response:
    return await served.http.post("/v1/messages", json={"max_tokens": 1000, "messages": [USER]} | body)


async def streamed(served: Served, **body: Any) -> dict[str, Any]:
    """The message that a stream's events tell, in an order that they may have."""
    response = await ask(served, stream=True, **body)
    assert response.status_code == 200, response.text
    order, name = MessageOrder(), ""
    for line in response.text.splitlines():
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            event = json.loads(value)
            assert event["type"] == name
            order.take(event)
    assert order.state == "ended"
    return order.message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{key: value for key, value in block.items() if key != "id"} for block in message["content"]]
    return {key: value for key, value in message.items() if key != "id"} | {"content": content}


async def test_a_text(client: anthropic.AsyncAnthropic, worker: ScriptedWorker) -> None:
    reply = await client.messages.create(
        model=MODEL,
        max_tokens=100,
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}
        ],
        stop_sequences=["?"],
        metadata={"user_id": "u"},
        extra_headers={"anthropic-beta": "token-counting-2024-11-01"},
        extra_body={"temperature": 0.5, "top_k": 5, "top_p": 0.9},
    )
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", MODEL)
    assert reply.id.startswith("msg_")
    assert [block.to_dict() for block in reply.content] == [{"type": "text", "text": TEXT}]
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    assert prompt_of(worker) == "system\nBe brief.\nuser\nHi\nassistant\n"
    submit = worker.submits[0]
    assert reply.usage.cache_read_input_tokens == len(submit.prompt_ids) // 64 * 64
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens == len(submit.prompt_ids)
    assert reply.usage.cache_creation_input_tokens == 0
    assert reply.usage.output_tokens == len(TEXT.encode()) + 1
    assert (submit.sampling.temperature, submit.sampling.top_k, submit.sampling.top_p) == (0.5, 5, 0.9)
    assert (submit.stopping.max_tokens, submit.stopping.stop) == (100, ("?",))
    assert reply._request_id, "the header by which Anthropic's clients know a request"


async def test_whole_and_streamed_say_the_same(served: Served, worker: ScriptedWorker) -> None:
    tools = {"tools": [WEATHER, CLOCK]}
    cases: list[tuple[str, str, str, dict[str, Any]]] = [
        (TEXT, "text", "end_turn", {}),
        ("", "", "end_turn", {}),
        (TEXT, "text", "max_tokens", {"max_tokens": 3}),
        (TEXT, "text", "stop_sequence", {"stop_sequences": ["lo"]}),
        (FULL, "thinking text tool_use tool_use", "tool_use", tools),
        (FULL, "thinking text tool_use", "tool_use", tools | {"tool_choice": {"type": "auto"} | ONE}),
        (FULL, "thinking text", "end_turn", tools | {"tool_choice": {"type": "none"}}),
        (FULL, "text tool_use tool_use", "tool_use", tools | {"thinking": {"type": "adaptive", "display": "omitted"}}),
        (TWO_CALLS, "tool_use tool_use", "tool_use", tools | {"tool_choice": {"type": "any"}}),
        (TWO_CALLS, "tool_use", "tool_use", tools | {"tool_choice": {"type": "tool", "name": "weather"} | ONE}),
        (FULL, "thinking text tool_use", "max_tokens", tools | {"max_tokens": len(FULL.encode()) - 95}),
        ("<think>\nnever ended", "thinking", "end_turn", {}),
    ]
    for text, kinds, reason, body in cases:
        worker.answer = say(text)
        response = await ask(served, **body)
        whole = response.json()
        assert [block["type"] for block in whole["content"]] == kinds.split(), (text, body)
        assert whole["stop_reason"] == reason, (text, body)
        assert whole["stop_sequence"] == ("lo" if reason == "stop_sequence" else None)
        told = await streamed(served, **body)
        assert without_ids(told) == without_ids(whole), (text, body)
        ids = [block["id"] for block in told["content"] if block["type"] == "tool_use"]
        assert len(set(ids)) == len(ids)
    assert response.headers["request-id"] == response.headers["x-request-id"]


async def test_any_cut_of_the_text_says_the_same(served: Served, worker: ScriptedWorker) -> None:
    expected = None
    for sizes in ([1], [2], [3], [7], [1, 5], [13, 2], [1000]):
        worker.raw = in_pieces(FULL, sizes)
        told = without_ids(await streamed(served, tools=[WEATHER]))
        told.pop("usage")
        expected = expected or told
        assert told == expected, sizes
    assert expected is not None
    assert expected["content"] == [
        {"type": "thinking", "thinking": "Hm, ö.", "signature": ""},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "name": "weather", "input": json.loads(ULM)},
        {"type": "tool_use", "name": "weather", "input": json.loads(KOELN)},
    ]


async def test_a_stream_through_the_client(client: anthropic.AsyncAnthropic, worker: ScriptedWorker) -> None:
    worker.answer = say(FULL)
    async with client.messages.stream(model=MODEL, max_tokens=1000, messages=[USER], tools=[WEATHER]) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert ("".join(texts), len(texts) > 5) == ("Let me see.", True), "token by token"
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert final.stop_reason == "tool_use"
    assert [block.input for block in final.content if block.type == "tool_use"] == [json.loads(ULM), json.loads(KOELN)]


async def test_tools_round_trip(client: anthropic.AsyncAnthropic, worker: ScriptedWorker) -> None:
    worker.answer = say(FULL)
    reply = await client.messages.create(model=MODEL, max_tokens=1000, messages=[USER], tools=[WEATHER])
    calls = [block for block in reply.content if block.type == "tool_use"]
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "rain"},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "snow"}]},
        {"type": "text", "text": "So?"},
    ]
    worker.answer = say("It rains.")
    again = await client.messages.create(
        model=MODEL,
        max_tokens=1000,
        messages=[USER, {"role": "assistant", "content": reply.content}, {"role": "user", "content": results}],
        tools=[WEATHER],
    )
    assert [block.to_dict() for block in again.content] == [{"type": "text", "text": "It rains."}]
    shown = prompt_of(worker)
    assert "assistant\n<think>\nHm, ö.\n\n\nLet me see.\n<tool_call>" in shown
    assert '{"name": "weather", "arguments": {"place": "Ulm"}}' in shown
    assert f"rain\n</tool_response> to {calls[0].id}" in shown
    assert f"snow\n</tool_response> to {calls[1].id}" in shown
    assert shown.endswith("user\nSo?\nassistant\n")


async def test_what_a_request_asks_of_the_model(served: Served, worker: ScriptedWorker) -> None:
    worker.answer = say(TEXT)
    assert (await ask(served, thinking={"type": "enabled", "budget_tokens": 50})).status_code == 200
    assert worker.submits[-1].sampling.thinking == Thinking(start="<think>", end="</think>", is_open=False, budget=50)
    assert (await ask(served, thinking={"type": "disabled"})).status_code == 200
    assert prompt_of(worker).endswith("assistant\n<think>\n\n\n\n"), "the template has ended them"
    assert (await ask(served, output_config={"effort": "low"})).status_code == 200
    assert prompt_of(worker).endswith("assistant effort=low\n")
    schema = {"type": "json_schema", "schema": {"type": "object"}}
    assert (await ask(served, output_config={"format": schema})).status_code == 200
    grammar = worker.submits[-1].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source) == ("json_schema", '{"type":"object"}')
    prefilled = [USER, {"role": "assistant", "content": "Well,"}]
    assert (await ask(served, messages=prefilled)).status_code == 200
    assert prompt_of(worker).endswith("assistant\nWell,"), "a last message of the assistant's is gone on with"
    middle = [USER, {"role": "system", "content": "Be brief."}, USER]
    assert (await ask(served, messages=middle)).status_code == 200
    assert "system\nBe brief.\n" in prompt_of(worker)


async def test_count_tokens(client: anthropic.AsyncAnthropic, served: Served, worker: ScriptedWorker) -> None:
    fields: dict[str, Any] = {"messages": [USER], "system": "Be brief.", "tools": [WEATHER]}
    counted = await client.messages.count_tokens(model=MODEL, **fields)
    assert worker.submits == []
    reply = await client.messages.create(model=MODEL, max_tokens=5, **fields)
    assert counted.input_tokens == len(worker.submits[0].prompt_ids)
    assert counted.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)
    long = await client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "a" * 10_000}])
    assert long.input_tokens > 10_000, "what would not fit is counted too"
    refused = await served.http.post("/v1/messages/count_tokens", json={"messages": [USER], "max_tokens": 5})
    assert refused.json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.count_tokens(model="other", messages=[USER])


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/a.png"}}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is required"),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: "),
    (user(IMAGE), "messages[0].content[0].type: "),
    (user(DOCUMENT), "messages[0].content[0].type: "),
    (user({"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}), "messages[0].content[0].content: "),
    (user({"type": "text"}), "messages[0].content[0].text: "),
    (user({"type": "text", "text": "x", "thinking": "y"}), "messages[0].content[0].thinking: "),
    (user({"type": "tool_use", "id": "1", "name": "f", "input": {}}), "messages[0].content: "),
    ({"system": [IMAGE]}, "system: "),
    ({"temperature": 1.5}, "temperature: "),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: "),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type: "),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema is required"),
    ({"tools": [CLOCK, CLOCK]}, "tools: "),
    ({"tool_choice": {"type": "any"}}, "tool_choice: "),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name: "),
    ({"tools": [CLOCK], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice: "),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens: "),
    ({"thinking": {"type": "enabled", "budget_tokens": 1000}}, "thinking: "),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers: "),
    ({"container": "c"}, "container: "),
    ({"service_tier": "priority"}, "service_tier: "),
    ({"frobnicate": 1}, "frobnicate: "),
    (
        {
            "tools": [CLOCK],
            "tool_choice": {"type": "any"},
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
        },
        "output_config.format: ",
    ),
    ({"max_tokens": 9000}, "this model's context length is "),
]


async def test_wrong_requests_are_named(served: Served, worker: ScriptedWorker) -> None:
    for change, beginning in WRONG:
        response = await ask(served, **change)
        body = response.json()
        assert (response.status_code, body["type"]) == (400, "error"), (change, body)
        assert body["error"]["type"] == "invalid_request_error"
        assert body["error"]["message"].startswith(beginning), (change, body)
        assert body["request_id"] == response.headers["request-id"]
    assert worker.submits == []
    assert (await ask(served, context_management={"edits": []})).status_code == 200
    assert (await ask(served, service_tier="auto", mcp_servers=[], cache_control={"type": "ephemeral"})).is_success


async def test_a_model_that_does_not_think_names_its_field(
    serve: Serve, worker: ScriptedWorker, tmp_path: Path
) -> None:
    plain = write_tokenizer(tmp_path / "plain", byte_tokenizer(), "{{ messages[0].content }}")
    served = await serve(model_path=plain)
    await served.ready()
    refused = await ask(served, thinking={"type": "enabled", "budget_tokens": 5}, max_tokens=50)
    assert refused.json()["error"]["message"].startswith("thinking.budget_tokens: ")
    assert (await ask(served, thinking={"type": "disabled"}, max_tokens=50)).status_code == 200


KEY = "alice-0123456789abcdef"


async def test_every_error_of_the_path_has_anthropics_shape(
    serve: Serve, worker: ScriptedWorker, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(
        model_path=qwen,
        keys=Keys.of(parse_keys(f"alice:{KEY}", "test"), None),
        max_body_bytes=2000,
        max_open_requests_per_tenant=1,
        request_timeout_s=10.0,
    )
    await served.ready()

    def check(response: httpx.Response, status: int, kind: str) -> None:
        body = response.json()
        assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind), body
        assert body.keys() == {"type", "error", "request_id"}
        assert body["request_id"] == response.headers["request-id"]

    check(await ask(served), 401, "authentication_error")
    served.http.headers["x-api-key"] = KEY
    assert (await ask(served, max_tokens=2)).status_code == 200
    check(await ask(served, model="other"), 404, "not_found_error")
    check(await ask(served, system="a" * 3000), 413, "request_too_large")
    check(await served.http.get("/v1/messages"), 405, "invalid_request_error")
    check(await served.http.post("/v1/messages/batches", json={}), 404, "not_found_error")
    check(await served.http.post("/v1/messages", content=b"{"), 400, "invalid_request_error")
    assert "param" in (await served.http.post("/v1/completions", content=b"{")).json()["error"], "others' stay"
    gateway = served.app.state.gateway
    with gateway.admission.slot("r", "alice"):
        response = await ask(served)
        check(response, 429, "rate_limit_error")
        assert response.headers["retry-after"] == "1"
    with monkeypatch.context() as patched:
        patched.setattr(gateway, "_read_body", None)
        check(await ask(served), 500, "api_error")
    gateway.admission.draining = True
    check(await ask(served), 503, "overloaded_error")
    gateway.admission.draining = False
    ends = Finish(reason="error", error_code="engine_error", error_message="it broke")
    worker.raw = lambda submit: [RequestOutput(request_id=submit.request_id, index=0, finish=ends)]
    check(await ask(served, max_tokens=50), 500, "api_error")


async def test_errors_reach_the_client_typed(
    client: anthropic.AsyncAnthropic, served: Served, worker: ScriptedWorker
) -> None:
    with pytest.raises(anthropic.BadRequestError) as wrong:
        await client.messages.create(model=MODEL, max_tokens=5, messages=[USER], extra_body={"temperature": 2})
    assert wrong.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(model="other", max_tokens=5, messages=[USER])
    ends = Finish(reason="error", error_code="engine_error", error_message="it broke")
    worker.raw = lambda submit: [
        RequestOutput(request_id=submit.request_id, index=0, token_ids=[65], text=THOUGHTS),
        RequestOutput(request_id=submit.request_id, index=1, finish=ends),
    ]
    with pytest.raises(anthropic.APIStatusError) as broken:
        async with client.messages.stream(model=MODEL, max_tokens=50, messages=[USER]) as stream:
            await stream.get_final_message()
    assert isinstance(broken.value.body, dict)
    assert broken.value.body["error"] == {"type": "api_error", "message": "it broke"}
    assert broken.value.body["request_id"]
