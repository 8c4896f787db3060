"""The command line: commands parse, call and print. What they do lies in modules that they import when they run, so
that ``foretoken --help`` is quick.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.config import ENV_PREFIX, Settings, flag_name, load
from cluster.errors import ForetokenError
from cluster.version import version as installed_version

app = typer.Typer(
    name="foretoken",
    help="Serve Mixture-of-Experts models bigger than your GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure, against a baseline of the same run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
kernels = typer.Typer(help="The compiled kernels.", no_args_is_help=True)
app.add_typer(kernels, name="kernels")
cluster = typer.Typer(help="Serve one model from many processes over many nodes.", no_args_is_help=True)
app.add_typer(cluster, name="cluster")


def _setting(name: str, switch: bool = False) -> Any:
    """The option of a setting; its help and its default come from the field."""
    field = Settings.model_fields[name]
    default = "" if field.default is None else f" (default: {str(field.default).lower()})"
    flag = flag_name(name)
    declaration = f"{flag}/--no-{flag.removeprefix('--')}" if switch else flag
    return typer.Option(declaration, help=f"{field.description}{default}", show_default=False)


Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="a Hugging Face id or a local folder; none: the demo model")
]
Config = Annotated[
    Path | None,
    typer.Option("--config", envvar=f"{ENV_PREFIX}CONFIG", help="a YAML file of settings: see configs/serve.yaml"),
]
Revision = Annotated[str | None, _setting("revision")]
ServedModelName = Annotated[str | None, _setting("served_model_name")]
Home = Annotated[Path | None, _setting("home")]
Host = Annotated[str | None, _setting("host")]
Port = Annotated[int | None, _setting("port")]
DrainTimeout = Annotated[float | None, _setting("drain_timeout_s")]
StartTimeout = Annotated[float | None, _setting("start_timeout_s")]
RequestTimeout = Annotated[float | None, _setting("request_timeout_s")]
MaxOpenRequests = Annotated[int | None, _setting("max_open_requests")]
MaxOpenRequestsPerTenant = Annotated[int | None, _setting("max_open_requests_per_tenant")]
MaxTTFT = Annotated[float | None, _setting("max_ttft_s")]
MaxConnections = Annotated[int | None, _setting("max_connections")]
ApiKey = Annotated[str | None, _setting("api_key")]
ApiKeyFile = Annotated[Path | None, _setting("api_key_file")]
SharePrefixCache = Annotated[bool | None, _setting("share_prefix_cache", switch=True)]
ToolParser = Annotated[str | None, _setting("tool_parser")]
ReasoningParser = Annotated[str | None, _setting("reasoning_parser")]
Device = Annotated[str | None, _setting("device")]
Numerics = Annotated[str | None, _setting("numerics")]
MaxModelLen = Annotated[int | None, _setting("max_model_len")]
MaxNumSeqs = Annotated[int | None, _setting("max_num_seqs")]
TokenBudget = Annotated[int | None, _setting("token_budget")]
PageSize = Annotated[int | None, _setting("page_size")]
KVCacheBytes = Annotated[str | None, _setting("kv_cache_bytes")]
PrefixCache = Annotated[bool | None, _setting("prefix_cache", switch=True)]
StaticBatching = Annotated[bool | None, _setting("static_batching", switch=True)]
HostKernels = Annotated[bool | None, _setting("host_kernels", switch=True)]
NumThreads = Annotated[int | None, _setting("num_threads")]
ClusterName = Annotated[str | None, _setting("cluster_name")]
StoreUrl = Annotated[str | None, _setting("store")]
LogLevel = Annotated[str | None, _setting("log_level")]
LogFormat = Annotated[str | None, _setting("log_format")]
VLLMMetrics = Annotated[bool | None, _setting("vllm_metrics", switch=True)]
OTLPTracesEndpoint = Annotated[str | None, _setting("otlp_traces_endpoint")]
AsJson = Annotated[bool, typer.Option("--json", help="print one line of JSON on stdout")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"foretoken {installed_version()}")
        raise typer.Exit


@app.command()
def serve(
    context: typer.Context,
    model: Model = None,
    host: Host = None,
    port: Port = None,
    device: Device = None,
    numerics: Numerics = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    token_budget: TokenBudget = None,
    page_size: PageSize = None,
    kv_cache_bytes: KVCacheBytes = None,
    prefix_cache: PrefixCache = None,
    static_batching: StaticBatching = None,
    host_kernels: HostKernels = None,
    num_threads: NumThreads = None,
    served_model_name: ServedModelName = None,
    revision: Revision = None,
    home: Home = None,
    drain_timeout_s: DrainTimeout = None,
    start_timeout_s: StartTimeout = None,
    request_timeout_s: RequestTimeout = None,
    max_open_requests: MaxOpenRequests = None,
    max_open_requests_per_tenant: MaxOpenRequestsPerTenant = None,
    max_ttft_s: MaxTTFT = None,
    max_connections: MaxConnections = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    share_prefix_cache: SharePrefixCache = None,
    tool_parser: ToolParser = None,
    reasoning_parser: ReasoningParser = None,
    config: Config = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    vllm_metrics: VLLMMetrics = None,
    otlp_traces_endpoint: OTLPTracesEndpoint = None,
) -> None:
    """Serve a model over an OpenAI-compatible API."""
    settings = load({name: value for name, value in context.params.items() if name != "config"}, config)

    from cluster.serve import run

    raise typer.Exit(run(settings))


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="raw text; with --chat, what the user says")],
    model: Annotated[str | None, _setting("model")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="stop after this many; none: what the context has left")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy; none: the checkpoint's")] = None,
    seed: Annotated[int | None, typer.Option(help="of the draws; none: a new one")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    as_json: AsJson = False,
    device: Device = None,
    numerics: Numerics = None,
    max_model_len: MaxModelLen = None,
    revision: Revision = None,
    config: Config = None,
    log_level: LogLevel = None,
) -> None:
    """Complete one prompt, without a server."""
    settings = load(
        {
            "model": model,
            "device": device,
            "numerics": numerics,
            "max_model_len": max_model_len,
            "revision": revision,
            "log_level": log_level or "warning",
        },
        config,
    )

    from cluster.generate import Prompt, run

    run(settings, Prompt(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat), as_json=as_json)


@app.command()
def doctor(
    show_settings: Annotated[
        bool, typer.Option("--config", help="show each setting and where it came from; a file may follow")
    ] = False,
    file: Annotated[Path | None, typer.Argument(metavar="FILE", envvar=f"{ENV_PREFIX}CONFIG")] = None,
) -> None:
    """Tell what this machine has, what is missing, and what to do."""
    settings = load(config=file)

    from cluster.doctor import examine
    from cluster.tables import print_findings, print_settings

    if show_settings:
        print_settings(settings.describe())
    else:
        print_findings(examine(settings))


@bench.command(
    "serve", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench_serve(context: typer.Context) -> None:
    """Serve the same requests with Foretoken and with its baselines: one table, ratios first."""
    from loadtests.serve import main as bench_main

    raise typer.Exit(bench_main(context.args))


@bench.command(
    "api", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench_api(context: typer.Context) -> None:
    """Ask for all that users of the API expect, and measure what it costs beside the model's work."""
    from loadtests.api import main as bench_main

    raise typer.Exit(bench_main(context.args))


