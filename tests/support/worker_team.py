"""Several scripted workers, one of which can be lost in the middle of its work."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.gateway.pool import Endpoint
from cluster.protocol import Submit
from tests.support.scripted_worker import DEADLINE_S, ScriptedWorker, hello


class Team:
    """Workers a, b, …, each alive with its gate open."""

    def __init__(self, folder: Path, num_workers: int) -> None:
        self.workers = {name: ScriptedWorker(f"unix:{folder}/{name}.sock") for name in "abcd"[:num_workers]}
        for name, worker in self.workers.items():
            worker.hello = hello(worker_id=f"worker-{name}")

    @property
    def endpoints(self) -> list[Endpoint]:
        return [Endpoint(name, worker.address) for name, worker in self.workers.items()]

    def pause_after(self, num_steps: int | None) -> None:
        for worker in self.workers.values():
            worker.steps_left = num_steps

    async def busy(self) -> ScriptedWorker:
        """The worker that has requests, or the first such, once it pauses."""
        async with asyncio.timeout(DEADLINE_S):
            while not (found := [w for w in self.workers.values() if w.num_running and not w.gate.is_set()]):
                await asyncio.sleep(0.001)
        return found[0]

    async def lose(self, worker: ScriptedWorker) -> None:
        """Kill a worker; the others make steps without end."""
        self.go_on(worker)
        await worker.kill()

    def go_on(self, besides: ScriptedWorker) -> None:
        for other in self.workers.values():
            if other is not besides:
                other.steps_left = None
                other.gate.set()

    def others(self, worker: ScriptedWorker) -> list[ScriptedWorker]:
        return [other for other in self.workers.values() if other is not worker]

    @property
    def aborts(self) -> list[str]:
        return [request_id for worker in self.workers.values() for request_id in worker.aborts]

    @property
    def submits(self) -> list[Submit]:
        return [submit for worker in self.workers.values() for submit in worker.submits]
