"""Prompts of megabytes: refused at once where they cannot fit, and never in the way of others."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from cluster.gateway.threads import SHORT_CHARS
from cluster.gateway.tokenizer import TextTokenizer
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, byte_tokenizer, hello
from tests.unit.gateway.conftest import Serve, Served

pytestmark = pytest.mark.anyio

HUGE = 7_900_000  # a chat template's output may be 8 MiB
PROMPT_S = 5.0  # to refuse all of them, or to tell that one took seconds


def chat_of(num_chars: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x" * num_chars}]}


@pytest.mark.parametrize("kind", ["completion", "chat"])
async def test_what_cannot_fit_is_refused_at_once(served: Served, worker: ScriptedWorker, kind: str) -> None:
    start = time.perf_counter()

    async def huge() -> float:
        response = await (served.complete(prompt="x" * HUGE) if kind == "completion" else served.chat(**chat_of(HUGE)))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == ("prompt" if kind == "completion" else "messages")
        assert "512 tokens" in error["message"]
        assert f"at least {HUGE // 13}"[:-1] in error["message"]
        return time.perf_counter() - start

    requests = [asyncio.create_task(huge()) for _ in range(8)]
    await asyncio.sleep(0)
    assert (await served.chat(max_tokens=1)).status_code == 200
    assert time.perf_counter() - start < PROMPT_S
    assert max(await asyncio.gather(*requests)) < PROMPT_S
    assert len(worker.submits) == 1


async def test_too_many_token_ids_are_counted(served: Served) -> None:
    error = (await served.complete(prompt=[65] * 2000, echo=True)).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "2000" in error["message"]
    assert "512" in error["message"]


async def test_short_prompts_do_not_wait_for_long_ones(
    serve: Serve, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.hello = hello(max_model_len=10**8)
    await worker.kill()
    await worker.start()
    served = await serve()
    await served.ready()
    may_go_on = threading.Event()
    original = TextTokenizer.encode

    def encode(self: TextTokenizer, text: str, **options: Any) -> list[int]:
        if len(text) > SHORT_CHARS:
            assert may_go_on.wait(DEADLINE_S)
            text = text[:10]
        return original(self, text, **options)

    monkeypatch.setattr(TextTokenizer, "encode", encode)
    long = [asyncio.create_task(served.complete(prompt="x" * (SHORT_CHARS + 1), max_tokens=1)) for _ in range(8)]
    long += [asyncio.create_task(served.chat(**chat_of(SHORT_CHARS + 1), max_tokens=1)) for _ in range(8)]
    try:
        for num_chars in (10, 30_000):
            assert (await served.complete(prompt="x" * num_chars, max_tokens=1)).status_code == 200
            assert (await served.chat(**chat_of(num_chars), max_tokens=1)).status_code == 200
    finally:
        may_go_on.set()
    assert [response.status_code for response in await asyncio.gather(*long)] == [200] * 16


async def test_a_long_prompt_waits_until_its_deadline_only(
    serve: Serve, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(request_timeout_s=0.2)
    may_go_on = threading.Event()
    monkeypatch.setattr(TextTokenizer, "encode", lambda *_, **__: [1] * may_go_on.wait(DEADLINE_S))
    try:
        response = await served.complete(prompt="x" * 5000)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    finally:
        may_go_on.set()


def test_tokenising_leaves_other_threads_alone() -> None:
    tokenizer = TextTokenizer(byte_tokenizer())
    thread = threading.Thread(target=tokenizer.encode, args=("x" * 2_000_000,), kwargs={"special_tokens": False})
    thread.start()
    laps = 0
    while thread.is_alive():
        time.sleep(0.001)
        laps += 1
    assert laps > 20, "Python's lock was held"
