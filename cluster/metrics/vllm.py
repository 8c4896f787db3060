"""The metrics that vLLM has too, under its names and labels, for routers and dashboards that look for these."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from cluster.metrics.table import ABORTED, FINISHED, PREFIX, VLLM_PREFIX, WAITING_BY_REASON, all_metrics

ENGINE = "0"  # vLLM's label: all workers behind a gateway are one
REASONS = {"grammar": "deferred"}  # what vLLM calls them
_FINISHED, _ABORTED = FINISHED.name.removesuffix("_total"), ABORTED.name.removesuffix("_total")
# of families: a counter's has no _total, which only its sample has
_NAMES = frozenset(
    spec.name.removesuffix("_total") if spec.kind == "counter" else spec.name for spec in all_metrics() if spec.vllm
)


def vllm_text(registry: CollectorRegistry) -> bytes:
    """What of `registry` vLLM has too, as a scrape's text."""
    renamed = CollectorRegistry()
    renamed.register(_Renamed(registry))
    return generate_latest(renamed)


class _Renamed(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        families = {family.name.removeprefix(PREFIX): family for family in self._registry.collect()}
        for name, family in families.items():
            if name in _NAMES:
                samples = [_renamed(sample) for sample in family.samples]
                if name == _FINISHED and _ABORTED in families:
                    samples += _aborted(families[_ABORTED], f"{VLLM_PREFIX}{FINISHED.name}")
                renamed = Metric(VLLM_PREFIX + name, family.documentation, family.type)
                renamed.samples = samples
                yield renamed


def _renamed(sample: Sample) -> Sample:
    labels = sample.labels | {"engine": ENGINE}
    if sample.name == PREFIX + WAITING_BY_REASON.name:
        labels["reason"] = REASONS.get(labels["reason"], labels["reason"])
    return sample._replace(name=VLLM_PREFIX + sample.name.removeprefix(PREFIX), labels=labels)


def _aborted(family: Metric, name: str) -> Iterable[Sample]:
    """vLLM counts what was aborted among what has finished."""
    found = [sample for sample in family.samples if sample.name.endswith("_total")]
    if found:
        labels = {"model_name": found[0].labels["model_name"], "finished_reason": "abort", "engine": ENGINE}
        yield Sample(name, labels, sum(sample.value for sample in found))
