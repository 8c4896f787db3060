"""Every metric: its name, what it counts, in which unit, its labels, and whether vLLM has it too.

Names follow vLLM's, which routers and dashboards look for, under our own prefix. Shares are fractions of 1; a ratio may
be over it. ``python -m cluster.metrics`` prints `docs/metrics.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.protocol import STEP_TOKEN_BOUNDS, EngineState

PREFIX = "foretoken:"
VLLM_PREFIX = "vllm:"
TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
TOKEN_BUCKETS_S = (0.001, 0.002, 0.004, 0.008, 0.012, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6, 3.2, 10.0)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
QUEUE_BUCKETS_S = (0.001, 0.005, 0.02, *REQUEST_BUCKETS_S)
COUNT_BUCKETS = tuple(float(2**power) for power in range(0, 21, 2))
STEP_BUCKETS = tuple(map(float, STEP_TOKEN_BOUNDS))
FULL_KV = 0.9  # share of the KV pages in use that counts as saturated
RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
INTRODUCTION = f"""# Metrics

What `GET /metrics` says, made by `python -m cluster.metrics`. Every metric has the label `model_name`; what workers
tell is there once one was. With `--vllm-metrics` those that vLLM has are there under its names as well: the same
behind `{VLLM_PREFIX}`, with its label `engine`. A share is a fraction of 1, a ratio may be
over it.

Of the names that routers and dashboards know from others these are not here, as there is nothing that they would count:
`spec_decode_*` and `spec_accept_length` (no speculative decoding), `lora_*`, `external_prefix_cache_*`, `nixl_*`,
`kv_offload_*`, `kv_transfer_*` and `num_prefill_bootstrap_queue_reqs` (prefill and decode are not apart),
`dp_attention_*`.
"""
Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "seconds", "tokens", "pages", "share", "ratio"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric. `name` as it is exposed, a counter's with its ``_total``."""

    name: str
    kind: Kind
    unit: Unit
    text: str
    labels: tuple[str, ...] = ()  # beside model_name
    buckets: tuple[float, ...] = ()  # of a histogram
    vllm: bool = False  # vLLM has it under the same name


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """A metric of an engine, and how it is read from what a worker tells."""

    spec: Spec
    value: Callable[[EngineState], float]

    @property
    def of_worker(self) -> Spec:
        """The same for each worker by itself."""
        spec = self.spec
        return Spec(f"worker_{spec.name}", spec.kind, spec.unit, f"{spec.text} (each worker)", ("worker",))


def _counter(name: str, text: str, *labels: str, unit: Unit = "", vllm: bool = False) -> Spec:
    return Spec(f"{name}_total", "counter", unit, text, labels, (), vllm)


def _gauge(name: str, text: str, *labels: str, unit: Unit = "", vllm: bool = False) -> Spec:
    return Spec(name, "gauge", unit, text, labels, (), vllm)


def _histogram(name: str, text: str, buckets: tuple[float, ...], unit: Unit = "seconds", vllm: bool = True) -> Spec:
    return Spec(name, "histogram", unit, text, (), buckets, vllm)


# what the gateway sees of its requests; a sample of `n` counts as one of its own, as in vLLM, also where it is aborted
HTTP_REQUESTS = _counter("http_requests", "HTTP requests answered", "method", "route", "status")
OPEN_REQUESTS = _gauge("http_open_requests", "Generation requests being served or waiting")
ERRORS = _counter("request_errors", "Requests refused or failed, by error code", "code")
FINISHED = _counter("request_success", "Sequences finished, by reason", "finished_reason", vllm=True)
ABORTED = _counter("requests_aborted", "Sequences ended early, by cause", "reason")
TTFT = _histogram("time_to_first_token_seconds", "Arrival to first token", TTFT_BUCKETS_S)
PREDICTED_TTFT = _histogram(
    "predicted_ttft_seconds", "Arrival to first token, as predicted", TTFT_BUCKETS_S, vllm=False
)
PREDICTION_ERROR = _histogram(
    "ttft_prediction_error_ratio", "|predicted - real| / real time to first token", RATIO_BUCKETS, "ratio", vllm=False
)
ITL = _histogram("inter_token_latency_seconds", "Time between two steps' tokens of a sequence", TOKEN_BUCKETS_S)
TPOT = _histogram(
    "request_time_per_output_token_seconds", "A sequence's mean time per token after its first", TOKEN_BUCKETS_S
)
E2E = _histogram("e2e_request_latency_seconds", "Arrival to last token", REQUEST_BUCKETS_S)
QUEUE_TIME = _histogram(
    "request_queue_time_seconds", "A sequence's wait at its worker for its first step", QUEUE_BUCKETS_S
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds", "A sequence's time from its first step to its first token", QUEUE_BUCKETS_S
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", "A sequence's time from its first token to its last", REQUEST_BUCKETS_S
)
PROMPT_TOKENS = _histogram("request_prompt_tokens", "Prompt tokens of a request", COUNT_BUCKETS, "tokens")
GENERATED_TOKENS = _histogram("request_generation_tokens", "Tokens of a finished sequence", COUNT_BUCKETS, "tokens")
REQUEST_METRICS = (
    HTTP_REQUESTS, OPEN_REQUESTS, ERRORS, FINISHED, ABORTED, TTFT, PREDICTED_TTFT, PREDICTION_ERROR, ITL, TPOT, E2E,
    QUEUE_TIME, PREFILL_TIME, DECODE_TIME, PROMPT_TOKENS, GENERATED_TOKENS,
)  # fmt: skip

