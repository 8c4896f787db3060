"""`/v1/responses` through OpenAI's own client, over a socket: whole, streamed, with tools, and gone on from."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import AddedToken

from cluster.gateway.auth import Keys, parse_keys
from cluster.protocol import Finish, RequestOutput
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.event_order import ResponseOrder
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello, say
from tests.unit.gateway.conftest import MODEL, Serve, Served
from tests.unit.gateway.test_tools import KOELN, TWO_CALLS, ULM

pytestmark = [pytest.mark.anyio, pytest.mark.needs("openai")]

TEXT = "Hello, wörld! 🦀"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather <now>",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    "strict": True,
}
CLOCK: Any = {"type": "function", "name": "clock", "parameters": None, "strict": None}
THOUGHTS = "<think>\nHm, ö.\n</think>\n\n"
FULL = f"{THOUGHTS}Let me see.\n{TWO_CALLS}"


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
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_of(worker: ScriptedWorker) -> str:
    return bytes(token for token in worker.submits[-1].prompt_ids if token < 256).decode()


def in_pieces(text: str, sizes: list[int], reason: Any = "stop") -> Any:
    """A worker that sends `text` cut at those sizes, in turn."""

    def outputs(submit: Any) -> list[RequestOutput]:
        made, start, number = [], 0, 0
        while start < len(text):
            end = start + sizes[number % len(sizes)]
            piece = text[start:end]
            finish = Finish(reason=reason) if end >= len(text) else None
            made.append(
                RequestOutput(request_id=submit.request_id, index=number, token_ids=[65], text=piece, finish=finish)
            )
            start, number = end, number + 1
        return made

    return outputs


async def streamed(served: Served, **body: Any) -> dict[str, Any]:
    """The response that a stream's events tell, in an order that they may have."""
    order = ResponseOrder()
    async with served.http.stream("POST", "/v1/responses", json={"input": "Hi", "stream": True} | body) as response:
        assert response.status_code == 200, await response.aread()
        name = ""
        async for line in response.aiter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                event = json.loads(value)
                assert event["type"] == name
                order.take(event)
    assert order.state == "ended"
    return order.final


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    output = [
        {key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]
    ]
    left = {key: value for key, value in response.items() if key not in ("id", "created_at", "completed_at")}
    return left | {"output": output}


