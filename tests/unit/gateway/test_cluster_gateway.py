"""`foretoken cluster gateway` as a process: a real store, scripted workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cluster.environment import PACKAGES
from cluster.store.records import ClusterStatus, WorkerRecord
from cluster.store.redis import RedisStore
from tests.support.redis_server import RedisServer
from tests.support.scripted_process import save_tokenizer
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, hello

pytestmark = [pytest.mark.anyio, pytest.mark.needs("redis")]

TOKEN = "sesame"
KEY = "a-key-for-clients"
ANSWER = "Hello, wörld! 🦀"
CHAT = {"model": "foretoken-demo", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.close()


def command(folder: Path, **settings: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FORETOKEN_")}
    ours = {f"FORETOKEN_{name.upper()}": value for name, value in settings.items()}
    return {
        "args": [sys.executable, "-m", "tests.support.scripted_process", "cluster", "gateway"],
        "cwd": PACKAGES,
        "env": clean | {"SCRIPTED_MODEL": str(folder)} | ours,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        "text": True,
    }


class Running:
    """A gateway's process; what it says is in `lines`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    async def url(self) -> str:
        assert self.process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            while not self.lines or "listening on" not in self.lines[-1]:
                self.lines.append(await asyncio.to_thread(self.process.stderr.readline))
                assert self.lines[-1], self.lines
        return self.lines[-1].split("listening on ")[1].split()[0]

    async def end(self) -> int:
        """Its exit code."""
        _, rest = await asyncio.to_thread(self.process.communicate, timeout=DEADLINE_S)
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode


@contextlib.contextmanager
def started(folder: Path, *, stdin: int = subprocess.DEVNULL, **settings: str) -> Iterator[Running]:
    save_tokenizer(folder)
    process = subprocess.Popen(**command(folder, **settings), stdin=stdin)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker(f"unix:{tmp_path}/w.sock")
    worker.hello = hello(worker_id="one")
    worker.token = TOKEN
    worker.beat_s = 0.05
    await worker.start()
    yield worker
    await worker.kill()


def record(worker: ScriptedWorker) -> WorkerRecord:
    return WorkerRecord(
        name="attention-0", role="attention", node_id="n", device_id="cpu", address=worker.address, worker_id="one",
        pid=1, memory_bytes=1,
    )  # fmt: skip


async def until_ready(client: httpx.AsyncClient, status: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await client.get("/health/ready")).status_code != status:
            await asyncio.sleep(0.01)


async def test_a_cluster_without_a_store_is_one_line(tmp_path: Path) -> None:
    with started(tmp_path, port="0") as gateway:
        assert await gateway.end() == 1
    assert len(gateway.lines) == 1
    assert gateway.lines[0].startswith("Error: a cluster's gateway finds its workers in the store: set FORETOKEN_STORE")


async def test_it_serves_who_is_registered_until_sigterm(
    tmp_path: Path, redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    settings = {"port": "0", "store": redis_server.url, "cluster_name": "one", "token": TOKEN, "lease_s": "4"}
    with started(tmp_path, **settings, api_key=KEY) as gateway:
        header = {"authorization": f"Bearer {KEY}"}
        async with (
            httpx.AsyncClient(base_url=await gateway.url(), timeout=DEADLINE_S, headers=header) as client,
            RedisStore(redis_server.url, namespace="one") as store,
        ):
            await until_ready(client, 503)
            assert (await client.get("/health/live", headers={"authorization": ""})).status_code == 200
            assert (await client.get("/cluster", headers={"authorization": ""})).status_code == 401
            shown = (await client.get("/cluster")).json()
            assert (shown["workers"], shown["problem"]) == ([], "the controller has written no status yet")
            assert (await client.get("/")).headers["content-type"].startswith("text/html")

            version = await store.compare_and_set(
                "workers/attention-0", msgspec.json.encode(record(worker)), expected=0
            )
            assert version is not None
            await until_ready(client, 200)
            reply = (await client.post("/v1/chat/completions", json=CHAT)).json()
            assert reply["choices"][0]["message"]["content"] == ANSWER
            status = ClusterStatus(
                cluster="one", model="m", epoch=3, controller_id="c", at_s=time.time(), num_layers=0, num_experts=0
            )
            await store.compare_and_set("status/cluster", msgspec.json.encode(status), expected=0)
            async with asyncio.timeout(DEADLINE_S):
                while (shown := (await client.get("/cluster")).json())["epoch"] != 3:
                    await asyncio.sleep(0.05)
            assert shown["cluster"] == "one"

            redis_server.kill()  # what is known goes on
            try:
                assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
                worker.gate.clear()
                num_submits = len(worker.submits)
                running = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
                await worker.wait_for_submits(num_submits + 1)
                gateway.process.send_signal(signal.SIGTERM)
                await until_ready(client, 503)
                refused = await client.post("/v1/chat/completions", json=CHAT)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                worker.gate.set()
                assert (await running).json()["choices"][0]["message"]["content"] == ANSWER
            finally:
                redis_server.start()
        assert await gateway.end() == 0
    said = "".join(gateway.lines)
    assert "Traceback" not in said
    assert TOKEN not in said


async def test_it_ends_with_the_pipe_on_its_standard_input(tmp_path: Path, redis_server: RedisServer) -> None:
    with started(tmp_path, stdin=subprocess.PIPE, port="0", store=redis_server.url, cluster_name="two") as gateway:
        async with httpx.AsyncClient(base_url=await gateway.url(), timeout=DEADLINE_S) as client:
            await until_ready(client, 503)
        assert gateway.process.stdin is not None
        gateway.process.stdin.close()
        gateway.process.stdin = None
        assert await gateway.end() == 0
