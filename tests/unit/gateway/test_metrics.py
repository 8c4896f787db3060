"""What /metrics says, read by Prometheus' own parser and held against the table."""

from __future__ import annotations

import time

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import GatewayMetrics, GenerationTimer
from cluster.metrics.table import PREFIX, Spec, all_metrics
from cluster.protocol import STEP_TOKEN_BOUNDS, Finish, RequestOutput, Submit
from tests.support.scripted_worker import ScriptedWorker, hello
from tests.unit.gateway.conftest import Serve, Served

pytestmark = pytest.mark.anyio


async def scraped(served: Served) -> dict[str, Metric]:
    reply = await served.http.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(reply.text)}


def family_name(spec: Spec) -> str:
    return spec.name.removesuffix("_total") if spec.kind == "counter" else spec.name


async def test_every_metric_of_the_table_is_there_and_no_other(serve: Serve, worker: ScriptedWorker) -> None:
    worker.hello = hello(startup_s=4.5)
    counts = tuple(range(len(STEP_TOKEN_BOUNDS) + 1))
    worker.state = msgspec.structs.replace(worker.state, step_token_counts=counts, prompt_tokens_ahead=11)
    await worker.kill()
    await worker.start()
    served = await serve(vllm_metrics=True)
    await served.ready()
    assert (await served.complete(max_tokens=3)).status_code == 200
    assert (await served.complete(max_tokens=-3)).status_code == 400
    families = await scraped(served)
    specs = {family_name(spec): spec for spec in all_metrics()}
    ours = {name.removeprefix(PREFIX) for name in families if name.startswith(PREFIX) and not name.endswith("_created")}
    assert ours == set(specs)
    for name, spec in specs.items():
        family = families[PREFIX + name]
        assert family.type == spec.kind
        for sample in family.samples:
            assert sample.labels["model_name"] == "org/scripted"
            assert set(sample.labels) - {"le"} == {"model_name", *spec.labels}, spec.name
        if spec.kind == "histogram":
            bounds = {sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")}
            assert {float(bound) for bound in bounds} == {*spec.buckets, float("inf")}
        if spec.vllm:
            assert families[f"vllm:{name}"].type == spec.kind
    assert await served.metric('foretoken:startup_time_seconds{model_name="org/scripted",worker="worker"}') == 4.5
    assert await served.metric("foretoken:prompt_tokens_ahead") == 11
    assert await served.metric("vllm:num_requests_running") == worker.state.num_running
    (info,) = families["foretoken:cache_config_info"].samples
    assert (info.labels["block_size"], info.labels["num_gpu_blocks"], info.labels["enable_prefix_caching"]) == (
        "64", "64", "True",
    )  # fmt: skip


async def test_vllms_names_are_there_only_where_they_are_asked_for(served: Served) -> None:
    assert not [name for name in await scraped(served) if name.startswith("vllm:")]


@pytest.mark.parametrize(
    ("running", "pages_free", "max_ttft_s", "expected"),
    [(32, 64, None, 0.5), (0, 19, None, (1 - 19 / 64) / 0.9), (6, 64, 0.0005, None)],
)
async def test_saturation_is_what_is_nearest_to_its_bound(
    serve: Serve,
    worker: ScriptedWorker,
    running: int,
    pages_free: int,
    max_ttft_s: float | None,
    expected: float | None,
) -> None:
    worker.state = msgspec.structs.replace(worker.state, num_running=running, pages_free=pages_free)
    served = await serve(max_ttft_s=max_ttft_s)
    await served.ready()
    found = await served.metric('foretoken:saturation{model_name="org/scripted"}')
    assert found == await served.metric('foretoken:worker_saturation{model_name="org/scripted",worker="worker"}')
    if expected is None:  # a step of an idle worker takes longer than the bound
        assert found > 5
    else:
        assert found == pytest.approx(expected)


async def test_a_workers_times_are_observed_once_a_sequence(served: Served, worker: ScriptedWorker) -> None:
    assert (await served.complete(max_tokens=3, n=2)).status_code == 200
    labels = '{model_name="org/scripted"}'
    for name in ("queue", "prefill", "decode"):
        assert await served.metric(f"foretoken:request_{name}_time_seconds_count{labels}") == 2
    assert await served.metric(f"foretoken:request_queue_time_seconds_sum{labels}") == pytest.approx(2 * 0.25)
    assert await served.metric(f"foretoken:request_prefill_time_seconds_sum{labels}") == pytest.approx(2 * 0.5)


async def test_each_sequence_that_ends_early_is_counted_like_one_that_finishes(
    served: Served, worker: ScriptedWorker
) -> None:
    finishes = iter(
        [Finish(reason="stop"), Finish(reason="error", error_code="engine_error", error_message="no"), None]
    )

    def end(submit: Submit) -> list[RequestOutput]:
        return [RequestOutput(request_id=submit.request_id, index=0, token_ids=[1], finish=next(finishes))]

    worker.raw = end
    assert (await served.complete(n=3)).status_code == 500
    label = 'model_name="org/scripted"'
    assert await served.metric(f'foretoken:requests_aborted_total{{{label},reason="error"}}') == 2
    assert await served.metric(f'foretoken:request_success_total{{finished_reason="stop",{label}}}') == 1


def test_what_is_told_of_latencies_is_what_the_histograms_have() -> None:
    registry, ttfts, itls = CollectorRegistry(), list[float](), list[float]()
    metrics = GatewayMetrics(registry, model_name="m")
    timer = GenerationTimer(
        metrics, arrival=time.perf_counter(), num_choices=2, tell_ttft=ttfts.append, tell_itl=itls.append
    )
    for choice in (0, 1, 0, 0):
        timer.tokens(choice, 1)
    assert (len(ttfts), len(itls)) == (2, 2)
    for name, told in (("time_to_first_token", ttfts), ("inter_token_latency", itls)):
        assert registry.get_sample_value(f"foretoken:{name}_seconds_sum", {"model_name": "m"}) == sum(told)
