"""A generation request's way through the gateway: admit, read, check, wait for a worker, encode, submit, reply."""

from __future__ import annotations

import asyncio
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cluster.errors import (
    DeadlineError,
    DrainingError,
    ForetokenError,
    InvalidValueError,
    ModelNotFoundError,
    UnavailableError,
)
from cluster.gateway.auth import tenant_of, tenants_salt
from cluster.gateway.backlog import Prediction
from cluster.gateway.chat import load_template
from cluster.gateway.dialects.base import Batch, Dialect, Events, RequestForm
from cluster.gateway.dialects.chat_completions import ChatCompletions
from cluster.gateway.dialects.completions import Completions
from cluster.gateway.dialects.messages import Messages
from cluster.gateway.dialects.responses import Responses
from cluster.gateway.disconnect import ClientDisconnected, until_disconnect
from cluster.gateway.fields import RequestModel, validate
from cluster.gateway.generation import Generation, Observers
from cluster.gateway.limits import (
    FLUSH_S,
    VALUE_BYTES,
    Admission,
    Place,
    check_ttft,
    num_values,
    parse_object,
    read_body,
)
from cluster.gateway.openai import ChatCompletionRequest, GenerationRequest
from cluster.gateway.parsing.reply_format import ReplyFormat, ReplyShape
from cluster.gateway.parsing.think import CLOSE
from cluster.gateway.pool import WorkerPool
from cluster.gateway.recent import RecentLatencies
from cluster.gateway.replies import PREDICTED_TTFT_HEADER, JSONBytes, error_response, read_all
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
from cluster.gateway.tokenizer import TextTokenizer
from cluster.gateway.tracing import NO_TRACING, Trace, Tracing
from cluster.metrics import RESUMED, WORKER_LOST, CountCollector, EngineCollector, GatewayMetrics, GenerationTimer
from cluster.protocol import Hello, Submit

Headers = dict[str, str]
Asked = tuple[RequestModel, GenerationRequest]  # in its dialect's own words, and as a generation
INLINE_BYTES = 32 * 1024  # a larger body is parsed off the event loop
INLINE_CHARS = 4096  # a longer text is tokenised off the event loop
TEMPLATE_SLACK_S = 1.0  # for a thread to be free; the template's own bound comes first, mostly

Checked = TypeVar("Checked")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Work(Generic[Checked]):
    """A request while it is worked on."""

    asked: Checked
    place: Place
    held: ExitStack  # what is entered here ends with the request
    trace: Trace
    arrival: float  # time.perf_counter() seconds
    timeout_s: float  # from then on

    @property
    def time_left(self) -> float:
        """Seconds. Raises `DeadlineError` where there are none."""
        left = self.arrival + self.timeout_s - time.perf_counter()
        if left <= 0:
            raise _too_late(self.timeout_s)
        return left


@dataclass(frozen=True, slots=True)
class Admitted:
    """What was predicted of a generation that may run; None: it waits for a worker."""

    prediction: Prediction | None = None  # of its first sequence, from its being sent
    predicted_s: float | None = None  # the same from its arrival

    @property
    def headers(self) -> Headers:
        return {} if self.predicted_s is None else {PREDICTED_TTFT_HEADER: f"{self.predicted_s * 1e3:.3f}"}


