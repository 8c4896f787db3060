"""What `GET /cluster` tells: nodes, workers, shards and how much they do. For people, and without addresses or secrets.

In a cluster it is what its controller wrote to the store; with a worker of our own it is what that worker says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from cluster.errors import StoreUnavailableError
from cluster.gateway.pool import WorkerPool
from cluster.protocol import ClusterStatus, EngineState, NodeStatus, WorkerStatus
from cluster.store.base import Store

STATUS_KEY = "status/cluster"
FRESH_S = 0.5  # the store is asked at most so often, however many pages are open
STALE_S = 5.0  # a status older than this is no news
STATE_TIMEOUT_S = 1.0
NODE = "this machine"


@dataclass(frozen=True)
class Seen:
    """The last status that is known, and why a newer one is not."""

    status: ClusterStatus | None
    problem: str | None = None


class StatusSource(Protocol):
    async def look(self) -> Seen: ...


class PoolStatus:
    """The status of workers that no controller looks after."""

    def __init__(self, pool: WorkerPool, model: str, memory_bytes: int = 0) -> None:
        self._pool = pool
        self._model = model
        self._memory_bytes = memory_bytes

    async def look(self) -> Seen:
        pool = self._pool
        states = await pool.states(STATE_TIMEOUT_S)
        hellos = pool.hellos()
        workers = []
        for place in pool.places:
            hello = hellos.get(place.name)
            workers.append(
                WorkerStatus(
                    name=place.name,
                    role="all",
                    node_id=NODE,
                    address=place.address,
                    pid=0,
                    condition="serving" if hello else "lost" if pool.num_connections else "starting",
                    state=states.get(place.name, EngineState()),
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
        return Seen(status)


class StoreStatus:
    """What a cluster's controller wrote last; while the store is out of reach, what was known before."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen = Seen(None, "the cluster's status was not read yet")
        self._looked = float("-inf")  # when, on the monotonic clock
        self._lock = asyncio.Lock()

    async def look(self) -> Seen:
        async with self._lock:
            if time.monotonic() - self._looked >= FRESH_S:
                self._seen = await self._read()
                self._looked = time.monotonic()
            return self._seen

    async def _read(self) -> Seen:
        try:
            found = await self._store.get(STATUS_KEY)
        except StoreUnavailableError:  # its text may name the store's address
            return Seen(self._seen.status, "the store does not answer")
        if found is None:
            return Seen(self._seen.status, "the controller has written no status yet")
        try:
            return Seen(msgspec.json.decode(found.value, type=ClusterStatus))
        except msgspec.MsgspecError:
            return Seen(self._seen.status, "the cluster's status is of another version: run all from one release")


def cluster_body(seen: Seen, pool: WorkerPool, *, model: str, num_open: int, is_draining: bool) -> dict[str, Any]:
    """The JSON object of `GET /cluster`; times in seconds, sizes in bytes."""
    status = seen.status
    age_s = None if status is None else max(0.0, time.time() - status.at_s)
    return {
        "model": model,
        "cluster": (status.cluster or None) if status is not None else None,
        "at_s": None if status is None else status.at_s,
        "age_s": age_s,
        "is_stale": age_s is not None and age_s > STALE_S,
        "epoch": (status.epoch or None) if status is not None else None,
        "problem": seen.problem or (None if status is None else status.problem),
        "num_layers": 0 if status is None else status.num_layers,
        "num_experts": 0 if status is None else status.num_experts,
        "gateway": {
            "open_requests": num_open,
            "is_draining": is_draining,
            "workers_connected": pool.num_alive,
            "workers_lost": pool.num_lost,
            "requests_resumed": pool.num_resumed,
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
        "expert_calls": state.expert_calls,
        "expert_rows": state.expert_rows,
        "expert_s": state.expert_s,
        "num_experts": worker.num_experts,
        "shards": [list(experts) for experts in worker.shards],
    }
