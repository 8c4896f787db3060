"""What workers tell of their engines, as metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.metrics.table import ENGINE_METRICS, PREFIX, STEP_TOKENS, WAITING_BY_REASON, WAITING_REASONS, Spec
from cluster.protocol import EngineState

NUMBERS = tuple(name for name in EngineState.__struct_fields__ if name not in ("worker_id", "step_token_counts"))


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
            family = _family(metric.spec)
            family.add_metric((self._model_name,), metric.value(total if metric.spec.kind == "counter" else now))
            yield family
        yield self._step_tokens(total)
        by_reason = _family(WAITING_BY_REASON)
        for reason, count in WAITING_REASONS.items():
            by_reason.add_metric((self._model_name, reason), count(now))
        yield by_reason
        for metric in ENGINE_METRICS:
            family = _family(metric.of_worker)
            for name, state in self._current.items():
                family.add_metric((self._model_name, name), metric.value(state))
            yield family

    def _step_tokens(self, total: EngineState) -> Metric:
        counts = list(itertools.accumulate(total.step_token_counts or (0,)))
        bounds = [*map(str, STEP_TOKENS.buckets), "+Inf"] if total.step_token_counts else ["+Inf"]
        family = HistogramMetricFamily(PREFIX + STEP_TOKENS.name, STEP_TOKENS.text, labels=("model_name",))
        family.add_metric((self._model_name,), list(zip(bounds, map(float, counts), strict=True)), total.step_tokens)
        return family


def _family(spec: Spec) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    return kind(PREFIX + spec.name, spec.text, labels=("model_name", *spec.labels))


def _sum(states: Iterable[EngineState]) -> EngineState:
    known = list(states)
    counts = [state.step_token_counts for state in known if state.step_token_counts]
    return EngineState(
        **{name: sum(getattr(state, name) for state in known) for name in NUMBERS},
        step_token_counts=tuple(map(sum, zip(*counts, strict=True))),
    )


class CountCollector(Collector):
    """Counters that are kept elsewhere and read when they are asked for."""

    def __init__(
        self, registry: CollectorRegistry, *, model_name: str, counts: Mapping[Spec, Callable[[], int]]
    ) -> None:
        self._model_name = model_name
        self._counts = counts
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        for spec, value in self._counts.items():
            family = _family(spec)
            family.add_metric((self._model_name,), value())
            yield family
