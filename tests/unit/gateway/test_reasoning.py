"""Replies that think before they answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.protocol import Thinking
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello, say
from tests.unit.gateway.conftest import Serve, Served
from tests.unit.gateway.test_tools import ULM, WEATHER, both_ways

pytestmark = [pytest.mark.anyio, pytest.mark.needs("openai")]

CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ULM}}}\n</tool_call>'
AT_ONCE = {"chat_template_kwargs": {"thinks_at_once": True}}


@pytest.fixture
async def thinker(serve: Serve, worker: ScriptedWorker, tmp_path: Path) -> Served:
    worker.hello = hello(max_model_len=4096)
    served = await serve(model_path=write_tokenizer(tmp_path / "qwen", byte_tokenizer(), QWEN_LIKE))
    await served.ready()
    return served


def prompt_of(worker: ScriptedWorker) -> str:
    return bytes(token for token in worker.submits[-1].prompt_ids if token < 256).decode()


async def test_thoughts_are_split_off_under_both_names(thinker: Served, worker: ScriptedWorker) -> None:
    for text, fields in (("<think>\nHm, ö.\n</think>\n\nYes.", {}), ("Hm, ö.\n</think>\n\nYes.", AT_ONCE)):
        worker.answer = say(text)
        for reply in await both_ways(thinker, extra_body=fields):
            assert (reply["reasoning"], reply["content"], reply["finish"]) == ("Hm, ö.", "Yes.", "stop")
        message = (await thinker.chat(**fields)).json()["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "Hm, ö."
        for reply in await both_ways(thinker, extra_body=fields | {"include_reasoning": False}):
            assert (reply["reasoning"], reply["content"]) == ("", "Yes.")
    worker.answer = say(f"Hm.</think>\n{CALL}")
    for reply in await both_ways(thinker, tools=[WEATHER], extra_body=AT_ONCE):
        assert (reply["reasoning"], reply["calls"]) == ("Hm.", [("weather", ULM)])


async def test_a_final_message_is_continued_in_its_thoughts(thinker: Served, worker: ScriptedWorker) -> None:
    worker.answer = say(" so.</think>Yes.")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>Hm,"}]
    reply = (await thinker.chat(messages=messages, continue_final_message=True)).json()["choices"][0]["message"]
    assert (reply["reasoning"], reply["content"]) == ("so.", "Yes.")
    messages[1]["content"] = "<think>Hm.</think>Well,"
    worker.answer = say(" yes <think>.")
    reply = (await thinker.chat(messages=messages, continue_final_message=True)).json()["choices"][0]["message"]
    assert (reply.get("reasoning"), reply["content"]) == (None, " yes <think>.")


async def test_effort_reaches_the_template(thinker: Served, worker: ScriptedWorker) -> None:
    for effort in ("minimal", "low", "medium", "high", "xhigh"):
        await thinker.chat(reasoning_effort=effort)
        assert prompt_of(worker).endswith(f"assistant effort={effort}\n")
    worker.answer = say("<think> is a mark.")
    reply = (await thinker.chat(reasoning_effort="none")).json()["choices"][0]["message"]
    assert prompt_of(worker).endswith("effort=none\n<think>\n\n</think>\n\n")
    assert reply["content"] == "<think> is a mark.", "thoughts are closed"
    assert (await thinker.chat(reasoning_effort="most")).json()["error"]["param"] == "reasoning_effort"


async def test_a_model_that_does_not_think_says_so(served: Served) -> None:
    for field, value in (("reasoning_effort", "low"), ("thinking_token_budget", 5)):
        error = (await served.chat(**{field: value})).json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", field)


async def test_messages_take_thoughts_back(thinker: Served, worker: ScriptedWorker) -> None:
    for name in ("reasoning", "reasoning_content"):
        assistant = {"role": "assistant", "content": "Yes.", name: "Hm."}
        await thinker.chat(messages=[{"role": "user", "content": "Hi"}, assistant])
        assert "<think>\nHm.\n</think>\n\nYes." in prompt_of(worker)


async def test_the_worker_is_told_of_thoughts(thinker: Served, worker: ScriptedWorker) -> None:
    cases: list[tuple[dict[str, Any], Thinking | None]] = [
        ({}, None),
        ({"thinking_token_budget": 7}, Thinking(start="<think>", end="</think>", is_open=False, budget=7)),
        (AT_ONCE | {"thinking_token_budget": 0}, Thinking(start="<think>", end="</think>", is_open=True, budget=0)),
        (AT_ONCE | {"guided_regex": "a"}, Thinking(start="<think>", end="</think>", is_open=True)),
        (
            AT_ONCE | {"tools": [WEATHER], "tool_choice": "required"},
            Thinking(start="<think>", end="</think>", is_open=True),
        ),
        ({"guided_regex": "a", "reasoning_effort": "none"}, None),
    ]
    for fields, thinking in cases:
        assert (await thinker.chat(**fields)).status_code == 200
        assert worker.submits[-1].sampling.thinking == thinking, fields


async def test_without_the_parser_all_is_content(serve: Serve, worker: ScriptedWorker, tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "qwen", byte_tokenizer(), QWEN_LIKE)
    served = await serve(model_path=path, reasoning_parser="none")
    worker.answer = say("<think>Hm.</think>Yes.")
    message = (await served.chat()).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>Hm.</think>Yes.", "refusal": None}
