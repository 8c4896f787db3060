"""A generation request's way through the gateway: admit, read, check, wait for a worker, encode, submit, reply."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

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
from cluster.gateway.generation import Generation, Observers
from cluster.gateway.limits import FLUSH_S, Admission, Place, check_ttft, parse_object, read_body
from cluster.gateway.openai import ChatCompletionRequest, GenerationRequest
from cluster.gateway.parsing.reply_format import ReplyFormat, ReplyShape
from cluster.gateway.parsing.think import CLOSE
from cluster.gateway.pool import WorkerPool
from cluster.gateway.recent import RecentLatencies, RecentTimer
from cluster.gateway.replies import PREDICTED_TTFT, JSONBytes, error_response, read_all
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
from cluster.gateway.tracing import Trace, Tracing
from cluster.metrics import RESUMED, WORKER_LOST, CountCollector, EngineCollector, GatewayMetrics, GenerationTimer

Headers = dict[str, str]
INLINE_BYTES = 256 * 1024  # a larger body is parsed off the event loop
INLINE_CHARS = 4096  # a longer text is tokenised off the event loop
TEMPLATE_SLACK_S = 1.0  # for a thread to be free; the template's own bound comes first, mostly

Checked = TypeVar("Checked")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Work(Generic[Checked]):
    """A request that is no generation, while it is worked on."""

    asked: Checked
    place: Place
    held: ExitStack  # what is entered here ends with the request
    deadline: float  # time.perf_counter() seconds

    @property
    def time_left(self) -> float:
        return max(0.0, self.deadline - time.perf_counter())


class Gateway:
    """What the routes share. Made before the event loop runs; raises `CheckpointError` for unusable tokenizer files."""

    def __init__(
        self,
        settings: GatewaySettings,
        pool: WorkerPool,
        status: StatusSource,
        registry: CollectorRegistry,
        tracing: Tracing,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.status = status
        self.tracing = tracing
        self.registry = registry
        self.metrics = GatewayMetrics(registry, model_name=settings.served_name)
        self.recent = RecentLatencies()
        self.engine_metrics = EngineCollector(registry, model_name=settings.served_name)
        CountCollector(
            registry,
            model_name=settings.served_name,
            counts={WORKER_LOST: lambda: pool.num_lost, RESUMED: lambda: pool.num_resumed},
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
        await self.tracing.close()

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
                trace = held.enter_context(self.tracing.request(request.method, request.url.path, request.headers))
                place = held.enter_context(self.place(request))
                asked, checked = await self._read(request, dialect, place)
                work = self._generate(dialect, asked, checked, place, held, arrival, trace)
                try:
                    started = await until_disconnect(request.receive, work)
                except asyncio.CancelledError:
                    place.check()
                    raise
                if isinstance(started, Response):
                    return started
                generation, events, first, headers = started
                return EventStream(generation, events, first, held.pop_all(), self.settings.send_timeout_s, headers)
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

    async def count_tokens(self, request: Request, form: RequestForm[Any]) -> Response:
        """Tell the tokens of the prompt that a request of such a form makes. Raises `ForetokenError`s."""

        async def count(work: Work[tuple[RequestModel, GenerationRequest]]) -> Response:
            texts, _ = await self._encode(self._checked(work.asked[1], work.place), sys.maxsize)
            return JSONBytes({"input_tokens": sum(len(prompt.ids) for prompt in texts.prompts)})

        try:
            return await self.answer(request, partial(_check, form=form), count)
        except ForetokenError as error:
            raise form.in_its_words(error) from None

    async def answer(
        self,
        request: Request,
        check: Callable[[bytes], Checked],
        answer: Callable[[Work[Checked]], Coroutine[Any, Any, Response]],
    ) -> Response:
        """Answer a request that is no generation: `check` reads its body, `answer` does the rest.

        It ends when the client leaves, and after `request_timeout_s`. Raises `ForetokenError`s.
        """
        deadline = time.perf_counter() + self.settings.request_timeout_s
        try:
            with ExitStack() as held:
                place = held.enter_context(self.place(request))
                asked = await self._read_body(request, place, check)
                work = Work(asked, place, held, deadline)

                async def timed() -> Response:
                    place.begin()
                    async with asyncio.timeout(work.time_left):
                        return await answer(work)

                try:
                    return await until_disconnect(request.receive, timed())
                except asyncio.CancelledError:
                    place.check()
                    raise
        except TimeoutError:
            raise self._too_late() from None
        except ClientDisconnected as error:
            return error_response(error, request.scope)
        except ClientDisconnect:
            gone = ClientDisconnected("the connection ended before the whole body had come")
            return error_response(gone, request.scope)

    def place(self, request: Request) -> AbstractContextManager[Place]:
        """A request's place among the open ones, while the context lasts. Raises `UnavailableError`s."""
        return self.admission.slot(request.state.request_id, tenant_of(request.scope))

    async def _read(
        self, request: Request, form: RequestForm[Any], place: Place
    ) -> tuple[RequestModel, GenerationRequest]:
        asked, checked = await self._read_body(request, place, partial(_check, form=form))
        return asked, self._checked(checked, place)

    async def _read_body(self, request: Request, place: Place, check: Callable[[bytes], Checked]) -> Checked:
        """What `check` makes of a body."""
        body = await read_body(
            request.stream(),
            length=request.headers.get("content-length"),
            max_bytes=self.settings.max_body_bytes,
            timeout_s=self.settings.body_timeout_s,
            hold=place.hold,
        )
        return check(body) if len(body) <= INLINE_BYTES else await run_in(self._threads.bodies, partial(check, body))

    def _checked(self, request: GenerationRequest, place: Place) -> GenerationRequest:
        self.check_model(request.model)
        check_counts(request, self.settings)
        self.reply_format.check(request, self.template)
        salt = self.salt(place, request.cache_salt)
        return request if salt == request.cache_salt else request.model_copy(update={"cache_salt": salt})

    def check_model(self, asked: str | None) -> None:
        """Raises `ModelNotFoundError` for another than the one that is served."""
        if asked not in (None, self.settings.served_name):
            raise model_not_found(asked or "", self.settings.served_name)

    def salt(self, place: Place, cache_salt: str | None) -> str | None:
        """The salt of a request's prefix pages."""
        is_shared = not place.tenant or self.settings.share_prefix_cache
        return cache_salt if is_shared else tenants_salt(place.tenant, cache_salt)

    async def _generate(
        self,
        dialect: Dialect[Any],
        asked: RequestModel,
        request: GenerationRequest,
        place: Place,
        held: ExitStack,
        arrival: float,
        trace: Trace,
    ) -> Response | tuple[Generation, Events, Batch, Headers]:
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
            request,
            texts,
            reply_id=reply_id,
            hello=hello,
            settings=self.settings,
            timeout_s=timeout_s,
            shape=shape,
            traceparent=trace.traceparent,
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
        prediction = self.pool.predict(submits[0])
        headers, predicted_s = {}, None
        if prediction is not None:
            if self.settings.max_ttft_s is not None:
                check_ttft(prediction, self.settings.max_ttft_s)
            predicted_s = time.perf_counter() - arrival + prediction.ttft_s
            headers[PREDICTED_TTFT] = f"{predicted_s * 1e3:.3f}"
        timer = GenerationTimer(self.metrics, arrival=arrival, num_choices=len(submits), predicted_s=predicted_s)
        trace.asked(job, predicted_s)
        recent = RecentTimer(self.recent, arrival=arrival, num_choices=len(submits))
        generation = held.enter_context(
            self.pool.submit(
                submits, timeout_s=timeout_s, observer=Observers((timer, trace, recent)), prediction=prediction
            )
        )
        generation.grammar_field = shape.grammar_field
        place.run(generation, job.num_prompt_tokens)
        if not request.stream:
            choices, usage = await read_all(generation, job)
            return JSONBytes(dialect.body(job, choices, usage), headers=headers)
        return generation, dialect.events(job), await generation.read(), headers

    def _time_left(self, arrival: float) -> float:
        left = arrival + self.settings.request_timeout_s - time.perf_counter()
        if left <= 0:
            raise self._too_late()
        return left

    def _too_late(self) -> DeadlineError:
        return DeadlineError(f"the request took longer than {self.settings.request_timeout_s:g} s")

    async def _encode(self, request: GenerationRequest, max_model_len: int) -> tuple[Texts, ReplyShape]:
        chat_text = await self.render(request) if isinstance(request, ChatCompletionRequest) else None
        check_lengths(request, self.tokenizer, chat_text, max_model_len)

        def work() -> tuple[Texts, ReplyShape]:
            texts = encode(request, self.tokenizer, chat_text, max_model_len)
            return texts, self.reply_format.of(request, chat_text)

        return await self.with_text(num_chars(request, chat_text), work)

    async def render(self, request: ChatCompletionRequest) -> str:
        """The text of a chat's prompt. Raises `RequestError`s."""
        limit_s = self.settings.template_timeout_s + TEMPLATE_SLACK_S
        try:
            async with asyncio.timeout(limit_s):
                return await run_in(self._threads.templates, partial(render_chat, request, self.template))
        except TimeoutError:
            raise InvalidValueError(
                f"the chat template took longer than {limit_s:g} s for these messages", param="messages"
            ) from None

    async def with_text(self, num_chars: int, work: Callable[[], Result]) -> Result:
        """The result of `work`, which (de)tokenises so much text: off the event loop where that is long."""
        return work() if num_chars <= INLINE_CHARS else await run_in(self._threads.texts(num_chars), work)


def model_not_found(asked: str, served: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"the model {asked!r:.200} is not served here; {served!r} is", param="model")


def _check(body: bytes, form: RequestForm[Any]) -> tuple[RequestModel, GenerationRequest]:
    asked = validate(form.request_type, parse_object(body))
    return asked, form.generation(asked)