# what the gateway sees of its workers
WORKER_UP = _gauge("worker_up", "Workers that are connected")
WORKER_CONNECTIONS = _gauge("worker_connections", "Connections made to workers since the start")
WORKER_LOST = _counter("worker_lost", "Connections to workers that broke")
RESUMED = _counter("requests_resumed", "Sequences that went on after a worker was lost")
_SATURATION_PARTS = (
    f"the largest of running / max_num_seqs, KV pages in use / {FULL_KV:g}, and the time until what waits has its "
    "first token / max_ttft_s where that is set"
)
SATURATION = _gauge(
    "saturation", f"How near the workers are to what they can do (1: there): the mean over them of {_SATURATION_PARTS}"
)
WORKER_SATURATION = _gauge(
    "worker_saturation", f"How near a worker is to what it can do (1: there): {_SATURATION_PARTS}", "worker"
)
STARTUP_TIME = _gauge("startup_time_seconds", "From a worker's start until it served", "worker", unit="seconds")
CACHE_CONFIG = _gauge(
    "cache_config_info", "Always 1: the labels say how the KV caches are set up, whose pages are called blocks",
    "block_size", "cache_dtype", "enable_prefix_caching", "num_gpu_blocks", vllm=True,
)  # fmt: skip
WORKERS_METRICS = (
    WORKER_UP, WORKER_CONNECTIONS, WORKER_LOST, RESUMED, SATURATION, WORKER_SATURATION, STARTUP_TIME, CACHE_CONFIG,
)  # fmt: skip


def kv_usage(state: EngineState) -> float:
    return 1.0 - state.pages_free / state.pages_total if state.pages_total else 0.0


# what workers tell of their engines
ENGINE_METRICS = (
    EngineSpec(
        _gauge("num_requests_running", "Sequences in the running batch", vllm=True), lambda state: state.num_running
    ),
    EngineSpec(
        _gauge("num_requests_waiting", "Sequences waiting to run", vllm=True),
        lambda state: state.num_waiting + state.num_compiling,
    ),
    EngineSpec(
        _gauge("num_grammar_queue_reqs", "Waiting sequences whose grammar is being compiled"),
        lambda state: state.num_compiling,
    ),
    EngineSpec(
        _gauge("prompt_tokens_ahead", "Prompt tokens not computed yet, of all sequences", unit="tokens"),
        lambda state: state.prompt_tokens_ahead,
    ),
    EngineSpec(_gauge("kv_cache_usage_perc", "KV pages in use (1: all)", unit="share", vllm=True), kv_usage),
    EngineSpec(_gauge("kv_cache_pages", "KV pages in all", unit="pages"), lambda state: state.pages_total),
    EngineSpec(
        _counter("prompt_tokens", "Prompt tokens computed", unit="tokens", vllm=True),
        lambda state: state.prompt_tokens,
    ),
    EngineSpec(
        _counter("generation_tokens", "Tokens generated", unit="tokens", vllm=True),
        lambda state: state.generated_tokens,
    ),
    EngineSpec(
        _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", unit="tokens", vllm=True),
        lambda state: state.queried_tokens,
    ),
    EngineSpec(
        _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", unit="tokens", vllm=True),
        lambda state: state.cached_tokens,
    ),
    EngineSpec(
        _counter("num_preemptions", "Sequences that gave up their pages", vllm=True), lambda state: state.preemptions
    ),
    EngineSpec(_counter("engine_steps", "Steps of the engines"), lambda state: state.steps),
    EngineSpec(
        _counter("engine_sequence_steps", "Sequences in each step, added up over all steps"),
        lambda state: state.sequence_steps,
    ),
    EngineSpec(
        _counter("engine_forward_seconds", "Time inside the model", unit="seconds"), lambda state: state.forward_s
    ),
    EngineSpec(
        _counter("engine_step_seconds", "Time inside the engine's steps", unit="seconds"), lambda state: state.step_s
    ),
)
STEP_TOKENS = _histogram("iteration_tokens_total", "Tokens of a step", STEP_BUCKETS, "tokens")
WAITING_BY_REASON = _gauge(
    "num_requests_waiting_by_reason",
    "Sequences waiting, for places and pages or for their grammar",
    "reason",
    vllm=True,
)
WAITING_REASONS: dict[str, Callable[[EngineState], int]] = {
    "capacity": lambda state: state.num_waiting,
    "grammar": lambda state: state.num_compiling,
}


def all_metrics() -> tuple[Spec, ...]:
    return (
        *REQUEST_METRICS,
        *WORKERS_METRICS,
        *(metric.spec for metric in ENGINE_METRICS),
        STEP_TOKENS,
        WAITING_BY_REASON,
        *(metric.of_worker for metric in ENGINE_METRICS),
    )


def page() -> str:
    """`docs/metrics.md`."""
    lines = [INTRODUCTION, "| metric | type | unit | labels | what | vLLM's |", "|---|---|---|---|---|---|"]
    for spec in all_metrics():
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        text = spec.text.replace("|", "\\|")
        lines.append(
            f"| `{PREFIX}{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {text} | {'yes' if spec.vllm else ''} |"
        )
    return "\n".join(lines) + "\n"
