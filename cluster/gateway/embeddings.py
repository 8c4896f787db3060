"""`POST /v1/embeddings`, as OpenAI and vLLM have it (platform.openai.com/docs/api-reference/embeddings).

An input's embedding is its last hidden state after the model's final norm, of length 1: the last token's, as vLLM pools
decoder-only models (docs.vllm.ai/en/latest/models/pooling_models), or the mean of all its tokens'.
"""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from struct import unpack
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import AfterValidator, Field, PlainValidator, WithJsonSchema
from starlette.responses import Response

from cluster.errors import ContextLengthError, InvalidValueError
from cluster.gateway.fields import HONOURED, WITHOUT_EFFECT, RequestModel, invalid, unsupported, validate
from cluster.gateway.generation import Unobserved
from cluster.gateway.limits import parse_object
from cluster.gateway.openai import PROMPTS_SCHEMA, Prompts, ShortText, read_prompts
from cluster.gateway.service import Gateway, Work, gateway_of
from cluster.gateway.submit import check_ids
from cluster.metrics import GatewayMetrics
from cluster.protocol import Hello, Pooling, Sampling, Stopping, Submit

MAX_INPUTS = 2048  # of one request, as at OpenAI
MAX_TOKENS = 300_000  # of all inputs of one request, as at OpenAI
WAVE = 64  # inputs that are at the workers at once: others' requests come in between

router = APIRouter()


def _not_empty(inputs: Prompts) -> Prompts:
    if not all(inputs):
        raise invalid("has an empty text; leave it out")
    if len(inputs) > MAX_INPUTS:
        raise invalid(f"must have at most {MAX_INPUTS} entries, got {len(inputs)}")
    return inputs


class EmbeddingRequest(RequestModel):
    """`POST /v1/embeddings`."""

    input: Annotated[
        Prompts, HONOURED, PlainValidator(read_prompts), AfterValidator(_not_empty), WithJsonSchema(PROMPTS_SCHEMA)
    ]
    model: Annotated[str | None, HONOURED] = None
    encoding_format: Annotated[Literal["float", "base64"], HONOURED] = "float"  # base64: of float32, little-endian
    pooling: Annotated[Pooling, HONOURED] = "last"
    add_special_tokens: Annotated[bool, HONOURED] = True
    priority: Annotated[int, HONOURED, Field(ge=-(2**31), le=2**31 - 1)] = 0  # lower is sooner
    cache_salt: Annotated[ShortText | None, HONOURED] = None

    user: Annotated[str | None, WITHOUT_EFFECT] = None

    dimensions: Annotated[Any, unsupported(note="this model was not trained to be read in part")] = None
    truncate_prompt_tokens: Annotated[Any, unsupported(note="an input that is too long is refused")] = None
    truncation_side: Annotated[Any, unsupported()] = None
    padding: Annotated[str, unsupported("do_not_pad")] = "do_not_pad"
    embed_dtype: Annotated[str, unsupported("float32")] = "float32"
    endianness: Annotated[str, unsupported("little", "native")] = "little"
    use_activation: Annotated[bool, unsupported(True, note="each embedding has length 1")] = True
    normalize: Annotated[bool, unsupported(True, note="each embedding has length 1")] = True
    messages: Annotated[Any, unsupported(note="write the chat as text, into input")] = None
    request_id: Annotated[Any, unsupported(note="send it as the header X-Request-Id")] = None


class _WaveObserver(Unobserved):
    """Counts inputs, from the `first` on, as sequences that generate nothing."""

    def __init__(self, metrics: GatewayMetrics, work: Work[EmbeddingRequest], first: int) -> None:
        self._metrics = metrics
        self._work = work
        self._first = first

    def began(self, choice: int, queue_s: float, prefill_s: float) -> None:
        self._metrics.queue_time.observe(queue_s)
        self._metrics.prefill_time.observe(prefill_s)
        self._work.trace.began(self._first + choice, queue_s, prefill_s)

    def finished(self, choice: int, reason: str) -> None:
        self._metrics.finished(reason)
        self._metrics.e2e.observe(time.perf_counter() - self._work.arrival)

    def aborted(self, choice: int, reason: str) -> None:
        self._metrics.aborted(reason)
        self._work.trace.aborted(self._first + choice, reason)


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    gateway = gateway_of(request)

    async def embed(work: Work[EmbeddingRequest]) -> Response:
        return await _embed(gateway, work)

    return await gateway.answer(
        request, lambda body: validate(EmbeddingRequest, parse_object(body)), embed, is_traced=True
    )