async def test_a_text(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    reply = await client.responses.create(
        model=MODEL,
        input="Hi",
        instructions="Be brief.",
        metadata={"k": "v"},
        temperature=0.5,
        max_output_tokens=100,
        user="u",
        truncation="disabled",
        service_tier="auto",
        include=["reasoning.encrypted_content"],
    )
    assert (reply.object, reply.status, reply.model, reply.output_text) == ("response", "completed", MODEL, TEXT)
    assert reply.id.startswith("resp_")
    assert prompt_of(worker) == "system\nBe brief.\nuser\nHi\nassistant\n"
    assert reply.usage is not None
    assert reply.usage.input_tokens == len(worker.submits[0].prompt_ids)
    assert reply.usage.output_tokens == len(TEXT.encode()) + 1
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply.usage.input_tokens_details.cached_tokens == len(worker.submits[0].prompt_ids) // 64 * 64
    assert reply.usage.output_tokens_details.reasoning_tokens == 0
    assert (reply.instructions, reply.metadata, reply.temperature) == ("Be brief.", {"k": "v"}, 0.5)
    assert (reply.max_output_tokens, reply.error, reply.incomplete_details) == (100, None, None)
    assert worker.submits[0].stopping.max_tokens == 100
    message = reply.output[0].to_dict()
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")


async def test_whole_and_streamed_say_the_same(served: Served, worker: ScriptedWorker) -> None:
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (TEXT, "message", {}),
        ("", "message", {}),
        (FULL, "reasoning message function_call function_call", {"tools": [WEATHER, CLOCK]}),
        (FULL, "reasoning message function_call", {"tools": [WEATHER], "parallel_tool_calls": False}),
        (TWO_CALLS, "function_call function_call", {"tools": [WEATHER], "tool_choice": "required"}),
        (FULL, "reasoning message", {}),
        ("<think>\nnever ended", "reasoning", {}),
        (FULL, "reasoning message function_call", {"tools": [WEATHER], "max_output_tokens": len(FULL.encode()) - 95}),
        (TEXT, "message", {"max_output_tokens": 3}),
        (FULL, "reasoning message", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        (TEXT, "message", {"include": ["message.output_text.logprobs"]}),
    ]
    for text, kinds, body in cases:
        worker.answer = say(text)
        whole = (await served.http.post("/v1/responses", json={"input": "Hi"} | body)).json()
        assert [item["type"] for item in whole["output"]] == kinds.split(), (text, body)
        told = await streamed(served, **body)
        assert without_ids(told) == without_ids(whole), (text, body)
        calls = [item for item in told["output"] if item["type"] == "function_call"]
        assert len({call["call_id"] for call in calls}) == len(calls)
        cut = whole["status"] == "incomplete"
        assert cut == ("max_output_tokens" in body)
        assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
        assert whole["output"][-1]["status"] == whole["status"]


async def test_logprobs_are_of_the_text(served: Served, worker: ScriptedWorker) -> None:
    worker.answer = say(f"{THOUGHTS}Yes, ö.")
    body = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = (await served.http.post("/v1/responses", json=body)).json()
    [part] = whole["output"][1]["content"]
    assert b"".join(bytes(item["bytes"]) for item in part["logprobs"]).decode() == "Yes, ö."
    assert {len(item["top_logprobs"]) for item in part["logprobs"]} == {2}


async def test_any_cut_of_the_text_says_the_same(served: Served, worker: ScriptedWorker) -> None:
    expected = None
    for sizes in ([1], [2], [3], [7], [1, 5], [13, 2], [1000]):
        worker.raw = in_pieces(FULL, sizes)
        told = without_ids(await streamed(served, tools=[WEATHER], store=False))
        told.pop("usage")
        expected = expected or told
        assert told == expected, sizes
    assert expected is not None
    assert [item["type"] for item in expected["output"]] == ["reasoning", "message", "function_call", "function_call"]


async def test_thoughts_are_counted_where_a_token_ends_them(served: Served, worker: ScriptedWorker) -> None:
    end = 259

    def outputs(submit: Any) -> list[RequestOutput]:
        pieces = [("<think>", 1), ("Hm", 2), ("</think>", end), ("Yes", 3), ("", 4)]
        return [
            RequestOutput(
                request_id=submit.request_id,
                index=number,
                token_ids=[token],
                text=text,
                finish=Finish(reason="stop") if number == 4 else None,
            )
            for number, (text, token) in enumerate(pieces)
        ]

    worker.raw = outputs
    whole = (await served.http.post("/v1/responses", json={"input": "Hi"})).json()
    for reply in (whole, await streamed(served)):
        assert reply["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


async def test_a_stream_through_the_client(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    worker.answer = say(FULL)
    async with client.responses.stream(model=MODEL, input="Hi", tools=[WEATHER]) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert final.output_text == "Let me see."
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(call.name, call.arguments) for call in calls] == [("weather", ULM), ("weather", KOELN)]
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert ("".join(texts), len(texts) > 5) == ("Let me see.", True), "token by token"
    assert "".join(e.delta for e in events if e.type == "response.reasoning_text.delta") == "Hm, ö."


async def test_tools_round_trip(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    worker.answer = say(FULL)
    conversation: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
    reply = await client.responses.create(model=MODEL, input=conversation, tools=[WEATHER])
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"rain {number}"}
        for number, item in enumerate(item for item in reply.output if item.type == "function_call")
    ]
    worker.answer = say("It rains.")
    stateless = await client.responses.create(
        model=MODEL, input=[*conversation, *reply.output, *results], tools=[WEATHER]
    )
    first = prompt_of(worker)
    stateful = await client.responses.create(model=MODEL, input=results, previous_response_id=reply.id, tools=[WEATHER])
    assert prompt_of(worker) == first, "kept here or sent again, the model is shown the same"
    assert (stateless.output_text, stateful.output_text) == ("It rains.", "It rains.")
    assert stateful.previous_response_id == reply.id
    assert "<think>\nHm, ö.\n" in first
    assert f'"arguments": {ULM}' in first
    assert "rain 0" in first
    assert "rain 1" in first
    again = await client.responses.create(
        model=MODEL, input="Sure?", previous_response_id=stateful.id, instructions="Doubt."
    )
    shown = prompt_of(worker)
    assert shown.startswith("system\nDoubt.\nuser\nWeather?")
    assert shown.endswith(
        "rain 1\n</tool_response> to " + results[1]["call_id"] + "\nassistant\nIt rains.\nuser\nSure?\nassistant\n"
    )
    await client.responses.create(model=MODEL, input="Sure?", previous_response_id=again.id)
    assert not prompt_of(worker).startswith("system"), "instructions are of one response"


async def test_what_a_choice_of_tools_asks_for(served: Served, worker: ScriptedWorker) -> None:
    worker.answer = say(TWO_CALLS)
    named = {"type": "function", "name": "clock"}
    for choice, shown in (("none", False), ("auto", False), ("required", True), (named, True)):
        body = {"input": "Hi", "tools": [WEATHER, CLOCK], "tool_choice": choice}
        reply = (await served.http.post("/v1/responses", json=body)).json()
        assert reply["tool_choice"] == choice
        assert (worker.submits[-1].sampling.grammar is not None) == shown
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    reply = (await served.http.post("/v1/responses", json={"input": "Hi", "text": {"format": schema}})).json()
    grammar = worker.submits[-1].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source) == ("json_schema", '{"type":"object"}')
    assert reply["text"]["format"] == schema


