"""What the gateway counts itself: its requests, and the workers that it is connected to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster.metrics import table
from cluster.metrics.table import PREFIX, Spec
from cluster.protocol import Hello


class GatewayMetrics:
    """A sample of `n` counts as a request of its own, as in vLLM."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        def counter(spec: Spec) -> Counter:
            return Counter(PREFIX + spec.name, spec.text, ("model_name", *spec.labels), registry=registry)

        def labelled_gauge(spec: Spec) -> Gauge:
            return Gauge(PREFIX + spec.name, spec.text, ("model_name", *spec.labels), registry=registry)

        def gauge(spec: Spec) -> Gauge:
            return labelled_gauge(spec).labels(model_name)

        def histogram(spec: Spec) -> Histogram:
            name, labels = PREFIX + spec.name, ("model_name",)
            return Histogram(name, spec.text, labels, registry=registry, buckets=spec.buckets).labels(model_name)

        self._model_name = model_name
        self._http = counter(table.HTTP_REQUESTS)
        self._errors = counter(table.ERRORS)
        self._finished = counter(table.FINISHED)
        self._aborted = counter(table.ABORTED)
        self.open_requests = gauge(table.OPEN_REQUESTS)
        self.worker_up = gauge(table.WORKER_UP)
        self.worker_connections = gauge(table.WORKER_CONNECTIONS)
        self._saturation = gauge(table.SATURATION)
        self._worker_saturation = labelled_gauge(table.WORKER_SATURATION)
        self._startup = labelled_gauge(table.STARTUP_TIME)
        self._cache_config = labelled_gauge(table.CACHE_CONFIG)
        self.ttft = histogram(table.TTFT)
        self.predicted_ttft = histogram(table.PREDICTED_TTFT)
        self.prediction_error = histogram(table.PREDICTION_ERROR)
        self.itl = histogram(table.ITL)
        self.tpot = histogram(table.TPOT)
        self.e2e = histogram(table.E2E)
        self.queue_time = histogram(table.QUEUE_TIME)
        self.prefill_time = histogram(table.PREFILL_TIME)
        self.decode_time = histogram(table.DECODE_TIME)
        self.prompt_tokens = histogram(table.PROMPT_TOKENS)
        self.generated_tokens = histogram(table.GENERATED_TOKENS)

    def answered(self, method: str, route: str, status: int) -> None:
        self._http.labels(self._model_name, method, route, str(status)).inc()

    def failed(self, code: str) -> None:
        self._errors.labels(self._model_name, code).inc()

    def finished(self, reason: str) -> None:
        self._finished.labels(self._model_name, reason).inc()

    def aborted(self, reason: str) -> None:
        self._aborted.labels(self._model_name, reason).inc()

    def workers(self, hellos: Mapping[str, Hello], saturations: Mapping[str, float]) -> None:
        """What the workers are that are there now, by name."""
        for family in (self._startup, self._worker_saturation, self._cache_config):
            family.clear()
        for name, hello in hellos.items():
            if hello.startup_s:
                self._startup.labels(self._model_name, name).set(hello.startup_s)
        for name, saturation in saturations.items():
            self._worker_saturation.labels(self._model_name, name).set(saturation)
        self._saturation.set(sum(saturations.values()) / len(saturations) if saturations else 0.0)
        if hellos:
            first = next(iter(hellos.values()))
            num_pages = sum(hello.num_pages for hello in hellos.values())
            self._cache_config.labels(
                self._model_name, str(first.page_size), first.dtype, str(first.prefix_cache), str(num_pages)
            ).set(1)


@dataclass(slots=True)
class _Clock:
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


class GenerationTimer:
    """Times the sequences of one request, from its `arrival` (`time.perf_counter()` seconds).

    `tell_ttft` and `tell_itl` are told, in seconds, what the histograms are: each sequence's time to its first token
    and the times between its steps' tokens.
    """

    def __init__(
        self,
        metrics: GatewayMetrics,
        *,
        arrival: float,
        num_choices: int,
        predicted_s: float | None = None,
        tell_ttft: Callable[[float], None] | None = None,
        tell_itl: Callable[[float], None] | None = None,
    ) -> None:
        """`predicted_s`: from the arrival to the first token of all."""
        self._metrics = metrics
        self._ttft = [metrics.ttft.observe, *([tell_ttft] if tell_ttft else [])]
        self._itl = [metrics.itl.observe, *([tell_itl] if tell_itl else [])]
        self._arrival = arrival
        self._predicted_s = predicted_s
        self._clocks = [_Clock() for _ in range(num_choices)]
        if predicted_s is not None:
            metrics.predicted_ttft.observe(predicted_s)

    def began(self, choice: int, queue_s: float, prefill_s: float) -> None:
        """What a worker says of a sequence whose first output it has sent."""
        self._metrics.queue_time.observe(queue_s)
        self._metrics.prefill_time.observe(prefill_s)

    def tokens(self, choice: int, num_tokens: int) -> None:
        now, clock = time.perf_counter(), self._clocks[choice]
        if clock.num_tokens:
            for tell in self._itl:
                tell(now - clock.last)
        else:
            ttft_s = now - self._arrival
            for tell in self._ttft:
                tell(ttft_s)
            if self._predicted_s is not None:
                self._metrics.prediction_error.observe(abs(self._predicted_s - ttft_s) / ttft_s)
                self._predicted_s = None
            clock.first = now
        clock.last = now
        clock.num_tokens += num_tokens

    def finished(self, choice: int, reason: str) -> None:
        clock = self._clocks[choice]
        self._metrics.finished(reason)
        self._metrics.e2e.observe(time.perf_counter() - self._arrival)
        self._metrics.generated_tokens.observe(clock.num_tokens)
        if clock.num_tokens:
            self._metrics.decode_time.observe(clock.last - clock.first)
        if clock.num_tokens > 1:
            self._metrics.tpot.observe((clock.last - clock.first) / (clock.num_tokens - 1))

    def aborted(self, choice: int, reason: str) -> None:
        self._metrics.aborted(reason)
