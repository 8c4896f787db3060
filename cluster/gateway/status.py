"""What `GET /cluster` tells: nodes, workers, shards and how much they do. For people, and without addresses or secrets.

In a cluster it is what its controller wrote to the store; with a worker of our own it is what that worker says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.errors import StoreUnavailableError, UnreadableValueError
from cluster.gateway.pool import WorkerPool
from cluster.protocol import EngineState
from cluster.store.base import Store
from cluster.store.records import STALE_S, ClusterStatus, NodeStatus, WorkerStatus, read_status

FRESH_S = 0.5  # the store is asked at most so often, however many pages are open
STATE_TIMEOUT_S = 1.0
NODE = "this machine"


@dataclass(frozen=True)
class LastStatus:
    """The last status that is known, and why a newer one is not."""

    status: ClusterStatus | None
    problem: str | None = None


class StatusSource(Protocol):
    async def look(self) -> LastStatus: ...


class PoolStatus:
    """The status of workers that no controller looks after."""

    def __init__(self, pool: WorkerPool, model: str, memory_bytes: int = 0) -> None:
        self._pool = pool
        self._model = model
        self._memory_bytes = memory_bytes

    async def look(self) -> LastStatus:
        pool = self._pool
        states = await pool.states(STATE_TIMEOUT_S)
        hellos = pool.hellos()
        workers = []
        for endpoint in pool.endpoints:
            hello = hellos.get(endpoint.name)
            workers.append(
                WorkerStatus(
                    name=endpoint.name,
                    role="all",
                    node_id=NODE,
                    address=endpoint.address,
                    pid=0,
                    condition="serving" if hello else "lost" if pool.num_connections else "starting",
                    state=states.get(endpoint.name, EngineState()),
                )
            )
        first = pool.hello
        status = ClusterStatus(
            cluster="",
            model=self._model,
            epoch=0,
            controller_id="",
            at_s=time.time(),
            num_layers=0 if first is None else first.num_layers,
            num_experts=0 if first is None else first.num_experts,
            nodes=(NodeStatus(node_id=NODE, memory_bytes=self._memory_bytes),),
            workers=tuple(workers),
            problem=None if hellos else f"no worker: {pool.last_failure}",
        )
        return LastStatus(status)


class StoreStatus:
    """What a cluster's controller wrote last; while the store is out of reach, what was known before."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last = LastStatus(None, "the cluster's status was not read yet")
        self._looked = float("-inf")  # when, on the monotonic clock
        self._lock = asyncio.Lock()

    async def look(self) -> LastStatus:
        async with self._lock:
            if time.monotonic() - self._looked >= FRESH_S:
                self._last = await self._read()
                self._looked = time.monotonic()
            return self._last

    async def _read(self) -> LastStatus:
        try:
            found = await read_status(self._store)
        except StoreUnavailableError:  # its text may name the store's address
            return LastStatus(self._last.status, "the store does not answer")
        except UnreadableValueError:  # its text may have a piece of the value
            return LastStatus(self._last.status, "the cluster's status is of another version: run all from one release")
        if found is None:
            return LastStatus(self._last.status, "the controller has written no status yet")
        return LastStatus(found)


def cluster_body(
    last: LastStatus,
    pool: WorkerPool,
    *,
    model: str,
    num_open: int,
    is_draining: bool,
    latency: dict[str, Any],
    needs_key: bool,
) -> dict[str, Any]:
    """The JSON object of `GET /cluster`; times in seconds, sizes in bytes. `latency`: `RecentLatencies.body()`."""
    status = last.status
    age_s = None if status is None else max(0.0, time.time() - status.at_s)
    is_stale = age_s is not None and age_s > STALE_S
    told = None if status is None else status.problem
    if is_stale and told is None:
        told = "the controller has written no status lately: it, or the store, is away"
    problems = (last.problem or told, pool.problem)
    return {
        "model": model,
        "cluster": (status.cluster or None) if status is not None else None,
        "at_s": None if status is None else status.at_s,
        "age_s": age_s,
        "is_stale": is_stale,
        "epoch": (status.epoch or None) if status is not None else None,
        "problem": "; ".join(filter(None, problems)) or None,
        "num_layers": 0 if status is None else status.num_layers,
        "num_experts": 0 if status is None else status.num_experts,
        "gateway": {
            "open_requests": num_open,
            "is_draining": is_draining,
            "workers_connected": pool.num_alive,
            "workers_lost": pool.num_lost,
            "requests_resumed": pool.num_resumed,
            "latency": latency,
            "needs_key": needs_key,
        },
        "nodes": [] if status is None else [_node(node, status.workers) for node in status.nodes],
        "workers": [] if status is None else [_worker(worker) for worker in status.workers],
    }


def _node(node: NodeStatus, workers: Iterable[WorkerStatus]) -> dict[str, Any]:
    return {
        "node_id": node.node_id,
        "memory_bytes": node.memory_bytes,
        "devices": list(node.devices),
        "is_alive": node.is_alive,
        "workers": [worker.name for worker in workers if worker.node_id == node.node_id],
    }


def _worker(worker: WorkerStatus) -> dict[str, Any]:
    state = worker.state
    return {
        "name": worker.name,
        "role": worker.role,
        "node_id": worker.node_id,
        "condition": worker.condition,
        "worker_id": state.worker_id,  # another one: its counters began anew
        "num_running": state.num_running,
        "num_waiting": state.num_waiting,
        "pages_total": state.pages_total,
        "pages_free": state.pages_free,
        "generated_tokens": state.generated_tokens,
        "prompt_tokens": state.prompt_tokens,
        "steps": state.steps,
        "step_tokens": state.step_tokens,
        "sequence_steps": state.sequence_steps,
        "expert_calls": state.expert_calls,
        "expert_rows": state.expert_rows,
        "expert_s": state.expert_s,
        "num_experts": worker.num_experts,
        "shards": [list(experts) for experts in worker.shards],
    }
