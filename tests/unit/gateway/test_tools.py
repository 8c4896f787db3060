"""Tools through OpenAI's own client: what the model is shown, what it must write, and how its calls come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.gateway.chat import ChatTemplate
from cluster.gateway.fields import validate
from cluster.gateway.openai import ChatCompletionRequest
from cluster.gateway.submit import render_chat
from tests.support.chat_templates import MISTRAL_LIKE, MISTRAL_NAMED, QWEN_LIKE, write_tokenizer
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello, say
from tests.unit.gateway.conftest import MODEL, Serve, Served
from tests.unit.gateway.test_chat import oracle

pytestmark = [pytest.mark.anyio, pytest.mark.needs("openai")]

USER = {"role": "user", "content": "How is the weather in Ulm and Köln?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now>",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
ULM, KOELN = '{"place": "Ulm"}', '{"place": "Köln"}'
TWO_CALLS = (
    f'<tool_call>\n{{"name": "weather", "arguments": {ULM}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "weather", "arguments": {KOELN}}}\n</tool_call>'
)
ID = "abcdefgh1"


@pytest.fixture
async def serve_qwen(serve: Serve, worker: ScriptedWorker, tmp_path: Path) -> Served:
    worker.hello = hello(max_model_len=4096)
    served = await serve(model_path=write_tokenizer(tmp_path / "qwen", byte_tokenizer(), QWEN_LIKE))
    await served.ready()
    return served


def client_of(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none", max_retries=0)


async def both_ways(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The same asked as a whole reply and as a stream: content, thoughts, calls and the finish of each."""
    replies = []
    async with client_of(served) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=[USER], **fields)
        message = whole.choices[0].message
        replies.append(
            {
                "content": message.content or "",
                "reasoning": message.to_dict().get("reasoning", ""),
                "calls": [(c.function.name, c.function.arguments) for c in message.tool_calls or []],
                "finish": whole.choices[0].finish_reason,
            }
        )
        reply: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish": None}
        ids = []
        async for chunk in await client.chat.completions.create(model=MODEL, messages=[USER], stream=True, **fields):
            choice = chunk.choices[0]
            reply["content"] += choice.delta.content or ""
            reply["reasoning"] += choice.delta.to_dict().get("reasoning", "")
            for part in choice.delta.tool_calls or []:
                assert part.function is not None
                if part.id is not None:
                    ids.append(part.id)
                    assert (part.type, part.index) == ("function", len(reply["calls"]))
                    reply["calls"].append((part.function.name, ""))
                name, arguments = reply["calls"][part.index]
                reply["calls"][part.index] = (name, arguments + (part.function.arguments or ""))
            reply["finish"] = choice.finish_reason or reply["finish"]
        assert len(set(ids)) == len(ids)
        replies.append(reply)
    return replies


async def test_calls_come_back_whole_and_in_pieces(serve_qwen: Served, worker: ScriptedWorker) -> None:
    worker.answer = say("Let me see.\n" + TWO_CALLS)
    for reply in await both_ways(serve_qwen, tools=[WEATHER, CLOCK]):
        assert reply == {
            "content": "Let me see.",
            "reasoning": "",
            "calls": [("weather", ULM), ("weather", KOELN)],
            "finish": "tool_calls",
        }
    assert worker.submits[0].sampling.grammar is None, "auto asks for nothing"
    for reply in await both_ways(serve_qwen, tools=[WEATHER], parallel_tool_calls=False):
        assert (reply["calls"], reply["finish"]) == ([("weather", ULM)], "tool_calls")
    for reply in await both_ways(serve_qwen, tools=[WEATHER], max_tokens=len("Let me see.\n<tool_call>\n") + 39):
        assert reply["finish"] == "length"
        assert reply["calls"] == [("weather", '{"plac')], "what came of it is given"
    for reply in await both_ways(serve_qwen, tools=[WEATHER], tool_choice="none"):
        assert (reply["calls"], reply["finish"]) == ([], "stop")
        assert reply["content"] == "Let me see.\n" + TWO_CALLS
    worker.answer = say("It rains.")
    for reply in await both_ways(serve_qwen, tools=[WEATHER]):
        assert (reply["content"], reply["calls"], reply["finish"]) == ("It rains.", [], "stop")


