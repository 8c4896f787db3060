"""`foretoken serve`: a worker process, the gateway in front of it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from pydantic import SecretStr
from rich.console import Console

from cluster import logs
from cluster.config import Settings
from cluster.control.model import Model, find_model
from cluster.control.worker_folders import socket_folder
from cluster.control.worker_process import WorkerProcess, local_worker
from cluster.errors import ConfigError
from cluster.event_loop import loop_factory
from cluster.gateway.auth import Key, Keys, new_key, parse_admin_key, parse_keys, read_key_file
from cluster.gateway.limits import FLUSH_S
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.gateway.settings import GatewaySettings, SamplingDefaults
from cluster.gateway.status import PoolStatus, StatusSource
from cluster.machine import this_machine
from cluster.protocol import Hello

if TYPE_CHECKING:
    from cluster.gateway.tracing import Tracing

logger = logging.getLogger(__name__)

BACKLOG = 2048
SPARE_FILES = 256  # of what a process may open, beside its clients' connections
HTTP_STOP_TIMEOUT_S = 3  # a connection that is still open then is cut
WORKER_STOP_TIMEOUT_S = 5.0  # it has nothing left to run by then
EXIT_AT_ONCE = 130  # as a shell shows an interrupt
OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(settings: Settings) -> int:
    """Serve until a signal; returns the exit code. Raises `ForetokenError` for what stands in the way."""
    logs.configure(settings.log_level, settings.log_format)
    started = time.monotonic()
    with listen(settings.host, settings.port) as listener:
        settings = with_keys(settings, listener)
        model = find_model(settings)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(serve(settings, model, listener, started))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises `ConfigError` naming the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} is no address of this machine: {error.strerror}", param="host") from None
    listener = socket.socket(family, kind, protocol)  # without the protocol asyncio leaves TCP_NODELAY out
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} on {host} is in use: end what uses it, or choose another with --port"
            raise ConfigError(message, param="port") from None
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}", param="host") from None
    return listener


def base_url(listener: socket.socket) -> str:
    """Where a client on this machine reaches the listener: a wildcard address is shown as the loopback one."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only programs on this machine reach the listener."""
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool(address.is_loopback if mapped is None else mapped.is_loopback)


def with_keys(settings: Settings, listener: socket.socket) -> Settings:
    """Settings with a new key, which is printed once, where one is needed and none is there.

    Raises `ConfigError` for keys that cannot be used.
    """
    if not (is_loopback(listener) or settings.api_key or settings.api_key_file):
        key = new_key()
        _print_key(key, settings)
        settings = settings.model_copy(update={"api_key": SecretStr(key)})
    keys_of(settings)
    return settings


def keys_of(settings: Settings) -> Keys:
    """Raises `ConfigError` for keys that cannot be used."""
    users: list[Key] = []
    if settings.api_key:
        users += parse_keys(settings.api_key.get_secret_value(), "api_key")
    if settings.api_key_file is not None:
        users += parse_keys(read_key_file(settings.api_key_file), str(settings.api_key_file))
    admin = settings.admin_api_key
    return Keys.of(users, parse_admin_key(admin.get_secret_value(), "admin_api_key") if admin else None)


def _print_key(key: str, settings: Settings) -> None:
    """To whoever starts us, and not through the log: its lines may go further."""
    text = (
        f"{settings.host} is no loopback address, so clients need an API key. This one is for this start alone; set "
        "FORETOKEN_API_KEY or --api-key-file for one that stays"
    )
    if settings.log_format == "json":
        print(json.dumps({"level": "warning", "logger": __name__, "message": text, "api_key": key}), file=sys.stderr)
    else:
        print(f"{text}:\n\n  export FORETOKEN_API_KEY={key}\n", file=sys.stderr, flush=True)


