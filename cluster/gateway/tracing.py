"""Traces of requests by OpenTelemetry: one span a request, and for each sequence its queue, prefill and decode.

Attributes are those of the semantic conventions for generative AI (gen_ai.*, status Development) and vLLM's
gen_ai.latency.*. No span has a word of a prompt, of a reply or of an error's message. Without an endpoint nothing is
made, but the W3C trace context of a request goes on to its worker all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError, ForetokenError
from cluster.gateway.generation import Unobserved
from cluster.gateway.openai import ChatCompletionRequest
from cluster.gateway.submit import Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

PROVIDER = "foretoken"
MAX_TRACED_CHOICES = 16  # of one request: what hundreds of samples did is in the metrics
FLUSH_S = 3.0  # for the last spans, at the end
# https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Trace(Unobserved):
    """What is told of one request, from its beginning to its end. This one is for requests that nobody traces."""

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent  # of what the worker does

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def generates(self, job: Job, predicted_s: float | None) -> None:
        """What it asks for. `predicted_s`: from its arrival to its first token."""

    def embeds(self, model: str, reply_id: str, num_tokens: int, encoding_format: str, request_id: str) -> None:
        """What it asks for, of inputs that have `num_tokens` together."""

    def sent(self) -> None:
        """Sequences of it go to workers now."""


class Tracing:
    """Makes a `Trace` of each request; this one makes none that is kept."""

    def request(self, method: str, path: str, headers: Mapping[str, str], arrival: float) -> Trace:
        """`arrival`: of the request, in `time.perf_counter()` seconds."""
        given = headers.get("traceparent", "")
        return Trace(given if _TRACEPARENT.fullmatch(given) else "")

    async def close(self) -> None:
        """Send what has not gone yet."""


NO_TRACING = Tracing()


class OpenTelemetry(Tracing):
    """Traces to whom a provider's processors send them."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("foretoken")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, method: str, path: str, headers: Mapping[str, str], arrival: float) -> Trace:
        from opentelemetry import trace

        parent = self._propagator.extract(
            {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        )
        attributes = {"http.request.method": method, "url.path": path}
        clock = _Clock()
        span = self._tracer.start_span(
            f"{method} {path}", parent, trace.SpanKind.SERVER, attributes, start_time=clock.unix_ns(arrival)
        )
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, trace.set_span_in_context(span, parent))
        return _SpanTrace(self._tracer, span, carrier.get("traceparent", ""), arrival, clock)

    async def close(self) -> None:
        """A receiver that does not answer is waited for no longer than `FLUSH_S`."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def shut_down() -> None:
            try:
                self._provider.shutdown()
            finally:
                with contextlib.suppress(RuntimeError):  # nobody waits any more
                    loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, name="traces", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await done.wait()


class _Clock:
    """Tells `time.perf_counter()` seconds as UNIX nanoseconds, by one look at both clocks."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    def unix_ns(self, seconds: float) -> int:
        return self._offset_ns + int(seconds * 1e9)


