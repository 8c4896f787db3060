"""`/tokenize` and `/detokenize`: texts and chats to tokens and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.control.model import DEMO_PATH
from cluster.gateway.tokenizer import TextTokenizer
from cluster.gateway.tokenizing import MAX_CHARS
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.scripted_worker import BEGIN_ID, END_ID, VOCAB_SIZE, ScriptedWorker, byte_tokenizer, text_ids
from tests.unit.gateway.conftest import MODEL, Served

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows tools."""
    return write_tokenizer(tmp_path_factory.mktemp("checkpoint"), byte_tokenizer(), QWEN_LIKE)


async def post(served: Served, path: str, **body: Any) -> dict[str, Any]:
    response = await served.http.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def test_a_text_to_tokens_and_back(served: Served, worker: ScriptedWorker) -> None:
    ids = text_ids("Hello, wörld! 🦀")
    for prefix in ("", "/v1"):
        found = await post(served, f"{prefix}/tokenize", model=MODEL, prompt="Hello, wörld! 🦀")
        assert found == {
            "count": len(ids) + 1,
            "max_model_len": worker.hello.max_model_len,
            "tokens": [BEGIN_ID, *ids],
            "token_strs": None,
        }
        assert await post(served, f"{prefix}/detokenize", tokens=ids) == {"prompt": "Hello, wörld! 🦀"}
    found = await post(served, "/tokenize", prompt="Hi", add_special_tokens=False, return_token_strs=True)
    assert (found["tokens"], found["token_strs"]) == (text_ids("Hi"), ["H", "i"])
    assert (await post(served, "/tokenize", prompt="", add_special_tokens=False))["count"] == 0
    long = "x" * 10_000  # beyond the context, and off the event loop
    assert (await post(served, "/tokenize", prompt=long))["tokens"] == [BEGIN_ID, *text_ids(long)]
    assert await post(served, "/detokenize", tokens=text_ids(long)) == {"prompt": long}
    assert await post(served, "/detokenize", tokens=[BEGIN_ID, 72, END_ID]) == {"prompt": "<|endoftext|>H<|im_end|>"}
    assert await post(served, "/detokenize", tokens=[]) == {"prompt": ""}
    assert worker.submits == []


async def test_a_chat_has_the_tokens_that_its_completion_has(served: Served, worker: ScriptedWorker) -> None:
    for body in (
        {"messages": [USER]},
        {"messages": [USER], "add_generation_prompt": False},
        {"messages": [USER], "add_special_tokens": True},
        {"messages": [USER], "chat_template_kwargs": {"opening": "Well, "}},
        {"messages": [USER, {"role": "assistant", "content": "We"}], "continue_final_message": True},
        {"messages": [USER], "tools": [TOOL]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    ):
        worker.submits.clear()
        await post(served, "/v1/chat/completions", max_tokens=1, **body)
        found = await post(served, "/tokenize", **body)
        assert tuple(found["tokens"]) == worker.submits[0].prompt_ids, body
        assert found["count"] == len(found["tokens"])


async def test_what_is_refused_names_its_field(served: Served) -> None:
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "Hi", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "Hi", "tools": [TOOL]}, "tools"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [USER | {"content": None}]}, "messages[0].content"),
        ("/tokenize", {"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", {"content": "Hi"}, "content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": [72, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**31]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["H"]}, "tokens[0]"),
    ):
        response = await served.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), body
    assert (await served.http.post("/tokenize", json={"model": "another", "prompt": "Hi"})).status_code == 404
    assert (await served.http.post("/detokenize", json={"model": "another", "tokens": []})).status_code == 404
    assert (await served.http.get("/tokenize")).status_code == 405


TOKENIZERS = {"bytes": TextTokenizer(byte_tokenizer())}
DEMO_TOKENIZER = Path(DEMO_PATH) / "tokenizer.json"
if DEMO_TOKENIZER.exists():
    TOKENIZERS["demo"] = TextTokenizer(Tokenizer.from_file(str(DEMO_TOKENIZER)))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=200))
def test_texts_come_back(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(tokenizer.token(token_id) is not None for token_id in ids)


async def test_a_text_of_which_too_much_would_be_told(served: Served) -> None:
    refused = await served.http.post("/tokenize", json={"prompt": "a" * (MAX_CHARS + 1)})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
