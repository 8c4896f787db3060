"""A generation request's way through the gateway: admit, read, check, wait for a worker, encode, submit, reply."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.errors import DeadlineError, DrainingError, ForetokenError, InvalidValueError, ModelNotFoundError
from cluster.gateway.auth import tenant_of, tenants_salt
from cluster.gateway.chat import load_template
from cluster.gateway.dialects.base import Batch, Dialect, Events, RequestForm
from cluster.gateway.dialects.chat_completions import ChatCompletions
from cluster.gateway.dialects.completions import Completions
from cluster.gateway.dialects.messages import Messages
from cluster.gateway.dialects.responses import Responses
from cluster.gateway.disconnect import ClientDisconnected, until_disconnect
from cluster.gateway.fields import RequestModel, validate
from cluster.gateway.generation import Generation
from cluster.gateway.limits import FLUSH_S, Admission, Place, parse_object, read_body
from cluster.gateway.openai import ChatCompletionRequest, GenerationRequest
from cluster.gateway.parsing.reply_format import ReplyFormat, ReplyShape
from cluster.gateway.parsing.think import CLOSE
from cluster.gateway.pool import WorkerPool
from cluster.gateway.replies import JSONBytes, error_response, read_all
from cluster.gateway.response_store import ResponseStore, TenantResponses
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
        self.admission = Admission(settings.max_open_requests, settings.max_open_requests_per_tenant)
        self.tokenizer = TextTokenizer.from_checkpoint(settings.model_path)
        self.template = load_template(
            settings.model_path, timeout_s=settings.template_timeout_s, max_chars=settings.max_rendered_chars
        )
        self.reply_format = ReplyFormat.find(
            self.template,
            self.tokenizer,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
        )
        self.completions = Completions(self.tokenizer)
        self.chat_completions = ChatCompletions()
        self._thoughts_end = self.reply_format.tokens.get(CLOSE) if self.reply_format.thinks else None
        self.messages = Messages(self._thoughts_end)
        self.stored_responses = ResponseStore()
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
                place = held.enter_context(self.place(request))
                asked, checked = await self._read(request, dialect, place)
                work = self._generate(dialect, asked, checked, place, held, arrival)
                try:
                    started = await until_disconnect(request.receive, work)
                except asyncio.CancelledError:
                    place.check()
                    raise
                if isinstance(started, Response):
                    return started
                generation, events, first = started
                return EventStream(generation, events, first, held.pop_all(), self.settings.send_timeout_s)
        except ClientDisconnected as error:
            return error_response(error, request.scope)
        except ClientDisconnect:
            gone = ClientDisconnected("the connection ended before the whole body had come")
            return error_response(gone, request.scope)

    def responses(self, request: Request) -> Responses:
        """The Responses API as the tenant of a request has it."""
        return Responses(self.responses_of(request), self._thoughts_end)

    def responses_of(self, request: Request) -> TenantResponses:
        return self.stored_responses.of(tenant_of(request.scope))

    async def count_tokens(self, request: Request, form: RequestForm[Any]) -> int:
        """The tokens of the prompt that a request of such a form makes. Raises `ForetokenError`s."""
        arrival = time.perf_counter()
        try:
            with self.place(request) as place:
                _, checked = await self._read(request, form, place)
                place.begin()
                try:
                    async with asyncio.timeout(self._time_left(arrival)):
                        texts, _ = await self._encode(checked, sys.maxsize)
                except asyncio.CancelledError:
                    place.check()
                    raise
        except TimeoutError:
            raise self._too_late() from None
        except ClientDisconnect:
            raise ClientDisconnected("the connection ended before the whole body had come") from None
        except ForetokenError as error:
            raise form.in_its_words(error) from None
        return sum(len(prompt.ids) for prompt in texts.prompts)

    def place(self, request: Request) -> AbstractContextManager[Place]:
        """A request's place among the open ones, while the context lasts. Raises `UnavailableError`s."""
        return self.admission.slot(request.state.request_id, tenant_of(request.scope))

    async def _read(
        self, request: Request, form: RequestForm[Any], place: Place
    ) -> tuple[RequestModel, GenerationRequest]:
        body = await read_body(
            request.stream(),
            length=request.headers.get("content-length"),
            max_bytes=self.settings.max_body_bytes,
            timeout_s=self.settings.body_timeout_s,
            hold=place.hold,
        )
        check = partial(_check, body, form)
        asked, checked = check() if len(body) <= INLINE_BYTES else await run_in(self._threads.bodies, check)
        if checked.model not in (None, self.settings.served_name):
            raise model_not_found(checked.model or "", self.settings.served_name)
        check_counts(checked, self.settings)
        self.reply_format.check(checked, self.template)
        if place.tenant and not self.settings.share_prefix_cache:
            salt = tenants_salt(place.tenant, checked.cache_salt)
            checked = checked.model_copy(update={"cache_salt": salt})
        return asked, checked

    async def _generate(
        self,
        dialect: Dialect[Any],
        asked: RequestModel,
        request: GenerationRequest,
        place: Place,
        held: ExitStack,
        arrival: float,
    ) -> Response | tuple[Generation, Events, Batch]:
        """A whole reply, or the beginning of a streamed one: its first outputs, so that an early error has a status."""
        place.begin()
        hello = await self.pool.ready(self._time_left(arrival))
        try:
            async with asyncio.timeout(self._time_left(arrival)):
                texts, shape = await self._encode(request, hello.max_model_len)
        except TimeoutError:
            raise self._too_late() from None
        reply_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
        timeout_s = self._time_left(arrival)
        submits = make_submits(
            request, texts, reply_id=reply_id, hello=hello, settings=self.settings, timeout_s=timeout_s, shape=shape
        )
        job = Job(
            reply_id,
            int(time.time()),
            self.settings.served_name,
            request,
            texts.prompts,
            submits,
            asked,
            shape.make_parser,
            place.request_id,
        )
        self.metrics.prompt_tokens.observe(job.num_prompt_tokens)
        timer = GenerationTimer(self.metrics, arrival=arrival, num_choices=len(submits))
        generation = held.enter_context(self.pool.submit(submits, timeout_s=timeout_s, observer=timer))
        generation.grammar_field = shape.grammar_field
        place.run(generation, job.num_prompt_tokens)
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

    async def _encode(self, request: GenerationRequest, max_model_len: int) -> tuple[Texts, ReplyShape]:
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

        def work() -> tuple[Texts, ReplyShape]:
            texts = encode(request, self.tokenizer, chat_text, max_model_len)
            return texts, self.reply_format.of(request, chat_text)

        length = num_chars(request, chat_text)
        return work() if length <= INLINE_CHARS else await run_in(self._threads.texts(length), work)


def model_not_found(asked: str, served: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"the model {asked!r:.200} is not served here; {served!r} is", param="model")


def _check(body: bytes, form: RequestForm[Any]) -> tuple[RequestModel, GenerationRequest]:
    asked = validate(form.request_type, parse_object(body))
    return asked, form.generation(asked)
