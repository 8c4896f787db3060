"""A real worker with a tiny random model writes nonsense; yet what must be a call is one, and thoughts end in time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from cluster.gateway.pool import Endpoint
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.checkpoints import random_tensors, write
from tests.support.tokenizers_ import build, library
from tests.support.worker_process import TINY, RunningWorker
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

START_S = 120.0
CONFIG = {**TINY, "vocab_size": 520}
PAINT = {
    "name": "paint",
    "parameters": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "coats": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["colour", "coats"],
        "additionalProperties": False,
    },
}
ROLL = {"name": "roll", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [{"type": "function", "function": function} for function in (PAINT, ROLL)]
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Paint it."}], "tools": TOOLS}
BUDGET = 6


def checkpoint(folder: Path) -> Path:
    build("byte_level", write(folder, CONFIG, random_tensors(CONFIG)))
    tokenizer = library(folder)
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<tool_call>", "</tool_call>", "<think>")])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("</think>", "[TOOL_CALLS]", "[ARGS]")])
    return write_tokenizer(folder, tokenizer, QWEN_LIKE)


def valid(call: dict[str, Any]) -> str:
    """The name of a call whose arguments are as its tool's schema asks."""
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    if name == "paint":
        assert set(arguments) == {"colour", "coats"}
        assert arguments["colour"] in ("red", "green")
        assert arguments["coats"] in range(1, 10)
    else:
        assert (name, arguments) == ("roll", {})
    return name


async def calls_of(served: Served, **fields: Any) -> tuple[list[str], dict[str, Any]]:
    response = await served.http.post("/v1/chat/completions", json=ASK | fields, timeout=START_S)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    message = choice["message"]
    assert message["content"] is None, "calls and nothing else"
    return [valid(call) for call in message["tool_calls"]], choice


async def test_calls_are_forced_and_thoughts_are_ended(serve: Serve, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model")
    with RunningWorker(path, tmp_path, "w") as worker:
        endpoints = [Endpoint("w", worker.address)]
        gateways = {
            parser: await serve(endpoints=endpoints, model_path=path, tool_parser=parser)
            for parser in ("hermes", "mistral")
        }
        async with asyncio.timeout(START_S):
            while any(served.app.state.gateway.pool.num_alive == 0 for served in gateways.values()):
                await asyncio.sleep(0.01)
        for served in gateways.values():
            found = set()
            for seed in range(3):
                fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
                names, choice = await calls_of(served, **fields)
                assert len(names) == 1
                assert choice["finish_reason"] == "tool_calls"
                found |= set(names)
                named = {"type": "function", "function": {"name": "paint"}}
                names, choice = await calls_of(served, tool_choice=named, seed=seed)
                assert (names, choice["finish_reason"]) == (["paint"], "stop")
            open_thoughts = {"chat_template_kwargs": {"thinks_at_once": True}, "thinking_token_budget": BUDGET}
            names, choice = await calls_of(
                served, tool_choice="required", parallel_tool_calls=False, seed=1, **open_thoughts
            )
            assert len(names) == 1, "behind its thoughts"

        end = served.app.state.gateway.tokenizer.added_tokens["</think>"]
        for stream in (False, True):
            fields = open_thoughts | {
                "tools": [],
                "max_tokens": 30,
                "return_token_ids": True,
                "ignore_eos": True,
                "seed": 1,
            }
            response = await served.http.post("/v1/chat/completions", json=ASK | fields | {"stream": stream})
            lines = response.text.replace("data: ", "").replace("[DONE]", "").split("\n\n")
            choices = [json.loads(line)["choices"][0] for line in lines if line.strip()]
            ids = [token for choice in choices for token in choice.get("token_ids", [])]
            assert ids.index(end) <= BUDGET
            parts = [choice.get("delta") or choice.get("message") or {} for choice in choices]
            text = "".join((part.get("reasoning") or "") + (part.get("content") or "") for part in parts)
            assert text.count("</think>") == ids.count(end) - 1, "the first ended the thoughts; any other is text"
            assert any(part.get("content") for part in parts), "it answers"

        error = (
            await served.http.post("/v1/chat/completions", json=ASK | {"tools": [], "guided_grammar": 'root ::= "a"'})
        ).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_grammar", "guided_grammar")
        for pattern in ("(" * 3000, "[", "(?=a)b"):
            response = await served.http.post(
                "/v1/chat/completions", json=ASK | {"tools": [], "guided_regex": pattern}, timeout=START_S
            )
            assert response.status_code == 400, (pattern[:20], response.text)
            assert response.json()["error"]["param"] == "guided_regex"