async def test_arguments_are_streamed_as_they_are_written(serve_qwen: Served, worker: ScriptedWorker) -> None:
    worker.answer = say(TWO_CALLS)
    async with client_of(serve_qwen) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=[USER], tools=[WEATHER], stream=True)
        deltas = [part for chunk in [c async for c in stream] for part in chunk.choices[0].delta.tool_calls or []]
    pieces = [part.function.arguments for part in deltas if part.function is not None and part.index == 0]
    assert len(pieces) >= len(ULM), "a token at a time"
    assert "".join(piece or "" for piece in pieces) == ULM


async def test_a_call_that_must_be_made(serve_qwen: Served, worker: ScriptedWorker) -> None:
    worker.answer = say(TWO_CALLS)
    for reply in await both_ways(serve_qwen, tools=[WEATHER, CLOCK], tool_choice="required"):
        assert reply["finish"] == "tool_calls"
    many = worker.submits[-1].sampling.grammar
    await both_ways(serve_qwen, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False)
    one = worker.submits[-1].sampling.grammar
    named = {"type": "function", "function": {"name": "clock"}}
    for reply in await both_ways(serve_qwen, tools=[WEATHER, CLOCK], tool_choice=named):
        assert reply["finish"] == "stop", "as OpenAI has it"
    clock = worker.submits[-1].sampling.grammar
    assert many is not None
    assert one is not None
    assert clock is not None
    assert {many.kind, one.kind, clock.kind} == {"lark"}
    assert many.source.replace(' ( "\\n" call )*', "") == one.source
    assert "weather" in many.source
    assert "weather" not in clock.source


async def test_json_or_calls_where_both_may_come(serve_qwen: Served, worker: ScriptedWorker) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    worker.answer = say(TWO_CALLS)
    for reply in await both_ways(serve_qwen, tools=[WEATHER], response_format=schema):
        assert len(reply["calls"]) == 2
    grammar = worker.submits[-1].sampling.grammar
    assert grammar is not None
    assert "start: calls | answer\n" in grammar.source


async def test_the_model_is_shown_the_calls_and_their_results(serve_qwen: Served, worker: ScriptedWorker) -> None:
    messages: list[Any] = [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ULM}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    async with client_of(serve_qwen) as client:
        await client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER])
    prompt = bytes(token for token in worker.submits[0].prompt_ids if token < 256).decode()
    assert json.dumps(WEATHER) in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"place": "Ulm"}}\n</tool_call>' in prompt
    assert "<tool_response>\nrain\n</tool_response> to call_1" in prompt
    assert "null" not in prompt
    assert "None" not in prompt


MISTRAL_REPLIES = {
    "array": (MISTRAL_LIKE, f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ULM}}}]', '"[TOOL_CALLS]" / ?/ "["'),
    "named": (MISTRAL_NAMED, f"[TOOL_CALLS]weather[ARGS]{ULM}", '"[TOOL_CALLS]weather[ARGS]"'),
}


