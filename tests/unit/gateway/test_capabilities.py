"""What /v1/capabilities says of each field is what happens: one row a field, and no field without a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cluster.gateway.capabilities import capabilities
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


@dataclass(frozen=True)
class Row:
    """A value that asks for something, and the rest of a request in which it can."""

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)


TAG = {"structures": [{"begin": "<f>", "schema": {"type": "object"}, "end": "</f>"}], "triggers": ["<f"]}
CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLED = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}
TOOL = {"type": "function", "function": {"name": "weather"}}


def _tag(path: str) -> dict[str, Row]:
    """The members of a structural tag, which stand in two places."""
    beside = {path.partition(".")[0]: _nested(path.partition(".")[2], TAG | {"type": "structural_tag"})}
    other = [TAG["structures"][0] | {"begin": "<f g>"}]
    return {
        f"{path}.structures": Row(other, beside),
        f"{path}.structures[].begin": Row("<f g>", beside),
        f"{path}.structures[].schema": Row({"type": "array"}, beside),
        f"{path}.structures[].end": Row("<end>", beside),
        f"{path}.triggers": Row(["<f>"], beside),
    }


def _nested(path: str, value: Any) -> Any:
    return {path: value} if path else value


SHARED = {
    "stream": Row(True),
    "stream_options.include_usage": Row(True, {"stream": True}),
    "stream_options.continuous_usage_stats": Row(True, {"stream": True}),
    "n": Row(2),
    "temperature": Row(0.5),
    "top_p": Row(0.5),
    "top_k": Row(5),
    "min_p": Row(0.1),
    "typical_p": Row(0.9),
    "repetition_penalty": Row(1.1),
    "presence_penalty": Row(0.5),
    "frequency_penalty": Row(0.5),
    "seed": Row(2),
    "logit_bias": Row({"65": 5}),
    "bad_words": Row(["wörld"]),
    "response_format": Row({"type": "json_object"}),
    "response_format.type": Row("json_object", {"response_format": {"type": "text"}}),
    "response_format.json_schema": Row(SCHEMA["json_schema"], {"response_format": {"type": "json_schema"}}),
    "response_format.json_schema.schema": Row({"type": "array"}, {"response_format": SCHEMA}),
    **_tag("response_format"),
    "structured_outputs": Row({"regex": "a*"}),
    "structured_outputs.json": Row({"type": "array"}, {"structured_outputs": {"json": {}}}),
    "structured_outputs.regex": Row("b*", {"structured_outputs": {"regex": "a*"}}),
    "structured_outputs.choice": Row(["b"], {"structured_outputs": {"choice": ["a"]}}),
    "structured_outputs.grammar": Row('start: "b"', {"structured_outputs": {"grammar": 'start: "a"'}}),
    "structured_outputs.json_object": Row(True, {"structured_outputs": {}}),
    "structured_outputs.structural_tag": Row(TAG, {"structured_outputs": {}}),
    "structured_outputs.structural_tag.type": Row(
        "structural_tag", {"structured_outputs": {"structural_tag": TAG | {"type": "other"}}}
    ),
    **_tag("structured_outputs.structural_tag"),
    "guided_json": Row({"type": "array"}),
    "guided_regex": Row("a*"),
    "guided_choice": Row(["a"]),
    "guided_grammar": Row('start: "a"'),
    "truncate_prompt_tokens": Row(1),
    "truncation_side": Row("right", {"truncate_prompt_tokens": 1}),
    "max_tokens": Row(3),
    "min_tokens": Row(30),
    "stop": Row("lo"),
    "stop_token_ids": Row([108]),
    "include_stop_str_in_output": Row(True, {"stop": "lo"}),
    "ignore_eos": Row(True),
    "skip_special_tokens": Row(False),
    "prompt_logprobs": Row(0),
    "return_token_ids": Row(True),
    "priority": Row(-3),
    "cache_salt": Row("tenant"),
}
HONOURED = {
    "/v1/completions": SHARED
    | {
        "prompt": Row("other"),
        "echo": Row(True),
        "logprobs": Row(2),
        "add_special_tokens": Row(False),
    },
    "/v1/chat/completions": SHARED
    | {
        "messages": Row([USER, USER]),
        "messages[].role": Row("system"),
        "messages[].content": Row("other"),
        "messages[].name": Row("Ann"),
        "messages[].tool_call_id": Row("call-1", {"messages": [USER | {"role": "tool"}]}),
        "messages[].reasoning": Row("so", {"messages": [USER | {"role": "assistant"}]}),
        "messages[].reasoning_content": Row("so", {"messages": [USER | {"role": "assistant"}]}),
        "messages[].tool_calls": Row([CALL], {"messages": [USER, USER | {"role": "assistant"}]}),
        "messages[].tool_calls[].id": Row("call-2", CALLED),
        "messages[].tool_calls[].type": Row(
            "function", {"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"type": "other"}]}]}
        ),
        "messages[].tool_calls[].function": Row({"name": "clock", "arguments": "{}"}, CALLED),
        "messages[].tool_calls[].function.name": Row("clock", CALLED),
        "messages[].tool_calls[].function.arguments": Row('{"a": 1}', CALLED),
        "tools": Row([TOOL]),
        "tools[].type": Row("function", {"tools": [TOOL | {"type": "other"}]}),
        "tools[].function": Row({"name": "clock"}, {"tools": [TOOL]}),
        "tools[].function.name": Row("clock", {"tools": [TOOL]}),
        "tools[].function.description": Row("It tells the weather.", {"tools": [TOOL]}),
        "tools[].function.parameters": Row({"type": "object"}, {"tools": [TOOL]}),
        "tool_choice": Row("required", {"tools": [TOOL]}),
        "parallel_tool_calls": Row(False, {"tools": [TOOL], "tool_choice": "required"}),
        "reasoning_effort": Row("low"),
        "include_reasoning": Row(False, {"chat_template_kwargs": {"thinks_at_once": True}}),
        "thinking_token_budget": Row(5),
        "max_completion_tokens": Row(3),
        "logprobs": Row(True),
        "top_logprobs": Row(2, {"logprobs": True}),
        "chat_template_kwargs": Row({"opening": "Well, "}),
        "add_generation_prompt": Row(False),
        "continue_final_message": Row(True, {"messages": [USER, USER | {"role": "assistant"}]}),
        "add_special_tokens": Row(True),
    },
}
# where the request beside a row is none without the row's value
REQUIRED = {
    "prompt",
    "messages",
    "response_format.json_schema",
    "structured_outputs.json_object",
    "structured_outputs.structural_tag",
    "structured_outputs.structural_tag.type",
    "messages[].tool_calls[].type",
    "tools[].type",
}
NO_ROW = {"model", "stream_options"}  # another model is a 404; stream_options asks through its members
WITHOUT_EFFECT: dict[str, Any] = {
    "stream_options.include_obfuscation": True,
    "response_format.json_schema.name": "b",
    "response_format.json_schema.description": "what it is for",
    "response_format.json_schema.strict": False,
    "user": "u",
    "metadata": {"k": "v"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "best_of": 1,
    "session_id": "s",
    "structured_outputs.disable_fallback": True,
    "structured_outputs.disable_any_whitespace": True,
    "tools[].function.strict": True,
    "messages[].tool_calls[].index": 0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows tools and thinks."""
    template = QWEN_LIKE.replace("{%- set call =", "{{- call.id }}{%- set call =")  # as Mistral's show it
    return write_tokenizer(tmp_path_factory.mktemp("checkpoint"), byte_tokenizer(), template)


