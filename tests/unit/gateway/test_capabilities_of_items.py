"""What /v1/capabilities says of the fields of /v1/responses and /v1/messages is what happens: one row a field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.gateway.capabilities import capabilities
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello, say
from tests.unit.gateway.conftest import MODEL, Serve, Served
from tests.unit.gateway.test_capabilities import Row, described, with_field

pytestmark = pytest.mark.anyio

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
FUNCTION = {"type": "function", "name": "weather"}
CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "rain"}
THOUGHTS = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm"}]}
TOOL = {"name": "weather", "input_schema": {"type": "object"}}
THINKS = {"thinking": {"type": "enabled", "budget_tokens": 5}}
_VARYING = re.compile(
    r"(resp|msg|rs|fc|fco|call|chatcmpl-tool)_[0-9a-f]{12,}|\"(created_at|completed_at)\":\d+|\"seed\":\d+"
)


def used(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": list(blocks)}]}


def told(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


TEXT_BLOCK = {"type": "text", "text": "Hi"}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "rain"}
THINKING = {"type": "thinking", "thinking": "Hm", "signature": ""}

HONOURED: dict[str, dict[str, Row]] = {
    RESPONSES: {
        "input": Row("other"),
        "input[].type": Row("reasoning", {"input": [{"content": "Hm"}]}),
        "input[].role": Row("system", {"input": [USER]}),
        "input[].content": Row("other", {"input": [USER]}),
        "input[].summary": Row([{"type": "summary_text", "text": "Hm"}], {"input": [{"type": "reasoning"}]}),
        "input[].call_id": Row("c2", {"input": [USER, CALL]}),
        "input[].name": Row("clock", {"input": [USER, CALL]}),
        "input[].arguments": Row('{"a":1}', {"input": [USER, CALL]}),
        "input[].output": Row("snow", {"input": [USER, CALL, OUTPUT]}),
        "instructions": Row("Be brief."),
        "store": Row(False),
        "stream": Row(True),
        "include": Row(["message.output_text.logprobs"]),
        "metadata": Row({"k": "v"}),
        "tools": Row([FUNCTION]),
        "tools[].type": Row("function", {"tools": [FUNCTION | {"type": "other"}]}),
        "tools[].name": Row("clock", {"tools": [FUNCTION]}),
        "tools[].description": Row("It tells the weather.", {"tools": [FUNCTION]}),
        "tools[].parameters": Row({"type": "object"}, {"tools": [FUNCTION]}),
        "tool_choice": Row("required", {"tools": [FUNCTION]}),
        "parallel_tool_calls": Row(False, {"tools": [FUNCTION]}),
        "text": Row({"format": SCHEMA}),
        "text.format": Row(SCHEMA, {"text": {}}),
        "text.format.type": Row("json_object", {"text": {"format": {"type": "text"}}}),
        "text.format.schema": Row({"type": "array"}, {"text": {"format": SCHEMA}}),
        "reasoning": Row({"effort": "low"}),
        "reasoning.effort": Row("low", {"reasoning": {}}),
        "thinking_token_budget": Row(5),
        "max_output_tokens": Row(3),
        "temperature": Row(0.5),
        "top_p": Row(0.5),
        "top_logprobs": Row(2),
        "top_k": Row(5),
        "min_p": Row(0.1),
        "seed": Row(2),
        "presence_penalty": Row(0.5),
        "frequency_penalty": Row(0.5),
        "repetition_penalty": Row(1.1),
        "stop": Row("lo"),
        "chat_template_kwargs": Row({"opening": "Well, "}),
        "priority": Row(-3),
        "cache_salt": Row("tenant"),
    },
    MESSAGES: {
        "messages": Row([USER, USER]),
        "messages[].role": Row("system", {"messages": [USER]}),
        "messages[].content": Row("other", {"messages": [USER]}),
        "messages[].content[].type": Row("text", told({"text": "Hi"})),
        "messages[].content[].text": Row("other", told(TEXT_BLOCK)),
        "messages[].content[].thinking": Row("Ho", used(THINKING)),
        "messages[].content[].id": Row("t2", used(USE)),
        "messages[].content[].name": Row("clock", used(USE)),
        "messages[].content[].input": Row({"a": 1}, used(USE)),
        "messages[].content[].tool_use_id": Row("t2", told(RESULT)),
        "messages[].content[].content": Row("snow", told(RESULT)),
        "system": Row("Be brief."),
        "tools": Row([TOOL]),
        "tools[].type": Row("custom", {"tools": [TOOL | {"type": "other"}]}),
        "tools[].name": Row("clock", {"tools": [TOOL]}),
        "tools[].description": Row("It tells the weather.", {"tools": [TOOL]}),
        "tools[].input_schema": Row({"type": "object", "properties": {}}, {"tools": [TOOL]}),
        "tool_choice": Row({"type": "any"}, {"tools": [TOOL]}),
        "tool_choice.type": Row("any", {"tools": [TOOL], "tool_choice": {"type": "auto"}}),
        "tool_choice.name": Row("weather", {"tools": [TOOL], "tool_choice": {"type": "tool"}}),
        "tool_choice.disable_parallel_tool_use": Row(True, {"tools": [TOOL], "tool_choice": {"type": "any"}}),
        "thinking": Row({"type": "disabled"}),
        "thinking.type": Row("disabled", {"thinking": {"type": "adaptive"}}),
        "thinking.budget_tokens": Row(9, THINKS),
        "thinking.display": Row("omitted", THINKS),
        "output_config": Row({"effort": "low"}),
        "output_config.effort": Row("low", {"output_config": {}}),
        "output_config.format": Row(SCHEMA, {"output_config": {}}),
        "output_config.format.type": Row("json_schema", {"output_config": {"format": SCHEMA | {"type": "other"}}}),
        "output_config.format.schema": Row({"type": "array"}, {"output_config": {"format": SCHEMA}}),
        "max_tokens": Row(3),
        "stream": Row(True),
        "temperature": Row(0.5),
        "top_p": Row(0.5),
        "top_k": Row(5),
        "stop_sequences": Row(["lo"]),
    },
}
# where the request beside a row is none without the row's value
REQUIRED = {
    "input[].type",
    "messages[].content[].type",
    "tools[].type",
    "tool_choice.name",
    "output_config.format.type",
}
NO_ROW = {"model", "previous_response_id"}  # another model is a 404; what goes on from a response has its own tests
WITHOUT_EFFECT: dict[str, tuple[Any, dict[str, Any]]] = {  # a value, and what must be there for the field to be in it
    "stream_options": ({}, {}),
    "stream_options.include_obfuscation": (True, {"stream_options": {}}),
    "max_tool_calls": (3, {}),
    "user": ("u", {}),
    "safety_identifier": ("s", {}),
    "prompt_cache_key": ("k", {}),
    "prompt_cache_retention": ("24h", {}),
    "service_tier": ("auto", {}),
    "input[].id": ("msg_1", {"input": [USER]}),
    "input[].status": ("completed", {"input": [USER]}),
    "input[].phase": ("commentary", {"input": [USER]}),
    "input[].encrypted_content": ("x", {"input": [THOUGHTS]}),
    "tools[].strict": (True, {}),
    "text.format.name": ("b", {"text": {"format": SCHEMA}}),
    "text.format.description": ("what it is for", {"text": {"format": SCHEMA}}),
    "text.format.strict": (False, {"text": {"format": SCHEMA}}),
    "reasoning.summary": ("auto", {"reasoning": {}}),
    "reasoning.generate_summary": ("auto", {"reasoning": {}}),
    "reasoning.context": ("auto", {"reasoning": {}}),
    "cache_control": ({"type": "ephemeral"}, {}),
    "speed": ("standard", {}),
    "metadata": ({}, {}),
    "metadata.user_id": ("u", {"metadata": {}}),
    "messages[].content[].is_error": (True, told(RESULT)),
    "messages[].content[].signature": ("x", used(THINKING)),
    "messages[].content[].data": ("x", used({"type": "redacted_thinking"})),
    "messages[].content[].cache_control": ({"type": "ephemeral"}, told(TEXT_BLOCK)),
    "messages[].content[].citations": ([], told(TEXT_BLOCK)),
    "tools[].cache_control": ({"type": "ephemeral"}, {}),
    "tools[].eager_input_streaming": (True, {}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows tools and thinks."""
    template = QWEN_LIKE.replace("{%- set call =", "{{- call.id }}{%- set call =")  # as Mistral's show it
    return write_tokenizer(tmp_path_factory.mktemp("checkpoint"), byte_tokenizer(), template)


