"""A browser with one page for a file of tests, and gateways whose status a test scripts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import uvicorn

from cluster.gateway.app import create_app
from cluster.gateway.auth import NO_KEYS, Keys
from cluster.gateway.connection import server_config
from cluster.gateway.pool import WorkerPool
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.status import StatusSource
from cluster.serve import base_url, listen
from tests.support.browser import DEADLINE_S, Page, open_page
from tests.support.scripted_worker import byte_tokenizer

MODEL = "org/scripted"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


OpenGateway = Callable[..., contextlib.AbstractAsyncContextManager[str]]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def page() -> AsyncIterator[Page]:
    async with open_page() as page:
        yield page


@pytest.fixture
def open_gateway(tmp_path: Path) -> OpenGateway:
    """A gateway without workers, which tells what the source says; its address while the context lasts."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))

    @contextlib.asynccontextmanager
    async def opened(status: StatusSource, keys: Keys = NO_KEYS) -> AsyncIterator[str]:
        app = create_app(GatewaySettings(served_name=MODEL, model_path=tmp_path, keys=keys), WorkerPool(()), status)
        with listen("127.0.0.1", 0) as listener:
            server = _Server(server_config(app, stop_timeout_s=1))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield f"{base_url(listener)}/"
            finally:
                server.should_exit = True
                await asyncio.wait_for(task, DEADLINE_S)

    return opened