async def test_what_is_kept_can_be_fetched_and_deleted(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    items: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Ho", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": ULM},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "message", "role": "user", "content": "Hi"},
    ]
    reply = await client.responses.create(model=MODEL, input=items)
    fetched = await client.responses.retrieve(reply.id)
    assert fetched.to_dict() == reply.to_dict()
    listed = await client.responses.input_items.list(reply.id, order="asc")
    assert [item.type for item in listed.data] == [
        "message",
        "reasoning",
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]
    assert (listed.has_more, listed.data[1].id) == (False, "rs_1")
    paged = [item.id async for item in client.responses.input_items.list(reply.id, order="asc", limit=4)]
    assert paged == [item.id for item in listed.data]
    newest = await client.responses.input_items.list(reply.id, limit=1)
    assert newest.data[0].to_dict() == {
        "id": paged[-1],
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": [{"type": "input_text", "text": "Hi"}],
    }
    with pytest.raises(openai.BadRequestError) as cancelled:
        await client.responses.cancel(reply.id)
    assert "background" in cancelled.value.message
    await client.responses.delete(reply.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as gone:
            await call(reply.id)
        assert gone.value.code == "response_not_found"
    unkept = await client.responses.create(model=MODEL, input="Hi", store=False)
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.responses.create(model=MODEL, input="Hi", previous_response_id=unkept.id)
    assert (unknown.value.code, unknown.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_a_call_that_was_cut_off_is_not_shown_again(served: Served, worker: ScriptedWorker) -> None:
    for text, limit in (
        (FULL, len(FULL.encode()) - 95),
        ('<tool_call>\n{"name": "a b", "arguments": {}}\n</tool_call>', 100),
    ):
        worker.answer = say(text)
        body: dict[str, Any] = {"input": "Hi", "tools": [WEATHER], "max_output_tokens": limit}
        cut = (await served.http.post("/v1/responses", json=body)).json()
        assert cut["output"][-1]["type"] == "function_call"
        body |= {"input": "Go on", "previous_response_id": cut["id"], "tool_choice": "none"}
        assert (await served.http.post("/v1/responses", json=body)).status_code == 200
        assert "tool_call>" not in prompt_of(worker)


async def test_tenants_do_not_see_each_others(serve: Serve, worker: ScriptedWorker, qwen: Path) -> None:
    keys = {"alice": "alice-0123456789abcdef", "bob": "bob-0123456789abcdef00"}
    users = parse_keys(",".join(f"{tenant}:{key}" for tenant, key in keys.items()), "test")
    served = await serve(model_path=qwen, keys=Keys.of(users, None))
    await served.ready()
    clients = {
        tenant: openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key=key, max_retries=0)
        for tenant, key in keys.items()
    }
    reply = await clients["alice"].responses.create(model=MODEL, input="Hi")
    assert (await clients["alice"].responses.retrieve(reply.id)).id == reply.id
    for call in (clients["bob"].responses.retrieve, clients["bob"].responses.delete):
        with pytest.raises(openai.NotFoundError):
            await call(reply.id)
    with pytest.raises(openai.BadRequestError):
        await clients["bob"].responses.create(model=MODEL, input="Hi", previous_response_id=reply.id)
    for client in clients.values():
        await client.close()


async def test_a_stream_that_goes_wrong_fails(served: Served, worker: ScriptedWorker) -> None:
    for code, told in (("engine_error", "server_error"), ("overloaded", "rate_limit_exceeded")):
        ends = Finish(reason="error", error_code=code, error_message="it broke")
        worker.raw = lambda submit, ends=ends: [
            RequestOutput(request_id=submit.request_id, index=0, token_ids=[65], text="Let "),
            RequestOutput(request_id=submit.request_id, index=1, finish=ends),
        ]
        response = await served.http.post("/v1/responses", json={"input": "Hi", "stream": True})
        assert response.status_code == 200, "it went well at first"
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        final = events[-1]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert (final["type"], final["response"]["status"]) == ("response.failed", "failed")
        assert final["response"]["error"] == {"code": told, "message": "it broke"}
        assert final["response"]["store"] is False
        assert (await served.http.get(f"/v1/responses/{final['response']['id']}")).status_code == 404


INVALID, UNSUPPORTED = "invalid_value", "unsupported_parameter"
USER = {"role": "user", "content": "Hi"}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"input": []}, INVALID, "input"),
    ({"input": 3}, INVALID, "input"),
    ({"input": [{"role": "user"}]}, INVALID, "input[0].content"),
    ({"input": [{"role": "user", "content": "x", "output": "y"}]}, INVALID, "input[0].output"),
    ({"input": [USER, {"type": "function_call", "call_id": "1", "name": "f"}]}, INVALID, "input[1].arguments"),
    (
        {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "[]"}]},
        INVALID,
        "input[0].arguments",
    ),
    ({"input": [{"type": "web_search_call", "id": "1"}]}, UNSUPPORTED, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "1"}]}, UNSUPPORTED, "input[0].type"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1:9/a.png"}]}]},
        UNSUPPORTED,
        "input[0].content",
    ),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, INVALID, "input[0].content"),
    *(
        ({"tools": [{"type": kind}]}, UNSUPPORTED, "tools[0].type")
        for kind in ("web_search", "file_search", "computer_use_preview", "code_interpreter", "mcp", "custom")
    ),
    ({"tools": [CLOCK, CLOCK]}, INVALID, "tools"),
    ({"tool_choice": "required"}, INVALID, "tool_choice"),
    ({"tool_choice": "any"}, INVALID, "tool_choice"),
    ({"tool_choice": {"type": "web_search"}}, UNSUPPORTED, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "x"}}, INVALID, "tool_choice"),
    ({"background": True}, UNSUPPORTED, "background"),
    ({"truncation": "auto"}, UNSUPPORTED, "truncation"),
    ({"service_tier": "flex"}, UNSUPPORTED, "service_tier"),
    ({"conversation": "conv_1"}, UNSUPPORTED, "conversation"),
    ({"text": {"format": {"type": "json_schema"}}}, INVALID, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, UNSUPPORTED, "text.verbosity"),
    (
        {
            "tools": [CLOCK],
            "tool_choice": "required",
            "text": {"format": {"type": "json_object"}},
        },
        INVALID,
        "text.format",
    ),
    ({"reasoning": {"effort": "much"}}, INVALID, "reasoning.effort"),
    ({"max_output_tokens": 0}, INVALID, "max_output_tokens"),
    ({"temperature": 3}, INVALID, "temperature"),
    ({"top_logprobs": 21}, INVALID, "top_logprobs"),
    ({"metadata": {"k": "v" * 513}}, INVALID, "metadata"),
    ({"include": ["all"]}, INVALID, "include[0]"),
    ({"frobnicate": 1}, UNSUPPORTED, "frobnicate"),
    ({"max_output_tokens": 9000}, "context_length_exceeded", "input"),
    ({"previous_response_id": "resp_x"}, "previous_response_not_found", "previous_response_id"),
]


async def test_wrong_requests_are_named(served: Served, worker: ScriptedWorker) -> None:
    for change, code, param in WRONG:
        response = await served.http.post("/v1/responses", json={"input": "Hi"} | change)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, code, param), (change, error)
        assert "messages:" not in error["message"]
    for query, param in (("stream=true", "stream"), ("", None)):
        reply = (await served.http.post("/v1/responses", json={"input": "Hi"})).json()
        response = await served.http.get(f"/v1/responses/{reply['id']}?{query}")
        assert response.status_code == (400 if param else 200)
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nothing"):
        response = await served.http.get(f"/v1/responses/{reply['id']}/input_items?{query}")
        assert (response.status_code, response.json()["error"]["param"]) == (400, query.partition("=")[0])


async def test_a_model_that_does_not_think_names_its_field(
    serve: Serve, worker: ScriptedWorker, tmp_path: Path
) -> None:
    plain = write_tokenizer(tmp_path / "plain", byte_tokenizer(), "{{ messages[0].content }}")
    served = await serve(model_path=plain)
    await served.ready()
    response = await served.http.post("/v1/responses", json={"input": "Hi", "reasoning": {"effort": "low"}})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "reasoning.effort")
    assert error["message"].startswith("reasoning.effort: ")