@kernels.command("build")
def kernels_build(home: Home = None, config: Config = None) -> None:
    """Compile the CPU kernels for this machine now, rather than at the first start; print where they are."""
    settings = load({"home": home}, config)

    from cluster.kernels import build

    print(build(settings))


@cluster.command("up")
def cluster_up(
    context: typer.Context,
    model: Model = None,
    local: Annotated[int | None, _setting("local")] = None,
    attention_workers: Annotated[int | None, _setting("attention_workers")] = None,
    expert_workers: Annotated[int | None, _setting("expert_workers")] = None,
    expert_copies: Annotated[int | None, _setting("expert_copies")] = None,
    cluster_name: ClusterName = None,
    store: StoreUrl = None,
    advertise: Annotated[str | None, _setting("advertise")] = None,
    lease_s: Annotated[float | None, _setting("lease_s")] = None,
    peer_timeout_s: Annotated[float | None, _setting("peer_timeout_s")] = None,
    reroute_timeout_s: Annotated[float | None, _setting("reroute_timeout_s")] = None,
    orphan_timeout_s: Annotated[float | None, _setting("orphan_timeout_s")] = None,
    host: Host = None,
    port: Port = None,
    device: Device = None,
    numerics: Numerics = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    token_budget: TokenBudget = None,
    page_size: PageSize = None,
    kv_cache_bytes: KVCacheBytes = None,
    prefix_cache: PrefixCache = None,
    static_batching: StaticBatching = None,
    host_kernels: HostKernels = None,
    num_threads: NumThreads = None,
    served_model_name: ServedModelName = None,
    revision: Revision = None,
    home: Home = None,
    drain_timeout_s: DrainTimeout = None,
    start_timeout_s: StartTimeout = None,
    request_timeout_s: RequestTimeout = None,
    max_open_requests: MaxOpenRequests = None,
    max_open_requests_per_tenant: MaxOpenRequestsPerTenant = None,
    max_ttft_s: MaxTTFT = None,
    max_connections: MaxConnections = None,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    share_prefix_cache: SharePrefixCache = None,
    tool_parser: ToolParser = None,
    reasoning_parser: ReasoningParser = None,
    config: Config = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
    vllm_metrics: VLLMMetrics = None,
    otlp_traces_endpoint: OTLPTracesEndpoint = None,
) -> None:
    """Start a cluster and keep it up until it is stopped: Ctrl-C, or `cluster down` from elsewhere."""
    settings = load({name: value for name, value in context.params.items() if name != "config"}, config)

    from cluster.operate.up import run

    raise typer.Exit(run(settings))


