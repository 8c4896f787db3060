from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cluster.config import load
from cluster.control.placement import PlacedWorker
from cluster.control.process_launcher import ProcessLauncher
from cluster.control.worker_folders import logs_folder
from cluster.errors import WorkerLostError
from cluster.protocol import Launch
from tests.support.processes import wait_for_end

DEADLINE_S = 20.0
WORKER = PlacedWorker("expert", 0, "n0", "cpu", 1000)
PROGRAM = """
import json, os, signal, sys
launch = json.loads(sys.stdin.readline())
print(json.dumps(sorted(name for name in os.environ if "TOKEN" in name)), flush=True)
if launch["model_path"] == "refuses":
    print("error: no such model", file=sys.stderr, flush=True)
    raise SystemExit(2)
if launch["model_path"] != "hangs":
    with open(launch["announce_path"] + "~", "w") as file:
        json.dump({"pid": os.getpid(), "address": launch["address"], "worker_id": launch["tensor_host"]}, file)
    os.replace(launch["announce_path"] + "~", launch["announce_path"])
signal.pause()
"""


def _launcher(home: Path) -> ProcessLauncher:
    command = (sys.executable, "-c", PROGRAM, "workers.server")
    environment = {"FORETOKEN_TOKEN": "secret", "PATH": "/usr/bin:/bin"}
    return ProcessLauncher(load({"home": home}), 2, command=command, environment=environment)


def _launch(how: str) -> Launch:
    return Launch(address="", model_path=how, served_name="m", name="expert-0", token="secret")


def _run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 2 * DEADLINE_S))


def test_a_worker_is_started_adopted_by_another_launcher_and_stopped(tmp_path: Path) -> None:
    async def body() -> None:
        record = await _launcher(tmp_path).start(WORKER, _launch("serves"))
        assert (record.name, record.role, record.node_id, record.memory_bytes) == ("expert-0", "expert", "n0", 1000)
        assert (record.address, record.worker_id) == ("127.0.0.1:0", "127.0.0.1")
        another = _launcher(tmp_path)
        assert await another.adopt(record)
        await another.stop(record, kill=False)
        await asyncio.to_thread(wait_for_end, record.pid, DEADLINE_S)
        assert not await another.is_running(record)
        assert not await another.adopt(record)
        await another.stop(record, kill=True)
        assert (logs_folder(load({"home": tmp_path})) / "expert-0.log").read_text() == "[]\n"

    _run(body)


def test_why_a_worker_does_not_start_is_told(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(WorkerLostError, match="no such model"):
            await _launcher(tmp_path).start(WORKER, _launch("refuses"))

    _run(body)


def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    async def body() -> None:
        pid_path = logs_folder(load({"home": tmp_path})) / "expert-0.pid"
        start = asyncio.create_task(_launcher(tmp_path).start(WORKER, _launch("hangs")))
        while not pid_path.exists() or not pid_path.read_text():
            await asyncio.sleep(0.01)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        await asyncio.to_thread(wait_for_end, int(pid_path.read_text()), DEADLINE_S)

    _run(body)


def test_this_machine_counts_as_so_many_nodes_with_the_same_memory_all_the_time(tmp_path: Path) -> None:
    async def body() -> None:
        launcher = _launcher(tmp_path)
        first = await launcher.topology()
        assert len(first.nodes) == 2
        assert first.nodes[0].machine == first.nodes[1].machine != ""
        assert await launcher.topology() == first
        assert launcher.starts_workers

    _run(body)
