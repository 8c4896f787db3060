"""A browser with one page for a file of tests, and gateways for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn

from cluster.gateway.app import create_app
from cluster.gateway.auth import NO_KEYS, Keys
from cluster.gateway.connection import server_config
from cluster.gateway.pool import Endpoint, WorkerPool
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.status import StatusSource
from cluster.serve import base_url, listen
from tests.browser.playground import Playground
from tests.support.browser import DEADLINE_S, Page, open_page
from tests.support.chat_templates import QWEN_LIKE, write_tokenizer
from tests.support.grpc_loop import other_loops_ignored
from tests.support.scripted_worker import DEADLINE_S as WORKER_DEADLINE_S
from tests.support.scripted_worker import ScriptedWorker, byte_tokenizer, hello

MODEL = "org/scripted"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def page() -> AsyncIterator[Page]:
    async with open_page() as page:
        yield page


class OpenGateway:
    """A gateway over the workers of `pool`, if any, which tells what `status` says; its address in the context."""

    def __init__(self, model_path: Path) -> None:
        self._model_path = model_path

    @contextlib.asynccontextmanager
    async def __call__(
        self, status: StatusSource | None = None, keys: Keys = NO_KEYS, pool: WorkerPool | None = None
    ) -> AsyncIterator[str]:
        settings = GatewaySettings(served_name=MODEL, model_path=self._model_path, keys=keys)
        app = create_app(settings, pool or WorkerPool(()), status)
        with listen("127.0.0.1", 0) as listener:
            server = _Server(server_config(app, stop_timeout_s=1))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield f"{base_url(listener)}/"
            finally:
                server.should_exit = True
                await asyncio.wait_for(task, DEADLINE_S)


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> OpenGateway:
    """Of a model whose template knows tools and thoughts."""
    return OpenGateway(write_tokenizer(tmp_path_factory.mktemp("model"), byte_tokenizer(), QWEN_LIKE))


@pytest.fixture(scope="module")
async def playground(
    page: Page, open_gateway: OpenGateway, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Playground]:
    with other_loops_ignored():
        worker = ScriptedWorker(f"unix:{tmp_path_factory.mktemp('worker')}/worker.sock")
        worker.hello = hello(max_model_len=4096)
        await worker.start()
        pool = WorkerPool([Endpoint("worker", worker.address)], reconnect_delay_s=0.01)
        async with open_gateway(pool=pool) as address:
            await pool.ready(WORKER_DEADLINE_S)
            await page.emulate(1600, 1000)
            yield Playground(page, worker, pool, address)
        await worker.kill()
