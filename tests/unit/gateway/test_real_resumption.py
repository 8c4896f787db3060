"""Real workers with a tiny model behind the gateway: what one of them loses in mid-stream, another goes on with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.gateway.pool import Endpoint, WorkerPool
from tests.support.worker_process import RunningWorker, tiny_checkpoint
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(180)]

START_S = 120.0
PAGE_SIZE = 16
# All begin with the same page, so all go to the same worker.
PROMPT = "What does the quick brown fox do? It jumps over the lazy dog, one, two, three, four times a day."
MAX_TOKENS = 500
BEFORE_THE_BLOW = 15  # tokens of each sequence
COLOURS = ["red", "green", "blue"]
SCHEMA = {"type": "array", "items": {"enum": COLOURS}, "minItems": 100, "maxItems": 100}
REQUESTS: dict[str, dict[str, Any]] = {
    "samples": {"n": 2, "temperature": 0.9, "seed": 11, "logprobs": 2, "presence_penalty": 0.5},
    "greedy": {"temperature": 0, "logprobs": 0},
    "grammar": {
        "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "colours", "schema": SCHEMA}},
    },
    "stop": {"temperature": 1.0, "seed": 5},  # and a stop string, which is found in its text
}
STUCK_AFTER = 40  # tokens
STUCK = f"""
import threading
from workers.engine import Engine
from workers.server import main
step = Engine.step
def hang_in_the_end(engine):
    if engine.snapshot().generated_tokens >= {STUCK_AFTER}:
        threading.Event().wait()
    return step(engine)
Engine.step = hang_in_the_end
main()
"""


@dataclass
class Choice:
    """What a client got of one sequence."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)  # of each token: its own, its words, the best ones
    finish: list[tuple[str, Any]] = field(default_factory=list)

    def take(self, part: dict[str, Any]) -> None:
        assert not self.finish, "nothing comes behind the end"
        self.ids += part["token_ids"]
        self.text += part["text"]
        if part["logprobs"] is not None:
            found = part["logprobs"]
            self.logprobs += zip(found["token_logprobs"], found["tokens"], found["top_logprobs"], strict=True)
        if part["finish_reason"] is not None:
            self.finish.append((part["finish_reason"], part["stop_reason"]))


Reply = dict[int, Choice]