@cluster.command("status")
def cluster_status(
    cluster_name: ClusterName = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Show a cluster's nodes, workers and shards."""
    settings = load({"cluster_name": cluster_name, "store": store}, config)

    from cluster.operate.status import run

    raise typer.Exit(run(settings, as_json=as_json))


@cluster.command("down")
def cluster_down(cluster_name: ClusterName = None, config: Config = None) -> None:
    """Stop a cluster that `cluster up` started on this machine: what runs may finish first."""
    settings = load({"cluster_name": cluster_name}, config)

    from cluster.operate.down import run

    raise typer.Exit(run(settings))


@cluster.command("gateway")
def cluster_gateway(config: Config = None) -> None:
    """Run a gateway in front of a cluster's attention workers (one process of a cluster; settings from file or env)."""
    settings = load(config=config)

    from cluster.operate.gateway import run

    raise typer.Exit(run(settings))


@cluster.command("controller")
def cluster_controller(
    pods: Annotated[bool, typer.Option("--pods", help="workers are started by Kubernetes, not through Ray")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="where it leaves a pulse, and what the next controller there goes on with")
    ] = None,
    config: Config = None,
) -> None:
    """Run a cluster's controller (one process of a cluster; settings from file or environment)."""
    settings = load(config=config)

    from cluster.operate.controller import run

    raise typer.Exit(run(settings, pods=pods, folder=folder))


@cluster.command("worker")
def cluster_worker(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="attention or expert")],
    name: Annotated[str, typer.Option(help="its place in the cluster, such as expert-0; a pod's own name ends so")],
    node: Annotated[str, typer.Option(help="the node that it runs on")] = "",
    config: Config = None,
) -> None:
    """Run one worker that is not started by the controller, as a pod does (settings from file or environment)."""
    settings = load(config=config)

    from cluster.operate.worker import run

    raise typer.Exit(run(settings, role=role, name=name, node=node))


def main() -> None:
    """The entry point; a fault that the user can mend is one line on standard error and exit code 1."""
    # A worker is started again while gRPC's threads run: it is a new program at once, and needs none of their state.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines on standard error would stand among ours
    try:
        app()
    except ForetokenError as error:
        print(f"Error: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
