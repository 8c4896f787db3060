"""A gateway over a scripted worker, in this process; on a real socket where a test needs one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from cluster.gateway.app import create_app
from cluster.gateway.connection import MAX_CONNECTIONS, server_config
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.status import StatusSource
from cluster.gateway.tracing import NO_TRACING, Tracing
from tests.support.grpc_loop import other_loops_ignored
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, byte_tokenizer
from tests.support.worker_team import Team

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for key in ['name', 'tool_call_id', 'reasoning_content'] if key in message %} {{ message[key] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
)
MODEL = "org/scripted"  # an id with a slash, as the hub's are


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def on_one_loop(request: pytest.FixtureRequest) -> None:
    """Only where a test is on a loop at all: a plain one may be the first to run."""
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("one_loop")


@pytest.fixture(scope="session")
async def one_loop() -> AsyncIterator[None]:
    """All tests here that need one run on one event loop: grpc has one completion queue for all loops of a process."""
    with other_loops_ignored():
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer's files of a model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker(f"unix:{tmp_path}/worker.sock")
    await worker.start()
    yield worker
    await worker.kill()


@dataclass
class Served:
    """A gateway that answers at `base_url`."""

    app: FastAPI
    http: httpx.AsyncClient
    base_url: str
    port: int

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi"} | body)

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "Hi"}]
        return await self.http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages} | body)

    async def ready(self) -> None:
        await self.app.state.gateway.pool.ready(DEADLINE_S)

    async def metric(self, sample: str, default: float | None = None) -> float:
        """The value of the line of /metrics that begins so. Raises where there is none, unless a default is given."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        found = next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(sample)), default)
        assert found is not None, f"/metrics has no {sample}"
        return found


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(checkpoint: Path, worker: ScriptedWorker) -> AsyncIterator[Serve]:
    """Start a gateway on a free port; keywords change its settings, `pool` its pool, `endpoints` who is in it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            *,
            model_path: Path | None = None,
            pool: dict[str, Any] | None = None,
            endpoints: Sequence[Endpoint] | None = None,
            status: StatusSource | None = None,
            tracing: Tracing = NO_TRACING,
            max_connections: int = MAX_CONNECTIONS,
            **changes: Any,
        ) -> Served:
            settings = GatewaySettings(served_name=MODEL, model_path=model_path or checkpoint, **changes)
            workers = [Endpoint("worker", worker.address)] if endpoints is None else endpoints
            workers_pool = WorkerPool(workers, **({"reconnect_delay_s": 0.01} | (pool or {})))
            app = create_app(settings, workers_pool, status, tracing)
            # with its protocol named, or asyncio leaves out TCP_NODELAY and every answer waits for a delayed ACK
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            server = _Server(server_config(app, stop_timeout_s=5, max_connections=max_connections))
            task = asyncio.create_task(server.serve(sockets=[listener]))

            async def stop() -> None:
                server.should_exit = True
                async with asyncio.timeout(DEADLINE_S):
                    await task

            stack.push_async_callback(stop)
            base_url = f"http://127.0.0.1:{port}"
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=base_url, timeout=DEADLINE_S))
            async with asyncio.timeout(DEADLINE_S):
                while not server.started:
                    await asyncio.sleep(0)
            return Served(app, http, base_url, port)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """A gateway with its worker there."""
    served = await serve()
    await served.ready()
    return served


@pytest.fixture
async def team(tmp_path: Path) -> AsyncIterator[Team]:
    team = Team(tmp_path, 2)
    for worker in team.workers.values():
        await worker.start()
    yield team
    for worker in team.workers.values():
        await worker.kill()


async def all_ready(served: Served, num_workers: int = 2) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while served.app.state.gateway.pool.num_alive != num_workers:
            await asyncio.sleep(0.001)


@pytest.fixture
async def crowd(serve: Serve, team: Team) -> Served:
    """A gateway over the team."""
    served = await serve(endpoints=team.endpoints)
    await all_ready(served)
    return served
