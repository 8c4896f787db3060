"""The table of metrics, sums over workers that come and go, and vLLM's names."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import WORKER_LOST, CountCollector, EngineCollector, GatewayMetrics, GenerationTimer, vllm_text
from cluster.metrics.table import ENGINE_METRICS, STEP_BUCKETS, all_metrics, page
from cluster.protocol import STEP_TOKEN_BOUNDS, EngineState


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
    specs = {spec.name.removesuffix("_total") for metric in ENGINE_METRICS for spec in (metric.spec, metric.of_worker)}
    others = {"iteration_tokens_total", "num_requests_waiting_by_reason"}
    assert names == {f"foretoken:{name}" for name in specs | others}


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
    CountCollector(registry, model_name="m", counts={WORKER_LOST: lambda: counts[0]})
    counts[0] = 4
    assert registry.get_sample_value("foretoken:worker_lost_total", {"model_name": "m"}) == 4


def steps(*num_tokens: int) -> EngineState:
    counts = [0] * (len(STEP_TOKEN_BOUNDS) + 1)
    for num in num_tokens:
        counts[sum(bound < num for bound in STEP_TOKEN_BOUNDS)] += 1
    return EngineState(
        worker_id="w", steps=len(num_tokens), step_tokens=sum(num_tokens), step_token_counts=tuple(counts)
    )


def test_a_steps_tokens_are_a_histogram_over_all_workers() -> None:
    scrape = Scrape()
    scrape.engines.update({"a": steps(1, 3, 10_000), "b": steps(4), "new": EngineState(worker_id="n")})
    name = "iteration_tokens_total"
    assert [scrape.value(f"{name}_bucket", le=le) for le in ("1", "2", "4", "8192", "+Inf")] == [None] * 4 + [4]
    assert [scrape.value(f"{name}_bucket", le=str(bound)) for bound in STEP_BUCKETS[:3]] == [1, 1, 3]
    assert scrape.value(f"{name}_bucket", le=str(STEP_BUCKETS[-1])) == 3
    assert (scrape.value(f"{name}_count"), scrape.value(f"{name}_sum")) == (4, 10_008)


def test_waiting_sequences_add_up_by_reason() -> None:
    scrape = Scrape()
    scrape.engines.update({"a": EngineState(worker_id="1", num_waiting=3, num_compiling=2)})
    assert scrape.value("num_requests_waiting") == 5
    assert scrape.value("num_requests_waiting_by_reason", reason="capacity") == 3
    assert scrape.value("num_requests_waiting_by_reason", reason="grammar") == 2
    assert scrape.value("num_grammar_queue_reqs") == 2


def test_vllms_names_have_its_labels_and_the_same_values() -> None:
    registry = CollectorRegistry()
    EngineCollector(registry, model_name="m").update({"a": EngineState(worker_id="1", num_running=2, num_compiling=1)})
    metrics = GatewayMetrics(registry, model_name="m")
    timer = GenerationTimer(metrics, arrival=0.0, num_choices=1, predicted_s=0.5)
    timer.began(0, 0.25, 0.5)
    timer.tokens(0, 1)
    timer.finished(0, "stop")
    metrics.aborted("disconnect")
    metrics.aborted("deadline")
    families = {family.name: family for family in text_string_to_metric_families(vllm_text(registry).decode())}
    assert all(name.startswith("vllm:") for name in families)
    samples = {}
    for family in families.values():
        for sample in family.samples:
            assert sample.labels["engine"] == "0"
            assert sample.labels["model_name"] == "m"
            samples[sample.name, sample.labels.get("finished_reason", sample.labels.get("reason"))] = sample.value
    assert samples["vllm:num_requests_running", None] == 2
    assert samples["vllm:num_requests_waiting_by_reason", "deferred"] == 1
    assert samples["vllm:request_success_total", "stop"] == 1
    assert samples["vllm:request_success_total", "abort"] == 2
    assert samples["vllm:request_queue_time_seconds_sum", None] == 0.25
    assert samples["vllm:request_prefill_time_seconds_count", None] == 1
    assert "vllm:engine_steps" not in families
    assert families["vllm:iteration_tokens_total"].type == "histogram"


def test_the_document_is_the_tables() -> None:
    """To mend it: python -m cluster.metrics > docs/metrics.md"""
    assert (Path(__file__).parents[3] / "docs" / "metrics.md").read_text() == page()


def test_a_name_says_its_type_and_unit_as_prometheus_has_it() -> None:
    names = [spec.name for spec in all_metrics()]
    assert len(names) == len(set(names))
    for spec in all_metrics():
        assert spec.name.endswith("_total") or spec.kind != "counter"
        assert ("_seconds" in spec.name) == (spec.unit == "seconds")
        assert bool(spec.buckets) == (spec.kind == "histogram")
        assert list(spec.buckets) == sorted(spec.buckets)