@pytest.fixture
async def served(serve: Serve, worker: ScriptedWorker) -> Served:
    worker.hello = hello(max_model_len=4096)
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    worker.answer = say(f"<think>Hm</think>Hello, wörld!\n{call}\n{call}")
    served = await serve()
    await served.ready()
    return served


def request_body(endpoint: str, beside: dict[str, Any]) -> dict[str, Any]:
    own = {"input": "Hi", "seed": 1, "max_output_tokens": 300} if endpoint == RESPONSES else {"messages": [USER]}
    return {"model": MODEL} | own | ({"max_tokens": 300} if endpoint == MESSAGES else {}) | beside


def parent(endpoint: str, name: str) -> dict[str, Any]:
    """What must be there for a field to be in it."""
    if name in WITHOUT_EFFECT and not name.startswith("tools"):
        return WITHOUT_EFFECT[name][1]
    parents: dict[str, dict[str, Any]] = {
        "tools[].": {"tools": [FUNCTION if endpoint == RESPONSES else TOOL]},
        "input[].": {"input": [USER]},
        "messages[].content[].": told(TEXT_BLOCK),
        "text.": {"text": {}},
        "reasoning.": {"reasoning": {}},
    }
    return next((body for beginning, body in parents.items() if name.startswith(beginning)), {})