@pytest.fixture
async def served(serve: Serve, worker: ScriptedWorker) -> Served:
    worker.hello = hello(max_model_len=4096)
    served = await serve()
    await served.ready()
    return served


def described(endpoint: str, support: str) -> list[str]:
    fields = capabilities(MODEL)["endpoints"][endpoint]["fields"]
    return [name for name, field in fields.items() if field["support"] == support]


def request_body(endpoint: str, beside: dict[str, Any]) -> dict[str, Any]:
    prompt = {"prompt": "Hi"} if endpoint == "/v1/completions" else {"messages": [USER]}
    return {"model": MODEL, "seed": 1, "max_tokens": 40} | prompt | beside


def parent(name: str) -> dict[str, Any]:
    """What must be there for a field to be in it."""
    parents: dict[str, dict[str, Any]] = {
        "stream_options.": {"stream": True, "stream_options": {}},
        "response_format.json_schema.": {"response_format": SCHEMA},
        "response_format.": {"response_format": {"type": "text"}},
        "structured_outputs.structural_tag.": {"structured_outputs": {"structural_tag": TAG}},
        "structured_outputs.": {"structured_outputs": {"regex": "a"}},
        "tools[].": {"tools": [TOOL]},
        "messages[].tool_calls[].": CALLED,
    }
    return next((body for beginning, body in parents.items() if name.startswith(beginning)), {})


