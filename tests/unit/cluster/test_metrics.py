"""Sums over workers that come and go."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from cluster.metrics import ENGINE_METRICS, CountCollector, EngineCollector
from cluster.protocol import EngineState


def state(worker_id: str, tokens: int, running: int = 1, free: int = 5) -> EngineState:
    return EngineState(
        worker_id=worker_id, generated_tokens=tokens, num_running=running, pages_total=10, pages_free=free, step_s=0.5
    )


class Scrape:
    """A registry with one collector, read as a scraper does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engines = EngineCollector(self.registry, model_name="m")

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"foretoken:{name}", {"model_name": "m", **labels})


def test_nothing_is_said_before_a_worker_was_there() -> None:
    scrape = Scrape()
    scrape.engines.update({})
    assert list(scrape.registry.collect()) == []


def test_each_metric_is_there_summed_and_by_worker() -> None:
    scrape = Scrape()
    scrape.engines.update({"a": state("1", 100, running=2, free=10), "b": state("2", 50, running=3, free=5)})
    assert scrape.value("generation_tokens_total") == 150
    assert scrape.value("num_requests_running") == 5
    assert scrape.value("kv_cache_usage_perc") == 0.25
    assert scrape.value("engine_step_seconds_total") == 1.0
    assert scrape.value("worker_generation_tokens_total", worker="a") == 100
    assert scrape.value("worker_num_requests_running", worker="b") == 3
    assert scrape.value("worker_kv_cache_usage_perc", worker="b") == 0.5
    names = {family.name for family in scrape.registry.collect()}
    assert names == {f"foretoken:{part}{metric.name}" for metric in ENGINE_METRICS for part in ("", "worker_")}


def test_a_sum_of_counters_never_falls() -> None:
    scrape = Scrape()
    seen = []
    for states in (
        {"a": state("1", 100), "b": state("2", 50)},
        {"b": state("2", 60)},  # a is lost
        {"a": state("3", 1), "b": state("2", 60)},  # and back as another process
        {"a": state("4", 2), "b": state("2", 60)},
        {},
        {"b": state("2", 61)},
    ):
        scrape.engines.update(states)
        seen.append(scrape.value("generation_tokens_total"))
    assert seen == [150, 160, 161, 163, 163, 164]


def test_a_worker_that_is_lost_runs_nothing() -> None:
    scrape = Scrape()
    scrape.engines.update({"a": state("1", 100, running=2), "b": state("2", 50, running=3)})
    scrape.engines.update({"b": state("2", 50, running=3)})
    assert scrape.value("num_requests_running") == 3
    assert scrape.value("kv_cache_pages") == 10
    assert scrape.value("worker_num_requests_running", worker="a") is None


def test_counts_are_read_when_they_are_asked_for() -> None:
    registry = CollectorRegistry()
    counts = [3]
    CountCollector(registry, model_name="m", counts={"worker_lost": ("Lost", lambda: counts[0])})
    counts[0] = 4
    assert registry.get_sample_value("foretoken:worker_lost_total", {"model_name": "m"}) == 4
