"""`/v1/completions` in its details: echo, log probabilities, stops, ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.gateway.fields import validate
from cluster.gateway.logprobs import CompletionLogprobs
from cluster.gateway.openai import CompletionRequest
from cluster.gateway.settings import SamplingDefaults
from cluster.gateway.submit import Prompt
from cluster.gateway.tokenizer import TextTokenizer
from cluster.protocol import Finish, RequestOutput, Submit, TokenLogprobs
from tests.support.scripted_worker import BEGIN_ID, END_ID, ScriptedWorker, say, text_ids
from tests.unit.gateway.conftest import Serve, Served

pytestmark = pytest.mark.anyio


async def choice_of(served: Served, *, stream: bool = False, **body: Any) -> dict[str, Any]:
    """The one choice of a reply; of a stream, its parts put together."""
    response = await served.complete(stream=stream, **body)
    assert response.status_code == 200, response.text
    if not stream:
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice
    whole: dict[str, Any] = {}
    for line in response.text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        part = json.loads(line.removeprefix("data: "))["choices"][0]
        for name, value in part.items():
            if name == "text":
                whole[name] = whole.get(name, "") + value
            elif name == "logprobs" and value is not None:
                known = whole.setdefault(name, {key: [] for key in value})
                whole[name] = {key: known[key] + value[key] for key in value}
            elif value is not None or name not in whole:
                whole[name] = value
    return whole


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(served: Served, stream: bool) -> None:
    choice = await choice_of(served, stream=stream, prompt="Say: ", echo=True, max_tokens=5)
    assert choice["text"] == "Say: Hello"


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_of_token_ids(served: Served, stream: bool) -> None:
    ids = [BEGIN_ID, *text_ids("wö")]
    choice = await choice_of(served, stream=stream, prompt=ids, echo=True, max_tokens=1)
    assert choice["text"] == "wöH"
    choice = await choice_of(served, prompt=ids, echo=True, max_tokens=1, skip_special_tokens=False)
    assert choice["text"] == "<|endoftext|>wöH"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_an_echo(served: Served, stream: bool) -> None:
    """What lm-eval reads: the prompt's own log probabilities, nothing generated."""
    choice = await choice_of(served, stream=stream, prompt="ab", echo=True, logprobs=1, max_tokens=0)
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"] == {
        "tokens": ["<|endoftext|>", "a", "b"],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": [None, {"!": -0.5, "a": -1.0}, {"!": -0.5, "b": -1.0}],
        "text_offset": [0, 0, 1],
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_behind_an_echo(served: Served, worker: ScriptedWorker, stream: bool) -> None:
    worker.answer = say("öx")
    choice = await choice_of(served, stream=stream, prompt="aé", echo=True, logprobs=0)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][1:] == [
        "a",
        r"bytes:\xc3",
        r"bytes:\xa9",
        r"bytes:\xc3",
        r"bytes:\xb6",
        "x",
        "<|im_end|>",
    ]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 2, 2, 3, 4]
    assert [choice["text"][offset] for offset in logprobs["text_offset"][1:7]] == ["a", "é", "é", "ö", "ö", "x"]
    assert logprobs["top_logprobs"][1:] == [{token: -1.0} for token in logprobs["tokens"][1:]]


async def test_text_offsets_behind_a_prompt_that_ends_within_a_character(
    served: Served, worker: ScriptedWorker
) -> None:
    worker.answer = say("xy")
    choice = await choice_of(served, prompt=[0xC3], echo=True, logprobs=0, max_tokens=2)
    assert choice["text"] == "\ufffdxy"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_text_offsets_where_tokens_and_text_differ(checkpoint: Path) -> None:
    """A tokenizer that puts a space before the first word: the echoed text has none."""
    request = validate(CompletionRequest, {"prompt": "a b", "echo": True, "logprobs": 0})
    pieces = CompletionLogprobs(request, TextTokenizer.from_checkpoint(checkpoint))
    tokens = [
        TokenLogprobs(token_id=1, token=text, logprob=-1.0, rank=1, top=[]) for text in (b" a", b" b", b" c", b" d")
    ]
    output = RequestOutput(request_id="r", index=0, prompt_logprobs=[*tokens[:2]], logprobs=tokens[2:])
    assert pieces.piece(output, Prompt((1, 1), "a b"))["text_offset"] == [0, 2, 3, 5]


async def test_cached_tokens_are_those_of_the_first_sample(served: Served, worker: ScriptedWorker) -> None:
    """The other samples find the first one's pages, which says nothing of the cache."""

    def outputs(submit: Submit) -> list[RequestOutput]:
        if not submit.sampling.choice:
            return []
        first, second = (submit.request_id.removesuffix("1") + choice for choice in "01")
        return [
            RequestOutput(request_id=name, index=0, text="x", cached_tokens=cached, finish=Finish(reason="stop"))
            for name, cached in ((second, 128), (first, 64))
        ]

    worker.raw = outputs
    usage = (await served.complete(n=2)).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 64


