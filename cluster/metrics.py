"""Every metric's name, unit and labels. The registry is the caller's; nothing is registered at import.

Names follow vLLM's, which routers and dashboards look for, under our own prefix. Shares are fractions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.protocol import EngineState

PREFIX = "foretoken:"
TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
TOKEN_BUCKETS_S = (0.001, 0.002, 0.004, 0.008, 0.012, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6, 3.2, 10.0)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
COUNT_BUCKETS = tuple(float(2**power) for power in range(0, 21, 2))


class GatewayMetrics:
    """What the gateway sees of its requests. A sample of `n` counts as a request of its own, as in vLLM."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ("model_name", *labels), registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, ("model_name",), registry=registry).labels(model_name)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, ("model_name",), registry=registry, buckets=buckets).labels(
                model_name
            )

        self._model_name = model_name
        self._http = counter("http_requests_total", "HTTP requests answered", "method", "route", "status")
        self._errors = counter("request_errors_total", "Requests refused or failed, by error code", "code")
        self._finished = counter("request_success_total", "Sequences finished, by reason", "finished_reason")
        self._aborted = counter("requests_aborted_total", "Requests ended early, by cause", "reason")
        self.open_requests = gauge("http_open_requests", "Generation requests being served or waiting")
        self.worker_up = gauge("worker_up", "Workers that are connected")
        self.worker_connections = gauge("worker_connections", "Connections made to workers since the start")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS_S)
        self.itl = histogram("inter_token_latency_seconds", "Between two steps' tokens", TOKEN_BUCKETS_S)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "A sequence's mean time per token after its first", TOKEN_BUCKETS_S
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token", REQUEST_BUCKETS_S)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request", COUNT_BUCKETS)
        self.generated_tokens = histogram("request_generation_tokens", "Tokens of a finished sequence", COUNT_BUCKETS)

    def answered(self, method: str, route: str, status: int) -> None:
        self._http.labels(self._model_name, method, route, str(status)).inc()

    def failed(self, code: str) -> None:
        self._errors.labels(self._model_name, code).inc()

    def finished(self, reason: str) -> None:
        self._finished.labels(self._model_name, reason).inc()

    def aborted(self, reason: str) -> None:
        self._aborted.labels(self._model_name, reason).inc()


@dataclass(slots=True)
class _Clock:
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


class GenerationTimer:
    """Times the sequences of one request, from its `arrival` (`time.perf_counter()` seconds)."""

    def __init__(self, metrics: GatewayMetrics, *, arrival: float, num_choices: int) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._clocks = [_Clock() for _ in range(num_choices)]

    def tokens(self, choice: int, num_tokens: int) -> None:
        now, clock = time.perf_counter(), self._clocks[choice]
        if clock.num_tokens:
            self._metrics.itl.observe(now - clock.last)
        else:
            self._metrics.ttft.observe(now - self._arrival)
            clock.first = now
        clock.last = now
        clock.num_tokens += num_tokens

    def finished(self, choice: int, reason: str) -> None:
        clock = self._clocks[choice]
        self._metrics.finished(reason)
        self._metrics.e2e.observe(time.perf_counter() - self._arrival)
        self._metrics.generated_tokens.observe(clock.num_tokens)
        if clock.num_tokens > 1:
            self._metrics.tpot.observe((clock.last - clock.first) / (clock.num_tokens - 1))

    def aborted(self, reason: str) -> None:
        self._metrics.aborted(reason)


@dataclass(frozen=True, slots=True)
class EngineMetric:
    name: str
    kind: Literal["counter", "gauge"]
    text: str
    value: Callable[[EngineState], float]


def _kv_usage(state: EngineState) -> float:
    return 1.0 - state.pages_free / state.pages_total if state.pages_total else 0.0


ENGINE_METRICS = (
    EngineMetric("num_requests_running", "gauge", "Sequences in the running batch", lambda s: s.num_running),
    EngineMetric("num_requests_waiting", "gauge", "Sequences waiting for admission", lambda s: s.num_waiting),
    EngineMetric("kv_cache_usage_perc", "gauge", "Share of the KV pages in use (1: all)", _kv_usage),
    EngineMetric("kv_cache_pages", "gauge", "KV pages in all", lambda s: s.pages_total),
    EngineMetric("prompt_tokens", "counter", "Prompt tokens computed", lambda s: s.prompt_tokens),
    EngineMetric("generation_tokens", "counter", "Tokens generated", lambda s: s.generated_tokens),
    EngineMetric("prefix_cache_queries", "counter", "Prompt tokens looked up", lambda s: s.queried_tokens),
    EngineMetric("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache", lambda s: s.cached_tokens),
    EngineMetric("num_preemptions", "counter", "Sequences that gave up their pages", lambda s: s.preemptions),
    EngineMetric("engine_steps", "counter", "Steps", lambda s: s.steps),
    EngineMetric("iteration_tokens", "counter", "Tokens of all steps", lambda s: s.step_tokens),
    EngineMetric("engine_sequence_steps", "counter", "Sequences of all steps", lambda s: s.sequence_steps),
    EngineMetric("engine_forward_seconds", "counter", "Time inside the model", lambda s: s.forward_s),
    EngineMetric("engine_step_seconds", "counter", "Time inside the engine's steps", lambda s: s.step_s),
)
NUMBERS = tuple(name for name in EngineState.__struct_fields__ if name != "worker_id")


class EngineCollector(Collector):
    """The engines' numbers as of the last `update`: each metric summed over the workers, and ``worker_`` before its
    name for each by itself; none before a worker was there.

    A counter goes on where a worker ended and another process has taken its name: the sum never falls.
    """

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        self._model_name = model_name
        self._current: Mapping[str, EngineState] = {}
        self._last: dict[str, EngineState] = {}  # what each name said last
        self._past = EngineState()  # of processes that have ended
        registry.register(self)

    def update(self, states: Mapping[str, EngineState]) -> None:
        """`states`: of the workers that answer now, by name."""
        for name, state in states.items():
            before = self._last.get(name)
            if before is not None and before.worker_id != state.worker_id:
                self._past = _sum([self._past, before])
            self._last[name] = state
        self._current = states

    def collect(self) -> Iterable[Metric]:
        if not self._last:
            return
        total, now = _sum([self._past, *self._last.values()]), _sum(self._current.values())
        for metric in ENGINE_METRICS:
            family = _family(metric, metric.name, "model_name")
            family.add_metric((self._model_name,), metric.value(total if metric.kind == "counter" else now))
            yield family
        for metric in ENGINE_METRICS:
            family = _family(metric, f"worker_{metric.name}", "model_name", "worker")
            for name, state in self._current.items():
                family.add_metric((self._model_name, name), metric.value(state))
            yield family


def _family(metric: EngineMetric, name: str, *labels: str) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(PREFIX + name, metric.text, labels=labels)


def _sum(states: Iterable[EngineState]) -> EngineState:
    values = [msgspec.structs.asdict(state) for state in states]
    return EngineState(**{name: sum(value[name] for value in values) for name in NUMBERS})


class CountCollector(Collector):
    """Counters that are kept elsewhere and read when they are asked for: name -> (help, value)."""

    def __init__(
        self, registry: CollectorRegistry, *, model_name: str, counts: Mapping[str, tuple[str, Callable[[], int]]]
    ) -> None:
        self._model_name = model_name
        self._counts = counts
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        for name, (text, value) in self._counts.items():
            family = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
            family.add_metric((self._model_name,), value())
            yield family
