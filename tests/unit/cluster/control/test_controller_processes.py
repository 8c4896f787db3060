"""The controller with real worker processes and the demo model: killed, restarted, taken over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from cluster.config import Settings, load
from cluster.control import detached
from cluster.control.controller import Controller
from cluster.control.model import find_model
from cluster.control.process_launcher import ProcessLauncher
from cluster.control.shape import describe
from cluster.machine import this_machine
from cluster.store.memory import MemoryStore
from cluster.store.records import ClusterStatus, WorkerStatus

pytestmark = pytest.mark.needs("demo", "linux")

DEADLINE_S = 90.0
POLL_S = 0.02
SLACK = 0.1  # imbalance that is borne before experts move


def _settings(tmp_path: Path) -> Settings:
    return load(
        {
            "home": tmp_path,
            "device": "cpu",
            "attention_workers": 1,
            "expert_workers": 2,
            "max_num_seqs": 4,
            "max_model_len": 256,
            "host_kernels": False,
            "lease_s": 2.0,
            "orphan_timeout_s": 30.0,
            "drain_timeout_s": 2.0,
            "token": "not to be seen",
        }
    )


class _Cluster:
    """One store, and controllers of it one after the other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = MemoryStore()
        self.model = find_model(settings)
        self.shape = describe(self.model.path, "cpu")
        self.launcher = ProcessLauncher(settings, 3)
        self.stop = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def lead(self) -> None:
        controller = Controller(
            self.settings,
            store=self.store,
            launcher=self.launcher,
            model=self.model,
            shape=self.shape,
            machine=this_machine(),
        )
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(controller.run(self.stop))

    async def kill_controller(self) -> None:
        assert self.task is not None
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    async def end(self) -> None:
        self.stop.set()
        assert self.task is not None
        await self.task

    async def until(self, condition: Callable[[ClusterStatus], bool]) -> ClusterStatus:
        assert self.task is not None
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if self.task.done():
                    await self.task
                entry = await self.store.get("status/cluster")
                if entry is not None:
                    status = msgspec.json.decode(entry.value, type=ClusterStatus)
                    if condition(status):
                        return status
                await asyncio.sleep(POLL_S)

    def is_well(self, status: ClusterStatus) -> bool:
        """All serve, each expert is held once, and both expert workers have about half of them."""
        experts = [worker for worker in status.workers if worker.role == "expert"]
        num_experts = self.shape.num_experts * len(self.shape.moe_layers)
        return (
            status.problem is None
            and all(worker.condition == "serving" for worker in status.workers)
            and len(status.workers) == 3
            and sum(worker.num_experts for worker in experts) == num_experts
            and max(worker.num_experts for worker in experts) <= num_experts / 2 * (1 + SLACK)
        )


@contextlib.asynccontextmanager
async def _running(settings: Settings) -> AsyncIterator[_Cluster]:
    cluster = _Cluster(settings)
    cluster.lead()
    try:
        yield cluster
    finally:
        await cluster.kill_controller()
        for path in (settings.home / "clusters" / settings.cluster_name / "logs").glob("*.pid"):
            detached.end(int(path.read_text()), path.stem, kill=True)


def _worker(status: ClusterStatus, name: str) -> WorkerStatus:
    return next(worker for worker in status.workers if worker.name == name)


def test_real_workers_are_started_restarted_adopted_and_ended(tmp_path: Path) -> None:
    async def body() -> None:
        settings = _settings(tmp_path)
        async with _running(settings) as cluster:
            status = await cluster.until(cluster.is_well)
            assert {worker.node_id for worker in status.workers} == {node.node_id for node in status.nodes}

            killed = _worker(status, "expert-0")
            os.kill(killed.pid, signal.SIGKILL)
            num_experts = cluster.shape.num_experts * len(cluster.shape.moe_layers)
            await cluster.until(lambda status: _worker(status, "expert-1").num_experts == num_experts)
            status = await cluster.until(
                lambda status: cluster.is_well(status) and _worker(status, "expert-0").pid != killed.pid
            )
            assert _worker(status, "expert-0").node_id == killed.node_id

            await cluster.kill_controller()
            pids = {worker.name: worker.pid for worker in status.workers}
            first_epoch = status.epoch
            cluster.lead()
            status = await cluster.until(lambda status: status.epoch > first_epoch and cluster.is_well(status))
            assert {worker.name: worker.pid for worker in status.workers} == pids

            await cluster.end()
            assert not any(detached.is_running(pid) for pid in pids.values())
            assert await cluster.store.entries("workers/") == {}
            logs = (tmp_path / "clusters" / settings.cluster_name / "logs").glob("*")
            assert not any(b"not to be seen" in path.read_bytes() for path in logs)

    asyncio.run(body())
