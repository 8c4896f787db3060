"""A machine that vanishes without a word: its connections stay open, and each end learns of it by pings alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc.aio
import msgspec
import pytest

from cluster.gateway.client import CHANNEL_OPTIONS, WorkerClient
from cluster.protocol import KEEPALIVE, STATE_METHOD, Announcement, EngineState, Launch, RequestOutput
from tests.support.silent_proxy import silent_proxy
from tests.support.worker_process import DEADLINE_S, Stream, submit, tiny_checkpoint
from workers.server import Worker, build

POLL_S = 0.01
MAX_TOKENS = 2000
OFTEN = (  # as `KEEPALIVE`, and as much faster
    ("grpc.keepalive_time_ms", 200),
    ("grpc.keepalive_timeout_ms", 200),
    ("grpc.http2.ping_timeout_ms", 200),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def _pings_are_sent_often(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, _ in OFTEN] == [name for name, _ in KEEPALIVE]
    monkeypatch.setattr("workers.server.KEEPALIVE", OFTEN)
    options = tuple(option for option in CHANNEL_OPTIONS if option not in KEEPALIVE)
    monkeypatch.setattr("cluster.gateway.client.CHANNEL_OPTIONS", options + OFTEN)


@contextlib.asynccontextmanager
async def serving(checkpoint: Path, folder: Path) -> AsyncIterator[str]:
    """A worker in this process; its address."""
    path = folder / "worker.json"
    launch = Launch(
        address="127.0.0.1:0", model_path=str(checkpoint), served_name="tiny", num_threads=1, announce_path=str(path)
    )
    worker = Worker(launch, build(launch))
    running = asyncio.create_task(worker.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not path.exists():
                await asyncio.sleep(POLL_S)
        yield msgspec.json.decode(path.read_bytes(), type=Announcement).address
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(is_met: Callable[[EngineState], bool], state: Callable[[], Awaitable[EngineState]]) -> EngineState:
    async with asyncio.timeout(DEADLINE_S):
        while not is_met(found := await state()):
            await asyncio.sleep(POLL_S)
    return found


def test_a_worker_frees_what_a_gateway_that_vanished_had_running(checkpoint: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            serving(checkpoint, tmp_path) as address,
            silent_proxy(address) as proxy,
            grpc.aio.insecure_channel(address) as ours,
            grpc.aio.insecure_channel(proxy.address) as theirs,
        ):
            state_call = ours.unary_unary(STATE_METHOD)

            async def state() -> EngineState:
                return msgspec.msgpack.decode(await state_call(b"", timeout=DEADLINE_S), type=EngineState)

            gateway = Stream(theirs)
            await gateway.read()
            for name in ("a", "b"):
                await gateway.send(submit(name, MAX_TOKENS))
            await until(lambda now: now.num_running == 2, state)
            proxy.is_silent = True
            after = await until(lambda now: now.num_running == 0, state)
            assert after.pages_free == after.pages_total
            assert after.generated_tokens < 2 * MAX_TOKENS, "they ran to their end"

    asyncio.run(run())


class _Owner:
    def __init__(self) -> None:
        self.was_connected, self.was_lost = asyncio.Event(), asyncio.Event()

    def connected(self) -> None:
        self.was_connected.set()

    def received(self, output: RequestOutput) -> None: ...

    def told(self, state: EngineState) -> None: ...

    def lost(self) -> None:
        self.was_lost.set()


def test_a_gateway_without_a_lease_loses_a_worker_that_vanished_and_keeps_a_quiet_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        async with serving(checkpoint, tmp_path) as address, silent_proxy(address) as proxy:
            owner = _Owner()
            client = WorkerClient(proxy.address, owner)
            client.start()
            try:
                async with asyncio.timeout(DEADLINE_S):
                    await owner.was_connected.wait()
                    with pytest.raises(TimeoutError):  # a server that does not permit its pings would hang up
                        await asyncio.wait_for(owner.was_lost.wait(), 1.5)
                    proxy.is_silent = True
                    await owner.was_lost.wait()
            finally:
                await client.close()

    asyncio.run(run())
