"""Every numeric field at its limits, beside them, and at values that are no number of its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.gateway.capabilities import capabilities
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello
from tests.unit.gateway.conftest import MODEL, Serve, Served

pytestmark = pytest.mark.anyio

I32, I64 = 2**31 - 1, 2**63 - 1
CONTEXT = 384
CHAT = 21  # tokens of a chat of "Hi"
TINY = math.ulp(0.0)  # the smallest number over 0
USER = {"role": "user", "content": "Hi"}
FRACTION, POSITIVE_FRACTION = (0.0, 1.0), (TINY, 1.0)

SAMPLING = {
    "temperature": (0.0, 2.0),
    "top_p": POSITIVE_FRACTION,
    "top_k": (-1, I32),
    "min_p": FRACTION,
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (-I64 - 1, I64),
    "priority": (-I32 - 1, I32),
}
SHARED = SAMPLING | {
    "n": (1, 128),
    "best_of": (1, 1),  # it must be n
    "typical_p": POSITIVE_FRACTION,
    "max_tokens": (1, CONTEXT - 3),  # 3: of the prompt "Hi", with its beginning
    "min_tokens": (0, 40),  # no more than max_tokens
    "prompt_logprobs": (0, 20),
    "truncate_prompt_tokens": (-1, I32),
}
# Lowest and highest value that is let through, by endpoint and field; a float's limits are floats.
LIMITS: dict[str, dict[str, tuple[int | float, int | float]]] = {
    "/v1/completions": SHARED | {"logprobs": (0, 20)},
    "/v1/chat/completions": SHARED
    | {
        "max_tokens": (1, CONTEXT - CHAT),
        "max_completion_tokens": (1, CONTEXT - CHAT),
        "top_logprobs": (0, 20),
        "thinking_token_budget": (0, I32),
        "messages[].tool_calls[].index": (-I64 - 1, 2**64 - 1),  # without effect
    },
    "/v1/responses": SAMPLING
    | {
        "max_output_tokens": (1, CONTEXT - CHAT),
        "max_tool_calls": (0, I32),  # without effect
        "top_logprobs": (0, 20),
        "thinking_token_budget": (0, I32),
    },
    "/v1/messages": {
        "max_tokens": (1, CONTEXT - CHAT),
        "temperature": (0.0, 1.0),
        "top_p": POSITIVE_FRACTION,
        "top_k": (0, I32),
        "thinking.budget_tokens": (1, 39),  # Anthropic's: less than max_tokens
    },
    "/v1/messages/count_tokens": {"thinking.budget_tokens": (1, I32)},
}
BETWEEN = {("truncate_prompt_tokens", 0)}  # refused though it lies between the limits
NEEDS: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "thinking.budget_tokens": {"thinking": {"type": "enabled"}},
    "messages[].tool_calls[].index": {
        "messages": [
            USER,
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ]
    },
}
NO_NUMBERS = (
    '"1"',
    "true",
    "[]",
    "{}",
    "[1]",
    '""',
    "-",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1e",
    "0x1",
    "01",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("checkpoint"), byte_tokenizer(), QWEN_LIKE)


@pytest.fixture
async def served(serve: Serve, worker: ScriptedWorker) -> Served:
    worker.hello = hello(max_model_len=CONTEXT)
    served = await serve()
    await served.ready()
    return served


def numeric_fields(endpoint: str) -> set[str]:
    fields = capabilities(MODEL)["endpoints"][endpoint]["fields"]
    return {
        name
        for name, field in fields.items()
        if field["support"] != "unsupported" and field.get("type") in ("integer", "number")
    }


def body_with(endpoint: str, name: str, number: str) -> bytes:
    """A request with the text `number` at the field `name`."""
    body: dict[str, Any] = {"model": MODEL, **NEEDS.get(name, {})}
    if endpoint == "/v1/completions":
        body |= {"prompt": "Hi"}
    elif endpoint == "/v1/responses":
        body |= {"input": "Hi"}
    else:
        body = {"messages": [USER]} | body
    if endpoint != "/v1/messages/count_tokens":
        body |= {"max_output_tokens" if endpoint == "/v1/responses" else "max_tokens": 40}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    if name == "top_logprobs" and endpoint == "/v1/responses":
        del body["logprobs"]
    *heads, last = name.split(".")
    inner: Any = body
    for head in heads:
        inner = inner[head.removesuffix("[]")]
        inner = inner[-1] if head.endswith("[]") else inner
    inner[last] = "@"
    return json.dumps(body).replace('"@"', number).encode()


async def send(served: Served, endpoint: str, name: str, number: str) -> httpx.Response:
    return await served.http.post(endpoint, content=body_with(endpoint, name, number))


@pytest.mark.parametrize("endpoint", LIMITS)
def test_every_numeric_field_has_limits_here(endpoint: str) -> None:
    assert numeric_fields(endpoint) == LIMITS[endpoint].keys()


def outside(lowest: int | float, highest: int | float) -> Iterator[str]:
    beside: tuple[int | float, ...]
    if isinstance(lowest, float):
        beside = (math.nextafter(lowest, -math.inf), math.nextafter(highest, math.inf), -1e308, 1e308)
    else:
        beside = (lowest - 1, highest + 1, -I64 - 1, I64, -(2**64), 2**64, -(10**400), 10**400)
    for number in beside:
        if not lowest <= number <= highest:
            yield repr(number)


@pytest.mark.parametrize("endpoint", LIMITS)
async def test_what_lies_within_the_limits_is_taken(served: Served, endpoint: str) -> None:
    for name, (lowest, highest) in LIMITS[endpoint].items():
        numbers: set[float] = {lowest, highest}
        if isinstance(lowest, float):
            numbers |= {-0.0 if lowest <= 0 else lowest, max(lowest, TINY), (lowest + highest) / 2, math.ceil(lowest)}
        for number in numbers:
            response = await send(served, endpoint, name, repr(number))
            assert response.status_code == 200, (name, number, response.text)


@pytest.mark.parametrize("endpoint", LIMITS)
async def test_what_lies_outside_is_refused_by_name(served: Served, worker: ScriptedWorker, endpoint: str) -> None:
    for name, limits in LIMITS[endpoint].items():
        between = [str(number) for field, number in BETWEEN if field == name]
        fractions: list[str] = [] if isinstance(limits[0], float) else ["1.5", "1.0", "1e0"]
        for number in (*outside(*limits), *between, *fractions, *NO_NUMBERS):
            response = await send(served, endpoint, name, number)
            assert response.status_code == 400, (name, number, response.text)
            error = response.json()["error"]
            said = (name.rpartition(".")[2], "not valid JSON", "context length")
            assert any(words in error["message"] for words in said), (name, number, error)
            assert len(response.content) < 1000
    assert worker.submits == []


@pytest.mark.parametrize("entry", ["1e999", "101", "-100.5", "NaN", "true", '"1"', "null", "[]"])
async def test_a_bias_that_is_none(served: Served, entry: str) -> None:
    response = await send(served, "/v1/completions", "logit_bias", f'{{"65": {entry}}}')
    assert response.status_code == 400, response.text
    for endpoint, field in (("/v1/completions", "stop_token_ids"), ("/v1/completions", "prompt")):
        for number in ("-1", str(2**31), str(2**64), "1.5", "1e999", "true", "null"):
            response = await send(served, endpoint, field, f"[{number}]")
            assert response.status_code == 400, (field, number, response.text)
