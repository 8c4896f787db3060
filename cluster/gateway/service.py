"""A generation request's way through the gateway: admit, read, check, wait for a worker, encode, submit, reply."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.errors import DeadlineError, DrainingError, ForetokenError, InvalidValueError, ModelNotFoundError
from cluster.gateway.chat import load_template
from cluster.gateway.dialects.base import Batch, Dialect, Events
from cluster.gateway.dialects.chat_completions import ChatCompletions
from cluster.gateway.dialects.completions import Completions
from cluster.gateway.disconnect import ClientDisconnected, until_disconnect
from cluster.gateway.fields import RequestModel, validate
from cluster.gateway.generation import Generation
from cluster.gateway.limits import FLUSH_S, Admission, parse_object, read_body
from cluster.gateway.openai import ChatCompletionRequest, GenerationRequest
from cluster.gateway.pool import WorkerPool
from cluster.gateway.replies import JSONBytes, error_response, read_all
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.status import StatusSource
from cluster.gateway.stream import EventStream
from cluster.gateway.submit import (
    Job,
    Texts,
    check_counts,
    check_lengths,
    encode,
    make_submits,
    num_chars,
    render_chat,
)
from cluster.gateway.threads import Threads, run_in
from cluster.gateway.tokenize import TextTokenizer
from cluster.metrics import CountCollector, EngineCollector, GatewayMetrics, GenerationTimer

INLINE_BYTES = 256 * 1024  # a larger body is parsed off the event loop
INLINE_CHARS = 4096  # a longer text is tokenised off the event loop
TEMPLATE_SLACK_S = 1.0  # for a thread to be free; the template's own bound comes first, mostly


class Gateway:
    """What the routes share. Made before the event loop runs; raises `CheckpointError` for unusable tokenizer files."""

    def __init__(
        self, settings: GatewaySettings, pool: WorkerPool, status: StatusSource, registry: CollectorRegistry
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.status = status
        self.registry = registry
        self.metrics = GatewayMetrics(registry, model_name=settings.served_name)
        self.engine_metrics = EngineCollector(registry, model_name=settings.served_name)
        CountCollector(
            registry,
            model_name=settings.served_name,
            counts={
                "worker_lost": ("Connections to workers that broke", lambda: pool.num_lost),
                "requests_resumed": ("Sequences that went on after a worker was lost", lambda: pool.num_resumed),
            },
        )
        self.admission = Admission(settings.max_open_requests)
        self.tokenizer = TextTokenizer.from_checkpoint(settings.model_path)
        self.template = load_template(
            settings.model_path, timeout_s=settings.template_timeout_s, max_chars=settings.max_rendered_chars
        )
        self.completions = Completions(self.tokenizer)
        self.chat_completions = ChatCompletions()
        self.created = int(time.time())
        self._threads = Threads()

    def begin_drain(self) -> None:
        """Admit nothing more. What runs may finish for `drain_timeout_s`, then it ends with `DrainingError`."""
        if self.admission.draining:
            return
        self.admission.draining = True
        error = DrainingError(f"the server shut down before the request was done ({self.settings.drain_timeout_s:g} s)")
        asyncio.get_running_loop().call_later(self.settings.drain_timeout_s, self.pool.fail, error)

    async def close(self) -> None:
        """Drain, then leave the workers."""
        self.begin_drain()
        await self.admission.wait_idle(self.settings.drain_timeout_s + FLUSH_S)
        await self.pool.close()
        self._threads.close()

    async def reply(self, request: Request, dialect: Dialect[Any]) -> Response:
        """Answer one generation request. Raises `ForetokenError`s."""
        try:
            return await self._reply(request, dialect)
        except ForetokenError as error:
            raise dialect.in_its_words(error) from None

    async def _reply(self, request: Request, dialect: Dialect[Any]) -> Response:
        arrival = time.perf_counter()
        try:
            with ExitStack() as held:
                hold = held.enter_context(self.admission.slot())
                asked, checked = await self._read(request, dialect, hold)
                work = self._generate(dialect, asked, checked, held, arrival)
                started = await until_disconnect(request.receive, work)
                if isinstance(started, Response):
                    return started
                generation, events, first = started
                return EventStream(generation, events, first, held.pop_all(), self.settings.send_timeout_s)
        except ClientDisconnected as error:
            return error_response(error)
        except ClientDisconnect:
            return error_response(ClientDisconnected("the connection ended before the whole body had come"))

    async def _read(
        self, request: Request, dialect: Dialect[Any], hold: Callable[[int], None]
    ) -> tuple[RequestModel, GenerationRequest]:
        body = await read_body(
            request.stream(),
            length=request.headers.get("content-length"),
            max_bytes=self.settings.max_body_bytes,
            timeout_s=self.settings.body_timeout_s,
            hold=hold,
        )
        check = partial(_check, body, dialect)
        asked, checked = check() if len(body) <= INLINE_BYTES else await run_in(self._threads.bodies, check)
        if checked.model not in (None, self.settings.served_name):
            raise model_not_found(checked.model or "", self.settings.served_name)
        check_counts(checked, self.settings)
        return asked, checked

    async def _generate(
        self,
        dialect: Dialect[Any],
        asked: RequestModel,
        request: GenerationRequest,
        held: ExitStack,
        arrival: float,
    ) -> Response | tuple[Generation, Events, Batch]:
        """A whole reply, or the beginning of a streamed one: its first outputs, so that an early error has a status."""
        hello = await self.pool.ready(self._time_left(arrival))
        try:
            async with asyncio.timeout(self._time_left(arrival)):
                texts = await self._encode(request, hello.max_model_len)
        except TimeoutError:
            raise self._too_late() from None
        reply_id = f"{dialect.id_prefix}-{uuid.uuid4().hex}"
        timeout_s = self._time_left(arrival)
        submits = make_submits(
            request, texts, reply_id=reply_id, hello=hello, settings=self.settings, timeout_s=timeout_s
        )
        job = Job(reply_id, int(time.time()), self.settings.served_name, request, texts.prompts, submits, asked)
        self.metrics.prompt_tokens.observe(job.num_prompt_tokens)
        timer = GenerationTimer(self.metrics, arrival=arrival, num_choices=len(submits))
        generation = held.enter_context(self.pool.submit(submits, timeout_s=timeout_s, observer=timer))
        if not request.stream:
            choices, usage = await read_all(generation, job)
            return JSONBytes(dialect.body(job, choices, usage))
        return generation, dialect.events(job), await generation.read()

    def _time_left(self, arrival: float) -> float:
        left = arrival + self.settings.request_timeout_s - time.perf_counter()
        if left <= 0:
            raise self._too_late()
        return left

    def _too_late(self) -> DeadlineError:
        return DeadlineError(f"the request took longer than {self.settings.request_timeout_s:g} s")

    async def _encode(self, request: GenerationRequest, max_model_len: int) -> Texts:
        chat_text = None
        if isinstance(request, ChatCompletionRequest):
            limit_s = self.settings.template_timeout_s + TEMPLATE_SLACK_S
            try:
                async with asyncio.timeout(limit_s):
                    chat_text = await run_in(self._threads.templates, partial(render_chat, request, self.template))
            except TimeoutError:
                raise InvalidValueError(
                    f"the chat template took longer than {limit_s:g} s for these messages", param="messages"
                ) from None
        check_lengths(request, self.tokenizer, chat_text, max_model_len)
        work = partial(encode, request, self.tokenizer, chat_text)
        length = num_chars(request, chat_text)
        return work() if length <= INLINE_CHARS else await run_in(self._threads.texts(length), work)


def model_not_found(asked: str, served: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"the model {asked!r:.200} is not served here; {served!r} is", param="model")


def _check(body: bytes, dialect: Dialect[Any]) -> tuple[RequestModel, GenerationRequest]:
    asked = validate(dialect.request_type, parse_object(body))
    return asked, dialect.generation(asked)