async def ask(served: Served, body: dict[str, Any], choices: Reply, on_token: Callable[[], None]) -> None:
    whole = {"model": MODEL, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "return_token_ids": True, "stream": True}
    if "response_format" not in body:
        whole["ignore_eos"] = True
    async with served.http.stream("POST", "/v1/completions", json=whole | body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line and line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                assert "choices" in event, event
                for part in event["choices"]:
                    choices[part["index"]].take(part)
                on_token()


async def ask_all(
    served: Served, requests: dict[str, dict[str, Any]], blow: Callable[[], None] | None = None
) -> dict[str, Reply]:
    """All at once; `blow` is called when each sequence has begun and none has ended."""
    replies = {name: {i: Choice() for i in range(body.get("n", 1))} for name, body in requests.items()}
    pending = [blow] if blow is not None else []

    def on_token() -> None:
        choices = [choice for reply in replies.values() for choice in reply.values()]
        if pending and all(len(choice.ids) >= BEFORE_THE_BLOW for choice in choices):
            assert not any(choice.finish for choice in choices), "they still run"
            pending.pop()()

    async with asyncio.TaskGroup() as group:
        for name, body in requests.items():
            group.create_task(ask(served, body, replies[name], on_token))
    assert not pending
    return replies


def late_stop(text: str) -> str:
    """Two letters that a text has for the first time behind its middle."""
    for place in range(len(text) // 2, len(text) - 2):
        found = text[place : place + 2]
        if found.isascii() and found.isprintable() and text.index(found) == place:
            return found
    raise AssertionError("no two such letters")


@contextlib.contextmanager
def started(checkpoint: Path, folder: Path, **of: dict[str, Any]) -> Iterator[dict[str, RunningWorker]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(RunningWorker(checkpoint, folder, name, page_size=PAGE_SIZE, **options))
            for name, options in of.items()
        }


async def until_there(pool: WorkerPool, num_workers: int) -> None:
    async with asyncio.timeout(START_S):
        while pool.num_alive != num_workers:
            await asyncio.sleep(0.01)


async def test_all_kinds_of_requests_survive_a_killed_worker(serve: Serve, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    with started(checkpoint, tmp_path, a={}, b={}) as workers:
        served = await serve(
            endpoints=[Endpoint(name, worker.address) for name, worker in workers.items()], model_path=checkpoint
        )
        pool: WorkerPool = served.app.state.gateway.pool
        await until_there(pool, 2)
        hellos = pool.hellos()
        assert hellos["a"].checkpoint
        assert hellos["a"].arithmetic
        for name in ("checkpoint", "dtype", "numerics", "arithmetic"):
            assert getattr(hellos["a"], name) == getattr(hellos["b"], name), "two of one machine and folder are alike"

        alone = await ask_all(served, {"stop": REQUESTS["stop"]})
        requests = REQUESTS | {"stop": REQUESTS["stop"] | {"stop": [late_stop(alone["stop"][0].text)]}}
        undisturbed = await ask_all(served, requests)
        states = await pool.states(10.0)
        (busy,) = [name for name, state in states.items() if state.generated_tokens]  # one has had them all
        replies = await ask_all(served, requests, lambda: os.kill(workers[busy].process.pid, signal.SIGKILL))
        assert replies == undisturbed
        assert (pool.num_lost, pool.num_resumed) == (1, 5), "every sequence went on elsewhere"

        for choice in replies["samples"].values():
            assert (len(choice.ids), len(choice.logprobs), choice.finish) == (
                MAX_TOKENS,
                MAX_TOKENS,
                [("length", None)],
            )
        assert replies["samples"][0].ids != replies["samples"][1].ids
        (stopped,) = replies["stop"].values()
        assert stopped.finish == [("stop", requests["stop"]["stop"][0])]
        assert alone["stop"][0].ids[: len(stopped.ids)] == stopped.ids
        assert alone["stop"][0].text.startswith(stopped.text)
        (written,) = replies["grammar"].values()
        assert written.finish == [("stop", None)]
        assert len(json.loads(written.text)) == SCHEMA["minItems"]
        assert set(json.loads(written.text)) <= set(COLOURS)

        assert pool.num_alive == 1
        (left,) = (await pool.states(10.0)).values()
        assert (left.num_running, left.num_waiting, left.pages_free) == (0, 0, left.pages_total)


async def test_a_worker_whose_engine_hangs_is_lost(serve: Serve, tmp_path: Path) -> None:
    """Its event loop is well and would say so for ever."""
    checkpoint = tiny_checkpoint(tmp_path / "model")
    stuck = {"program": ("-c", STUCK), "stuck_after_s": 2.0}
    with started(checkpoint, tmp_path, a=stuck, b={}) as workers:
        endpoints = [Endpoint(name, worker.address) for name, worker in workers.items()]
        served = await serve(endpoints=endpoints[1:], model_path=checkpoint)
        pool: WorkerPool = served.app.state.gateway.pool
        await until_there(pool, 1)
        request = {"greedy": REQUESTS["greedy"]}
        undisturbed = await ask_all(served, request)
        pool.set_workers(endpoints)
        await until_there(pool, 2)
        asked = asyncio.create_task(ask_all(served, request))
        assert await asyncio.to_thread(workers["a"].process.wait, START_S) == 1
        assert await asked == undisturbed
        assert (pool.num_lost, pool.num_resumed) == (1, 1)
        assert "the engine's thread did not come round for 2 s: this worker ends itself" in workers["a"].end()