class _SpanTrace(Trace):
    """A request's spans. Times are `time.perf_counter()` seconds."""

    def __init__(self, tracer: Any, span: Any, traceparent: str, arrival: float, clock: _Clock) -> None:
        from opentelemetry import trace

        super().__init__(traceparent)
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span)
        self._clock = clock
        self._arrival = self._sent = arrival
        self._first: dict[int, float] = {}  # of choices that run: when their first output was here
        self._has_begun = False  # any choice
        self._num_tokens = 0
        self._reasons: list[str] = []
        self._error = ""

    def sent(self) -> None:
        self._sent = time.perf_counter()

    def generates(self, job: Job, predicted_s: float | None) -> None:
        request = job.request
        operation = "chat" if isinstance(request, ChatCompletionRequest) else "text_completion"
        self._span.update_name(f"{operation} {job.model}")
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": job.model,
            "gen_ai.response.model": job.model,
            "gen_ai.response.id": job.reply_id,
            "gen_ai.request.choice.count": request.n,
            "gen_ai.request.max_tokens": request.token_limit,
            "gen_ai.request.seed": request.seed,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_k": request.top_k,
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.request.frequency_penalty": request.frequency_penalty,
            "gen_ai.request.presence_penalty": request.presence_penalty,
            "gen_ai.usage.input_tokens": job.num_prompt_tokens,
            "foretoken.predicted_time_to_first_token": predicted_s,
            "foretoken.request_id": job.request_id,
        }
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def embeds(self, model: str, reply_id: str, num_tokens: int, encoding_format: str, request_id: str) -> None:
        self._span.update_name(f"embeddings {model}")
        self._span.set_attributes(
            {
                "gen_ai.operation.name": "embeddings",
                "gen_ai.provider.name": PROVIDER,
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.response.id": reply_id,
                "gen_ai.request.encoding_formats": [encoding_format],
                "gen_ai.usage.input_tokens": num_tokens,
                "foretoken.request_id": request_id,
            }
        )

    def began(self, choice: int, queue_s: float, prefill_s: float) -> None:
        now = time.perf_counter()
        if not self._has_begun:
            self._has_begun = True
            self._span.set_attributes(
                {"gen_ai.latency.time_in_queue": queue_s, "gen_ai.latency.time_in_model_prefill": prefill_s}
            )
        scheduled = max(self._sent, now - prefill_s)
        self._child("queue", choice, self._sent, scheduled)
        self._child("prefill", choice, scheduled, now)
        self._first[choice] = now

    def tokens(self, choice: int, num_tokens: int) -> None:
        if not self._num_tokens:
            ttft_s = time.perf_counter() - self._arrival
            self._span.set_attribute("gen_ai.latency.time_to_first_token", ttft_s)
        self._num_tokens += num_tokens

    def finished(self, choice: int, reason: str) -> None:
        self._reasons.append(reason)
        if (first := self._first.pop(choice, None)) is not None:
            now = time.perf_counter()
            if len(self._reasons) == 1:
                self._span.set_attribute("gen_ai.latency.time_in_model_decode", now - first)
            self._child("decode", choice, first, now)

    def aborted(self, choice: int, reason: str) -> None:
        self._error = reason
        if (first := self._first.pop(choice, None)) is not None:
            self._child("decode", choice, first, time.perf_counter(), error=reason)

    def _child(self, name: str, choice: int, start: float, end: float, error: str = "") -> None:
        if choice >= MAX_TRACED_CHOICES:
            return
        attributes = {"foretoken.choice": choice}
        start_ns = self._clock.unix_ns(start)
        span = self._tracer.start_span(name, self._context, start_time=start_ns, attributes=attributes)
        if error:
            _set_error(span, error)
        span.end(self._clock.unix_ns(end))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ForetokenError):
            self._error = error.code
            self._span.set_attribute("http.response.status_code", error.status)
        elif kind is not None:
            self._error = self._error or kind.__name__
        if self._reasons:
            self._span.set_attribute("gen_ai.response.finish_reasons", self._reasons)
        self._span.set_attribute("gen_ai.usage.output_tokens", self._num_tokens)
        if self._error:
            _set_error(self._span, self._error)
        self._span.end(self._clock.unix_ns(time.perf_counter()))


def _set_error(span: Any, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def open_tracing(endpoint: str | None) -> Tracing:
    """Traces that go to an OTLP receiver over HTTP. `endpoint`: its full URL; None: as the OTEL_* variables say.

    Raises `ConfigError` where OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError(
            "traces need OpenTelemetry, which is not installed: pip install 'foretoken[otel]', or unset "
            "otlp_traces_endpoint and OTEL_EXPORTER_OTLP_ENDPOINT",
            param="otlp_traces_endpoint",
        ) from None
    resource = Resource({SERVICE_NAME: "foretoken"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OpenTelemetry(provider)