async def test_minus_infinity_is_a_number(served: Served, worker: ScriptedWorker) -> None:
    lost = TokenLogprobs(token_id=72, token=b"H", logprob=float("-inf"), rank=9, top=[])
    worker.raw = lambda submit: [
        RequestOutput(
            request_id=submit.request_id,
            index=0,
            token_ids=[72],
            text="H",
            logprobs=[lost],
            finish=Finish(reason="length"),
        )
    ]
    assert (await choice_of(served, logprobs=0))["logprobs"]["token_logprobs"] == [-9999.0]
    reply = (await served.chat(logprobs=True)).json()
    assert reply["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_prompt_logprobs(served: Served) -> None:
    choice = await choice_of(served, prompt="ab", prompt_logprobs=1, max_tokens=1)
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {
        "97": {"logprob": -1.0, "rank": 2, "decoded_token": "a"},
        "33": {"logprob": -0.5, "rank": 1, "decoded_token": "!"},
    }
    assert len(choice["prompt_logprobs"]) == 3
    assert choice["text"] == "H"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_stopped_it(served: Served, stream: bool) -> None:
    for body, text, finish, stop in (
        ({"stop": [" w", "?"]}, "Hello,", "stop", " w"),
        ({"stop": "ö", "include_stop_str_in_output": True}, "Hello, wö", "stop", "ö"),
        ({"stop_token_ids": [ord("o")]}, "Hello", "stop", ord("o")),
        ({"max_tokens": 2}, "He", "length", None),
        ({}, "Hello, wörld! 🦀", "stop", None),
        ({"ignore_eos": True, "max_tokens": 22}, "Hello, wörld! 🦀~~", "length", None),
    ):
        choice = await choice_of(served, stream=stream, **body)
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, finish, stop)


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids(served: Served, stream: bool) -> None:
    response = await served.complete(return_token_ids=True, max_tokens=3, stream=stream)
    parts = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    choices = [json.loads(part)["choices"][0] for part in parts if part.startswith("{")]
    assert choices[0]["prompt_token_ids"] == [BEGIN_ID, 72, 105]
    assert [token for choice in choices for token in choice["token_ids"]] == text_ids("Hel")


async def test_running_usage(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await served.complete(stream=True, max_tokens=3, stream_options=options)
    parts = [
        json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line.startswith("data: {")
    ]
    assert [part["usage"]["completion_tokens"] for part in parts] == [1, 2, 3, 3]
    assert [len(part["choices"]) for part in parts] == [1, 1, 1, 0]


async def test_forbidden_words_with_and_without_a_space(served: Served, worker: ScriptedWorker) -> None:
    await served.complete(bad_words=["ab", " c"], max_tokens=1)
    assert worker.submits[0].sampling.bad_words == (
        tuple(text_ids("ab")),
        tuple(text_ids(" ab")),
        tuple(text_ids(" c")),
    )


async def test_seeds(served: Served, worker: ScriptedWorker) -> None:
    for seed in (None, None, 5, -1, 2**63 - 1):
        await served.complete(n=2, seed=seed, max_tokens=1)
    seeds = [submit.sampling.seed for submit in worker.submits]
    assert [submit.sampling.choice for submit in worker.submits] == [0, 1] * 5
    assert seeds[0::2] == seeds[1::2], "the samples of a request differ by their choice"
    assert seeds[0] != seeds[2], "drawn where none is given"
    assert seeds[4] == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_defaults_of_the_checkpoint(serve: Serve, worker: ScriptedWorker) -> None:
    advice = {
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "typical_p": 0.8, "repetition_penalty": 1.1
    }  # fmt: skip
    asked = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "typical_p": 1, "repetition_penalty": 1}
    served = await serve(sampling_defaults=SamplingDefaults(**advice))
    await served.ready()
    await served.complete(max_tokens=1)
    await served.complete(max_tokens=1, **asked)
    first, second = ({name: getattr(submit.sampling, name) for name in advice} for submit in worker.submits)
    assert first == advice
    assert second == asked | {"top_k": 0}


async def test_text_parts_are_lines(served: Served, worker: ScriptedWorker) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await served.chat(messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert b"one\ntwo" in bytes(token for token in worker.submits[0].prompt_ids if token < 256)


async def test_special_tokens_written_out_are_tokens(served: Served, worker: ScriptedWorker) -> None:
    await served.complete(prompt="a<|im_end|>", max_tokens=1)
    assert worker.submits[0].prompt_ids == (BEGIN_ID, ord("a"), END_ID)


async def test_a_long_prompt_is_counted_and_refused_like_any_other(served: Served) -> None:
    response = await served.complete(prompt="x" * 5000)  # not on the event loop
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "5001" in response.json()["error"]["message"]


async def test_equal_prompts_are_samples_of_their_own_unless_the_seed_is_given(
    served: Served, worker: ScriptedWorker
) -> None:
    submits: list[Submit] = []

    def outputs(submit: Submit) -> list[RequestOutput]:
        submits.append(submit)
        return [RequestOutput(request_id=submit.request_id, index=0, text="x", finish=Finish(reason="stop"))]

    worker.raw = outputs
    await served.complete(prompt=["same", "same"], n=2)
    assert len({(submit.sampling.seed, submit.sampling.choice) for submit in submits}) == 4
    submits.clear()
    await served.complete(prompt=["same", "same"], seed=7)
    assert {submit.sampling.seed for submit in submits} == {7}