async def _embed(gateway: Gateway, work: Work[EmbeddingRequest]) -> Response:
    asked = work.asked
    gateway.check_model(asked.model)
    hello = await gateway.ready(work.time_left)
    inputs = await _encode(gateway, asked, hello)
    num_tokens = sum(map(len, inputs))
    reply_id = f"embd-{uuid.uuid4().hex}"
    salt = gateway.salt(work.place, asked.cache_salt) or ""
    items, num_cached = [b""] * len(inputs), 0
    for first in range(0, len(inputs), WAVE):
        work.place.check()
        submits = [
            Submit(
                request_id=f"{reply_id}-{first + index}",
                prompt_ids=ids,
                sampling=Sampling(seed=0),
                stopping=Stopping(max_tokens=0),
                priority=asked.priority,
                deadline_s=work.time_left,
                cache_salt=salt,
                pooling=asked.pooling,
                traceparent=work.trace.traceparent,
            )
            for index, ids in enumerate(inputs[first : first + WAVE])
        ]
        if first == 0:  # those behind them go on where they have been let in
            gateway.check_wait(submits, work.arrival)
            gateway.metrics.prompt_tokens.observe(num_tokens)
            model, form = gateway.settings.served_name, asked.encoding_format
            work.trace.embeds(model, reply_id, num_tokens, form, work.place.request_id)
        work.trace.sent()
        observer = _WaveObserver(gateway.metrics, work, first)
        submitted = gateway.pool.submit(submits, timeout_s=work.time_left, observer=observer)
        generation = work.held.enter_context(submitted)
        work.place.run(generation, num_tokens)
        while outputs := await generation.read():
            for choice, output in outputs:
                num_cached += output.cached_tokens
                items[first + choice] = _item(first + choice, output.embedding, asked.encoding_format)
                work.place.hold(len(items[first + choice]))
    head = orjson.dumps({"id": reply_id, "object": "list", "created": int(time.time())})[:-1]
    usage = {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    tail = orjson.dumps({"model": gateway.settings.served_name, "usage": usage})[1:]
    return Response(head + b',"data":[' + b",".join(items) + b"]," + tail, media_type="application/json")


def _item(index: int, embedding: bytes, encoding: str) -> bytes:
    """One member of `data`; `embedding`: float32, little-endian."""
    shown = base64.b64encode(embedding).decode()
    vector = shown if encoding == "base64" else unpack(f"<{len(embedding) // 4}f", embedding)
    return orjson.dumps({"object": "embedding", "index": index, "embedding": vector})


async def _encode(gateway: Gateway, asked: EmbeddingRequest, hello: Hello) -> list[tuple[int, ...]]:
    """The token ids of the inputs. Raises `InvalidValueError` or `ContextLengthError`."""
    tokenizer, longest = gateway.tokenizer, hello.max_model_len
    for index, given in enumerate(asked.input):
        _check_length(index, tokenizer.min_tokens(given) if isinstance(given, str) else len(given), longest)

    def encoded() -> list[tuple[int, ...]]:
        special = asked.add_special_tokens
        return [
            tuple(tokenizer.encode(given, special_tokens=special) if isinstance(given, str) else given)
            for given in asked.input
        ]

    found = await gateway.with_text(sum(len(given) for given in asked.input), encoded)
    _check(found, hello)
    return found


def _check(inputs: Sequence[tuple[int, ...]], hello: Hello) -> None:
    for index, ids in enumerate(inputs):
        if not ids:
            raise InvalidValueError(f"input {index} has no tokens; at least one is needed", param="input")
        _check_length(index, len(ids), hello.max_model_len)
        check_ids("input", ids, hello.vocab_size)
    if (num_tokens := sum(map(len, inputs))) > MAX_TOKENS:
        raise InvalidValueError(
            f"the inputs have {num_tokens} tokens; a request may have {MAX_TOKENS}: send them in parts", param="input"
        )


def _check_length(index: int, at_least: int, max_model_len: int) -> None:
    if at_least > max_model_len:
        raise ContextLengthError(
            f"this model's context length is {max_model_len} tokens, but input {index} has at least {at_least}; "
            "shorten it",
            param="input",
        )