def with_field(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `body` with `value` at a path such as `stream_options.include_usage` or `messages[].role`."""
    head, _, rest = path.partition(".")
    if not rest:
        return body | {head: value}
    if head.endswith("[]"):
        name = head.removesuffix("[]")
        return body | {name: [*body[name][:-1], with_field(body[name][-1], rest, value)]}
    return body | {head: with_field(body.get(head, {}), rest, value)}


async def effect(served: Served, worker: ScriptedWorker, endpoint: str, body: dict[str, Any]) -> Any:
    """All that a request leads to, but its id and its time: the messages to the worker, and the reply's shape."""
    worker.submits.clear()
    response = await served.http.post(endpoint, json=body)
    assert response.status_code == 200, response.text
    submits = [
        msgspec.to_builtins(msgspec.structs.replace(submit, request_id="", group="", deadline_s=None))
        for submit in worker.submits
    ]
    return response.headers["content-type"], submits, without_id(response)


def without_id(response: httpx.Response) -> list[Any]:
    lines = response.text.replace("data: ", "").replace("[DONE]", "{}").split("\n\n")
    bodies = [msgspec.json.decode(line) for line in lines if line.strip()]
    return [{key: value for key, value in body.items() if key not in ("id", "created")} for body in bodies]


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_an_honoured_field_changes_something(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    for name, row in HONOURED[endpoint].items():
        body = request_body(endpoint, row.beside)
        without = None
        if name not in REQUIRED:  # there is no request without
            without = await effect(served, worker, endpoint, body)
        assert await effect(served, worker, endpoint, with_field(body, name, row.value)) != without, name


@pytest.mark.parametrize("endpoint", HONOURED)
def test_every_honoured_field_has_a_row(endpoint: str) -> None:
    assert set(described(endpoint, "honoured")) - NO_ROW == set(HONOURED[endpoint])


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_a_field_without_effect_is_accepted_and_changes_nothing(
    served: Served, worker: ScriptedWorker, endpoint: str
) -> None:
    for name in described(endpoint, "without_effect"):
        body = request_body(endpoint, parent(name))
        changed = with_field(body, name, WITHOUT_EFFECT[name])
        assert changed != body
        assert await effect(served, worker, endpoint, changed) == await effect(served, worker, endpoint, body), name


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_an_unsupported_field_is_refused_by_name(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    for name in described(endpoint, "unsupported"):
        body = with_field(request_body(endpoint, parent(name)), name, {"asked": "for"})
        response = await served.http.post(endpoint, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter"), name
        assert error["param"] == name.replace("[]", "[0]")
        assert error["param"] in error["message"]
    assert worker.submits == []


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_null_asks_for_nothing(served: Served, endpoint: str) -> None:
    for name in described(endpoint, "unsupported"):
        body = with_field(request_body(endpoint, parent(name)), name, None)
        response = await served.http.post(endpoint, json=body)
        assert response.status_code == 200, response.text


async def test_the_page_is_served(served: Served) -> None:
    page = (await served.http.get("/v1/capabilities")).json()
    completion = page["endpoints"]["/v1/completions"]["fields"]
    assert completion["temperature"] == {"support": "honoured", "type": "number", "minimum": 0.0, "maximum": 2.0}
    assert completion["suffix"] == {"support": "unsupported", "accepted": [""]}
    assert completion["store"] == {"support": "without_effect", "accepted": [False], "type": "boolean"}
    assert page["endpoints"]["/v1/chat/completions"]["fields"]["messages[].role"]["enum"] == [
        "system",
        "developer",
        "user",
        "assistant",
        "tool",
    ]
