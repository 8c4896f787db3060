"""What /v1/capabilities says of the fields of embeddings and of the tokenizer's endpoints is what happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.gateway.capabilities import ENDPOINTS, capabilities
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer
from tests.unit.gateway.conftest import MODEL, Served
from tests.unit.gateway.test_capabilities import CALL, TOOL, Row, described, with_field

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "Hi"}
TEXT: dict[str, Any] = {"prompt": "Hi"}
CHAT: dict[str, Any] = {"messages": [USER]}
CALLED = {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}
SAID = {"messages": [USER | {"role": "assistant"}]}

BASE: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "Hi"},
    "/tokenize": {},
    "/detokenize": {"tokens": [72]},
}
HONOURED: dict[str, dict[str, Row]] = {
    "/v1/embeddings": {
        "input": Row("other"),
        "encoding_format": Row("base64"),
        "pooling": Row("mean"),
        "add_special_tokens": Row(False),
        "priority": Row(-3),
        "cache_salt": Row("tenant"),
    },
    "/tokenize": {
        "prompt": Row("other"),
        "messages": Row([USER]),
        "messages[].role": Row("system", CHAT),
        "messages[].content": Row("other", CHAT),
        "messages[].tool_call_id": Row("call-1", {"messages": [USER | {"role": "tool"}]}),
        "messages[].reasoning": Row("so", SAID),
        "messages[].reasoning_content": Row("so", SAID),
        "messages[].tool_calls": Row([CALL], {"messages": [USER, USER | {"role": "assistant"}]}),
        "messages[].tool_calls[].id": Row("call-2", CALLED),
        "messages[].tool_calls[].function": Row({"name": "clock", "arguments": "{}"}, CALLED),
        "messages[].tool_calls[].function.name": Row("clock", CALLED),
        "messages[].tool_calls[].function.arguments": Row('{"a": 1}', CALLED),
        "add_special_tokens": Row(False, TEXT),
        "return_token_strs": Row(True, TEXT),
        "add_generation_prompt": Row(False, CHAT),
        "continue_final_message": Row(True, SAID),
        "chat_template_kwargs": Row({"opening": "Well, "}, CHAT),
        "tools": Row([TOOL], CHAT),
        "tools[].function": Row({"name": "clock"}, CHAT | {"tools": [TOOL]}),
        "tools[].function.name": Row("clock", CHAT | {"tools": [TOOL]}),
        "tools[].function.description": Row("It tells the weather.", CHAT | {"tools": [TOOL]}),
        "tools[].function.parameters": Row({"type": "object"}, CHAT | {"tools": [TOOL]}),
    },
    "/detokenize": {"tokens": Row([73])},
}
# what a template need not show, and what can have one value alone
NO_ROW = {"model", "messages[].name", "messages[].tool_calls[].type", "tools[].type"}
WITHOUT_EFFECT: dict[str, Any] = {"user": "u", "messages[].tool_calls[].index": 0, "tools[].function.strict": True}
BESIDE = {"messages[].tool_calls[].": CALLED, "messages[].": CHAT, "tools[].": CHAT | {"tools": [TOOL]}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows tools and thinks."""
    template = QWEN_LIKE.replace("{%- set call =", "{{- call.id }}{%- set call =")  # as Mistral's show it
    return write_tokenizer(tmp_path_factory.mktemp("checkpoint"), byte_tokenizer(), template)


def beside(endpoint: str, name: str) -> dict[str, Any]:
    """A request in which a field can stand."""
    found = next((body for beginning, body in BESIDE.items() if name.startswith(beginning)), None)
    if found is None and endpoint == "/tokenize":
        found = TEXT
    return BASE[endpoint] | (found or {})


async def effect(served: Served, worker: ScriptedWorker, endpoint: str, body: dict[str, Any]) -> Any:
    """All that a request leads to, but its id and its time."""
    worker.submits.clear()
    response = await served.http.post(endpoint, json={"model": MODEL} | body)
    if response.status_code == 400 and response.json()["error"]["code"] == "invalid_value":
        return None  # there is no such request
    assert response.status_code == 200, response.text
    reply = {key: value for key, value in response.json().items() if key not in ("id", "created")}
    return reply, [
        msgspec.to_builtins(msgspec.structs.replace(submit, request_id="", deadline_s=None))
        for submit in worker.submits
    ]


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_an_honoured_field_changes_something(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    for name, row in HONOURED[endpoint].items():
        body = BASE[endpoint] | row.beside
        without = await effect(served, worker, endpoint, body)
        found = await effect(served, worker, endpoint, with_field(body, name, row.value))
        assert found is not None, name
        assert found != without, name


@pytest.mark.parametrize("endpoint", HONOURED)
def test_every_honoured_field_has_a_row(endpoint: str) -> None:
    assert set(described(endpoint, "honoured")) - NO_ROW == set(HONOURED[endpoint])


@pytest.mark.parametrize("endpoint", HONOURED)
async def test_the_others_change_nothing_or_are_refused(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    for name in described(endpoint, "without_effect"):
        body = beside(endpoint, name)
        changed = with_field(body, name, WITHOUT_EFFECT[name])
        assert await effect(served, worker, endpoint, changed) == await effect(served, worker, endpoint, body), name
    for name in described(endpoint, "unsupported"):
        body = beside(endpoint, name)
        response = await served.http.post(endpoint, json=with_field(body, name, {"asked": "for"}))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter"), name
        assert error["param"] == name.replace("[]", "[0]")
        assert await effect(served, worker, endpoint, with_field(body, name, None)) is not None, name


async def test_both_places_of_the_tokenizers_endpoints_are_one(served: Served) -> None:
    endpoints = capabilities(MODEL)["endpoints"]
    for path in ("/tokenize", "/detokenize"):
        assert endpoints[path] == endpoints[f"/v1{path}"]
        assert ENDPOINTS[path] is ENDPOINTS[f"/v1{path}"]
    tested = {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"}
    assert set(ENDPOINTS) == tested | set(HONOURED) | {f"/v1{path}" for path in ("/tokenize", "/detokenize")}
    page = (await served.http.get("/v1/capabilities")).json()["endpoints"]["/v1/embeddings"]["fields"]
    assert page["dimensions"]["support"] == "unsupported"
    assert page["pooling"]["enum"] == ["last", "mean"]