@pytest.mark.parametrize("form", MISTRAL_REPLIES)
async def test_mistrals_forms(serve: Serve, worker: ScriptedWorker, tmp_path: Path, form: str) -> None:
    template, text, rule = MISTRAL_REPLIES[form]
    worker.hello = hello(max_model_len=4096)
    served = await serve(model_path=write_tokenizer(tmp_path / "m", byte_tokenizer(), template))
    worker.answer = say(text)
    for reply in await both_ways(served, tools=[WEATHER]):
        assert (reply["content"], reply["calls"], reply["finish"]) == ("", [("weather", ULM)], "tool_calls")
    await both_ways(served, tools=[WEATHER], tool_choice="required")
    grammar = worker.submits[-1].sampling.grammar
    assert grammar is not None
    assert rule in grammar.source
    reply = (await served.chat(tools=[WEATHER])).json()["choices"][0]["message"]
    (call,) = reply["tool_calls"]
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    again = await served.chat(
        messages=[USER, reply | {"role": "assistant"}, {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]
    )
    assert again.status_code == 200, "what was answered can be sent back as it is"
    wrong = reply["tool_calls"][0] | {"id": "call_1"}
    refused = await served.chat(messages=[USER, {"role": "assistant", "tool_calls": [wrong]}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert "9 letters" in refused.json()["error"]["message"]


INVALID, UNSUPPORTED = "invalid_value", "unsupported_parameter"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "function"}]}, INVALID, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, INVALID, "tools[0].type"),
    ({"tools": [CLOCK, CLOCK]}, INVALID, "tools"),
    ({"tools": [CLOCK] * 129}, INVALID, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, INVALID, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, INVALID, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, INVALID, "tools[0].function.name"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        INVALID,
        "tools[0].function.parameters",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
        INVALID,
        "tools[0].function.parameters",
    ),
    ({"tool_choice": "required"}, INVALID, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": "any"}, INVALID, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, INVALID, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, INVALID, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, UNSUPPORTED, "tool_choice"),
    ({"tools": [CLOCK], "tool_choice": {"type": "custom"}}, UNSUPPORTED, "tool_choice"),
    (
        {"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}},
        INVALID,
        "response_format",
    ),
    ({"tools": [CLOCK], "structured_outputs": {"regex": "a"}}, INVALID, "structured_outputs"),
    ({"tools": [CLOCK], "tool_choice": "required", "ignore_eos": True}, INVALID, "ignore_eos"),
    ({"functions": [{"name": "f"}]}, UNSUPPORTED, "functions"),
    ({"messages": [USER | {"tool_calls": [CALL]}]}, INVALID, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant"}]}, INVALID, "messages[0].content"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}]},
        INVALID,
        "messages[0].tool_calls[0].function.arguments",
    ),
]


async def test_wrong_tools_are_named(serve_qwen: Served, worker: ScriptedWorker) -> None:
    for change, code, param in WRONG:
        response = await serve_qwen.chat(**change)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, code, param), (change, error)
    assert "use tools" in (await serve_qwen.chat(functions=[{"name": "f"}])).json()["error"]["message"]
    assert worker.submits == []


async def test_a_model_without_tools_says_what_to_do(served: Served, serve: Serve, tmp_path: Path) -> None:
    assert "template knows no tools" in (await served.chat(tools=[CLOCK])).json()["error"]["message"]
    assert (await served.chat(tools=[CLOCK], tool_choice="none")).status_code == 200
    qwen = write_tokenizer(tmp_path / "qwen", byte_tokenizer(), QWEN_LIKE)
    coder = QWEN_LIKE.replace('{"name": "...", "arguments": {...}}', "<function=...></function>")
    other = write_tokenizer(tmp_path / "coder", byte_tokenizer(), coder)
    for place, settings in ((qwen, {"tool_parser": "none"}), (other, {})):
        response = await (await serve(model_path=place, **settings)).chat(tools=[CLOCK])
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
        assert "tool_parser" in response.json()["error"]["message"]


TOOLS = [[], [CLOCK], [WEATHER, CLOCK]]
MADE = {"id": ID, "type": "function", "function": {"name": "weather", "arguments": {"place": "Köln", "n": [1, None]}}}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [USER, {"role": "assistant", "content": "", "tool_calls": [MADE]}],
    [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [MADE, MADE]},
        {"role": "tool", "tool_call_id": ID, "content": "<rain>"},
        {"role": "assistant", "content": "It rains."},
        USER,
    ],
]


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("source", [QWEN_LIKE, MISTRAL_LIKE], ids=["qwen", "mistral"])
def test_tools_and_calls_are_rendered_as_transformers_does(source: str) -> None:
    reference = oracle(source)
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    for chat in CHATS:
        for tools in TOOLS:
            expected = reference.apply_chat_template(
                chat, tools=tools or None, tokenize=False, add_generation_prompt=True
            )
            request = validate(ChatCompletionRequest, {"messages": [_as_sent(m) for m in chat], "tools": tools})
            assert render_chat(request, template) == expected


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI's clients send it: arguments are text, and there is no content beside calls."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"content": None, "tool_calls": calls}