def put(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`with_field`, also inside the blocks of a message."""
    inner = "messages[].content[]."
    if not path.startswith(inner):
        return with_field(body, path, value)
    *first, last = body["messages"]
    *blocks, block = last["content"]
    blocks.append(block | {path.removeprefix(inner): value})
    return body | {"messages": [*first, last | {"content": blocks}]}


async def effect(served: Served, worker: ScriptedWorker, endpoint: str, body: dict[str, Any]) -> Any:
    """All that a request leads to, but its ids and times: the messages to the worker, and the reply."""
    worker.submits.clear()
    response = await served.http.post(endpoint, json=body)
    assert response.status_code == 200, (body, response.text)
    submits = [
        msgspec.json.encode(msgspec.structs.replace(submit, request_id="", group="", deadline_s=None)).decode()
        for submit in worker.submits
    ]
    if endpoint == MESSAGES:  # which has no seed
        submits = [_VARYING.sub("", submit) for submit in submits]
    reply = response.text
    if endpoint == RESPONSES and not body.get("stream"):  # but for what it repeats of the request
        kept = ("status", "output", "usage", "metadata", "store")
        reply = msgspec.json.encode({key: response.json()[key] for key in kept}).decode()
    return response.headers["content-type"], submits, _VARYING.sub("", reply)


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_an_honoured_field_changes_something(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    for name, row in HONOURED[endpoint].items():
        body = request_body(endpoint, row.beside)
        without = None
        if name not in REQUIRED:  # there is no request without
            without = await effect(served, worker, endpoint, body)
            assert await effect(served, worker, endpoint, body) == without
        assert await effect(served, worker, endpoint, put(body, name, row.value)) != without, name


@pytest.mark.parametrize("endpoint", HONOURED)
def test_every_honoured_field_has_a_row(endpoint: str) -> None:
    assert set(described(endpoint, "honoured")) - NO_ROW == set(HONOURED[endpoint])


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_a_field_without_effect_is_accepted_and_changes_nothing(
    served: Served, worker: ScriptedWorker, endpoint: str
) -> None:
    for name in described(endpoint, "without_effect"):
        body = request_body(endpoint, parent(endpoint, name))
        changed = put(body, name, WITHOUT_EFFECT[name][0])
        assert changed != body
        assert await effect(served, worker, endpoint, changed) == await effect(served, worker, endpoint, body), name


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_an_unsupported_field_is_refused_by_name(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    for name in described(endpoint, "unsupported"):
        body = request_body(endpoint, parent(endpoint, name))
        refused = await served.http.post(endpoint, json=put(body, name, {"asked": "for"}))
        assert refused.status_code == 400, name
        path = re.sub(r"\[\]", "[0]", name)
        assert refused.json()["error"]["message"].startswith(f"{path}: this server does not honour it"), name
        null = await served.http.post(endpoint, json=put(body, name, None))
        assert null.status_code == 200, (name, null.text)


def test_what_counts_tokens_reads_the_same_fields() -> None:
    endpoints = capabilities(MODEL)["endpoints"]
    counts, messages = (endpoints[path]["fields"] for path in (f"{MESSAGES}/count_tokens", MESSAGES))
    assert counts.items() <= messages.items()
    assert set(messages) - set(counts) == {
        "max_tokens",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "stop_sequences",
        "metadata",
        "metadata.user_id",
        "service_tier",
        "inference_geo",
        "container",
    }