def connection_bound(wanted: int) -> int:
    """How many connections this process can have, up to `wanted`: each is an open file, of which there are bounds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower bound than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    bound = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES)
    if bound < wanted:
        logger.warning("at most %d connections at once, not %d: this process may open few files", bound, wanted)
    return min(bound, wanted)


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: an end is ours to order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: Settings, model: Model, listener: socket.socket, started: float) -> None:
    """Run worker and gateway until the first signal, then let what runs finish and end both.

    Raises `WorkerLostError` or `DeadlineError` when no worker can be had.
    """
    with socket_folder() as folder:
        worker = local_worker(settings, model.path, model.name, folder)
        stop = asyncio.Event()
        on_signals(stop, lambda: _end_at_once(worker, folder))
        pool = WorkerPool([Endpoint("worker", worker.launch.address)])
        status = PoolStatus(pool, model.name, this_machine().memory_bytes)
        supervise = asyncio.create_task(_supervise(worker, pool, settings, listener, started))

        def on_drain() -> None:
            supervise.cancel()  # a worker that ends from here on is not started again, so nothing waits for it
            pool.stop_resuming()

        try:
            await asyncio.sleep(0)  # the worker begins to load while we import and make the gateway
            await serve_http(settings, model, pool, status, listener, stop, supervise, on_drain)
        finally:
            await worker.stop(WORKER_STOP_TIMEOUT_S)
            await asyncio.gather(supervise, return_exceptions=True)


async def serve_http(
    settings: Settings,
    model: Model,
    pool: WorkerPool,
    status: StatusSource,
    listener: socket.socket,
    stop: asyncio.Event,
    background: asyncio.Task[None],
    on_drain: Callable[[], None] = lambda: None,
) -> None:
    """The gateway, until `stop`, which drains it, or until `background` ends, which raises why there is no worker."""
    from cluster.gateway.app import create_app
    from cluster.gateway.connection import server_config

    app = create_app(gateway_settings(settings, model), pool, status, tracing(settings, os.environ))
    gateway = app.state.gateway
    max_connections = connection_bound(settings.max_connections)
    server = _Server(
        server_config(app, stop_timeout_s=HTTP_STOP_TIMEOUT_S, backlog=BACKLOG, max_connections=max_connections)
    )
    http = asyncio.create_task(server.serve(sockets=[listener]))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({background, http, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if background.done():
            pool.stop_resuming()
            await background
        if stop.is_set():
            on_drain()
            logger.info(
                "stopping: what runs may take %g s more; a second signal ends at once", settings.drain_timeout_s
            )
            gateway.begin_drain()
            await gateway.admission.wait_idle(settings.drain_timeout_s + FLUSH_S)
    finally:
        stopped.cancel()
        server.should_exit = True
        await http


def gateway_settings(settings: Settings, model: Model) -> GatewaySettings:
    """What the gateway is told of the settings, with the checkpoint's sampling defaults."""
    return GatewaySettings(
        served_name=model.name,
        model_path=model.path,
        sampling_defaults=SamplingDefaults.from_checkpoint(model.path),
        request_timeout_s=settings.request_timeout_s,
        drain_timeout_s=settings.drain_timeout_s,
        max_open_requests=settings.max_open_requests,
        max_open_requests_per_tenant=settings.max_open_requests_per_tenant,
        max_ttft_s=settings.max_ttft_s,
        vllm_metrics=settings.vllm_metrics,
        keys=keys_of(settings),
        share_prefix_cache=settings.share_prefix_cache,
        tool_parser=settings.tool_parser,
        reasoning_parser=settings.reasoning_parser,
    )


def tracing(settings: Settings, environment: Mapping[str, str]) -> Tracing:
    """Where traces go, by our setting or OpenTelemetry's own variables. Raises `ConfigError` where they cannot."""
    from cluster.gateway.tracing import NO_TRACING, open_tracing

    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    is_off = is_off or environment.get("OTEL_TRACES_EXPORTER") == "none"
    if settings.otlp_traces_endpoint is None and (is_off or not any(environment.get(name) for name in OTLP_ENDPOINTS)):
        return NO_TRACING
    return open_tracing(settings.otlp_traces_endpoint)


def on_signals(stop: asyncio.Event, at_once: Callable[[], None]) -> None:
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, lambda: at_once() if stop.is_set() else stop.set())


def _end_at_once(worker: WorkerProcess, folder: Path) -> None:
    worker.kill()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(EXIT_AT_ONCE)


async def _supervise(
    worker: WorkerProcess, pool: WorkerPool, settings: Settings, listener: socket.socket, started: float
) -> None:
    """Start the worker, say so when it serves, and keep it alive."""
    await worker.start()
    hello = await pool.ready(settings.start_timeout_s)
    announce(hello, base_url(listener), settings, time.monotonic() - started)
    await worker.watch()


def announce(hello: Hello, url: str, settings: Settings, start_s: float) -> None:
    """The start-up summary: a few lines on a terminal, log lines otherwise."""
    experts = f", {hello.num_experts} experts a layer" if hello.num_experts else ""
    facts = {
        "model": f"{hello.served_name}: {hello.model_type}, {_count(hello.num_parameters)} parameters, "
        f"{hello.num_layers} layers{experts}",
        "context": f"{hello.max_model_len} tokens",
        "engine": f"numerics {hello.numerics}, at most {settings.max_num_seqs} sequences at once",
        "KV cache": f"{hello.num_pages} pages of {hello.page_size} positions",
        "page": f"{url}/ shows what runs where, live",
    }
    curl = curl_line(url, hello.served_name, needs_key(settings))
    if settings.log_format == "json" or not sys.stdout.isatty():
        for name, value in facts.items():
            logger.info("%s: %s", name, value)
        logger.info("ready on %s after %.1f s; try: %s", url, start_s, curl)
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"\n[bold green]Ready[/] on [bold]{url}/v1[/] after {start_s:.1f} s\n")
    for name, value in facts.items():
        console.print(f"  [dim]{name:<9}[/]{value}")
    console.print("\nTry:", curl, sep="\n", markup=False)
    console.print("\n[dim]Ctrl-C ends it; running requests may finish.[/]\n")


def _count(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return str(number)


def needs_key(settings: Settings) -> bool:
    return bool(settings.api_key or settings.api_key_file)


def curl_line(url: str, served_name: str, has_key: bool = False) -> str:
    """A request that anyone can paste into a shell, where a needed key is a variable of the environment."""
    body = json.dumps(
        {"model": served_name, "stream": True, "messages": [{"role": "user", "content": "What is a walnut?"}]}
    ).replace("'", "'\\''")
    key = ' -H "Authorization: Bearer $FORETOKEN_API_KEY"' if has_key else ""
    return f"curl -sN {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