@dataclass(frozen=True, slots=True)
class StartedStream:
    """A streamed reply of which the first outputs are there, so that an early error has a status."""

    generation: Generation
    events: Events
    first: Batch
    headers: Headers


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
            return await self._serve(
                request, partial(_check, form=dialect), partial(self._generate, dialect), is_traced=True
            )
        except ForetokenError as error:
            raise dialect.in_its_words(error) from None

    def responses(self, request: Request) -> Responses:
        """The Responses API as the tenant of a request has it."""
        return Responses(self.responses_of(request), self._thoughts_end)

    def responses_of(self, request: Request) -> TenantResponses:
        return self.stored_responses.of(tenant_of(request.scope))

    async def count_tokens(self, request: Request, form: RequestForm[Any]) -> Response:
        """Tell the tokens of the prompt that a request of such a form makes. Raises `ForetokenError`s."""

        async def count(work: Work[Asked]) -> Response:
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
        *,
        is_traced: bool = False,
    ) -> Response:
        """Answer a request that is no generation: `check` reads its body, `answer` does the rest.

        It ends when the client leaves, and after `request_timeout_s`. `is_traced`: it is work for workers. Raises
        `ForetokenError`s.
        """

        async def timed(work: Work[Checked]) -> Response:
            try:
                async with asyncio.timeout(work.time_left):
                    return await answer(work)
            except TimeoutError:
                raise _too_late(work.timeout_s) from None

        return await self._serve(request, check, timed, is_traced=is_traced)

    async def _serve(
        self,
        request: Request,
        check: Callable[[bytes], Checked],
        start: Callable[[Work[Checked]], Coroutine[Any, Any, Response | StartedStream]],
        *,
        is_traced: bool,
    ) -> Response:
        """Find a place for a request, read its body and let `start` answer it, while the client is there."""
        arrival = time.perf_counter()
        try:
            with ExitStack() as held:
                tracing = self.tracing if is_traced else NO_TRACING
                trace = tracing.request(request.method, request.url.path, request.headers, arrival)
                held.enter_context(trace)
                place = held.enter_context(self.place(request))
                asked = await self._read_body(request, place, check)
                work = Work(asked, place, held, trace, arrival, self.settings.request_timeout_s)

                async def begun() -> Response | StartedStream:
                    place.begin()
                    return await start(work)

                try:
                    started = await until_disconnect(request.receive, begun())
                except asyncio.CancelledError:
                    place.check()
                    raise
                if isinstance(started, Response):
                    return started
                return EventStream(
                    started.generation,
                    started.events,
                    started.first,
                    held.pop_all(),
                    self.settings.send_timeout_s,
                    started.headers,
                )
        except ClientDisconnected as error:
            return error_response(error, request.scope)
        except ClientDisconnect:
            gone = ClientDisconnected("the connection ended before the whole body had come")
            return error_response(gone, request.scope)

    def place(self, request: Request) -> AbstractContextManager[Place]:
        """A request's place among the open ones, while the context lasts. Raises `UnavailableError`s."""
        return self.admission.slot(request.state.request_id, tenant_of(request.scope))

    async def _read_body(self, request: Request, place: Place, check: Callable[[bytes], Checked]) -> Checked:
        """What `check` makes of a body."""
        body = await read_body(
            request.stream(),
            length=request.headers.get("content-length"),
            max_bytes=self.settings.max_body_bytes,
            timeout_s=self.settings.body_timeout_s,
            hold=place.hold,
        )
        if len(body) <= INLINE_BYTES:
            return check(body)
        place.hold(VALUE_BYTES * num_values(body))
        return await run_in(self._threads.bodies, partial(check, body))

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

    async def _generate(self, dialect: Dialect[Any], work: Work[Asked]) -> Response | StartedStream:
        """A whole reply, or the beginning of a streamed one."""
        asked, unchecked = work.asked
        request = self._checked(unchecked, work.place)
        hello = await self.ready(work.time_left)
        try:
            async with asyncio.timeout(work.time_left):
                texts, shape = await self._encode(request, hello.max_model_len)
        except TimeoutError:
            raise _too_late(work.timeout_s) from None
        reply_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
        timeout_s = work.time_left
        submits = make_submits(
            request,
            texts,
            reply_id=reply_id,
            hello=hello,
            settings=self.settings,
            timeout_s=timeout_s,
            shape=shape,
            traceparent=work.trace.traceparent,
        )
        admitted = self._admit(submits, work.arrival)
        job = Job(
            reply_id=reply_id,
            created=int(time.time()),
            model=self.settings.served_name,
            request=request,
            prompts=texts.prompts,
            submits=submits,
            asked=asked,
            make_parser=shape.make_parser,
            request_id=work.place.request_id,
        )
        observer = self._observe(job, work, admitted.predicted_s)
        generation = work.held.enter_context(
            self.pool.submit(submits, timeout_s=timeout_s, observer=observer, prediction=admitted.prediction)
        )
        generation.grammar_field = shape.grammar_field
        work.place.run(generation, job.num_prompt_tokens)
        if not request.stream:
            choices, usage = await read_all(generation, job)
            return JSONBytes(dialect.body(job, choices, usage), headers=admitted.headers)
        return StartedStream(generation, dialect.events(job), await generation.read(), admitted.headers)

    def _admit(self, submits: Sequence[Submit], arrival: float) -> Admitted:
        """Let a generation run, or raise `OverloadedError` where one of its sequences would wait for too long.

        The reply's header is about its first sequence, the bound about the last of them.
        """
        self.check_wait(submits, arrival)
        prediction = self.pool.predict(submits[:1])
        if prediction is None:
            return Admitted()
        return Admitted(prediction, time.perf_counter() - arrival + prediction.ttft_s)

    async def ready(self, timeout_s: float) -> Hello:
        """Wait for a worker, for `max_ttft_s` at most. Raises `UnavailableError`s."""
        bound_s = self.settings.max_ttft_s
        if bound_s is None or bound_s >= timeout_s:
            return await self.pool.ready(timeout_s)
        try:
            return await self.pool.ready(bound_s)
        except DeadlineError as error:
            raise UnavailableError(f"{error.message}; try again later", retry_after_s=bound_s) from None

    def check_wait(self, submits: Sequence[Submit], arrival: float) -> None:
        """Raise `OverloadedError` where the first tokens of a request's sequences would come later than `max_ttft_s`
        after its `arrival`.
        """
        if self.settings.max_ttft_s is not None and (prediction := self.pool.predict(submits)) is not None:
            check_ttft(prediction, self.settings.max_ttft_s, time.perf_counter() - arrival)

    def _observe(self, job: Job, work: Work[Asked], predicted_s: float | None) -> Observers:
        """Count what goes to the workers now, and tell who observes what becomes of it."""
        self.metrics.prompt_tokens.observe(job.num_prompt_tokens)
        work.trace.generates(job, predicted_s)
        work.trace.sent()
        timer = GenerationTimer(
            self.metrics,
            arrival=work.arrival,
            num_choices=len(job.submits),
            predicted_s=predicted_s,
            tell_ttft=self.recent.ttft.observe,
            tell_itl=self.recent.itl.observe,
        )
        return Observers((timer, work.trace))

    async def _encode(self, request: GenerationRequest, max_model_len: int) -> tuple[Texts, ReplyShape]:
        chat_text = await self.render(request) if isinstance(request, ChatCompletionRequest) else None
        check_lengths(request, self.tokenizer, chat_text, max_model_len)

        def encoded() -> tuple[Texts, ReplyShape]:
            texts = encode(request, self.tokenizer, chat_text, max_model_len)
            return texts, self.reply_format.of(request, chat_text)

        return await self.with_text(num_chars(request, chat_text), encoded)

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

    async def with_text(self, num_chars: int, convert: Callable[[], Result]) -> Result:
        """The result of `convert`, which (de)tokenises so much text: off the event loop where that is long."""
        return convert() if num_chars <= INLINE_CHARS else await run_in(self._threads.texts(num_chars), convert)


def gateway_of(request: Request) -> Gateway:
    """The gateway of the application that a request came to."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def _too_late(timeout_s: float) -> DeadlineError:
    return DeadlineError(f"the request took longer than {timeout_s:g} s")


def model_not_found(asked: str, served: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"the model {asked!r:.200} is not served here; {served!r} is", param="model")


def _check(body: bytes, form: RequestForm[Any]) -> Asked:
    asked = validate(form.request_type, parse_object(body))
    return asked, form.generation(asked)
