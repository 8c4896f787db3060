"""Who starts worker processes: Ray, this machine itself, or Kubernetes. The controller knows this one face.

A worker started through a launcher is no child of the controller: it outlives it, and another controller takes it over
with `adopt`.
"""

from __future__ import annotations

from typing import Protocol

from cluster.control.placement import PlacedWorker
from cluster.control.topology import Topology
from cluster.protocol import Announcement, Launch
from cluster.store.records import WorkerRecord


class Launcher(Protocol):
    """Every call ends within the launcher's own deadlines. Where it cannot be reached (Ray's head is gone) calls raise
    `UnavailableError`; workers that run are not touched by that.
    """

    @property
    def starts_workers(self) -> bool:
        """False: others start them, and they are where they are (pods)."""

    async def topology(self) -> Topology:
        """The nodes that workers can be on now. A node's id stays the same while the machine does."""

    async def start(self, worker: PlacedWorker, launch: Launch) -> WorkerRecord:
        """Start a process for `worker` on its node and wait until it serves.

        `launch` has everything but what only the node knows (address, announce_path, tensor_host, kernels). Where it
        ends before it serves it raises `StartRefusedError` with the worker's own words, or without any
        `WorkerLostError` with its last lines.
        """

    async def adopt(self, record: WorkerRecord) -> bool:
        """Watch over a worker that runs already; False: its process is not there."""

    async def is_running(self, record: WorkerRecord) -> bool:
        """Whether its process is there, alive or hung."""

    async def stop(self, record: WorkerRecord, *, kill: bool) -> None:
        """End its process: SIGTERM, or with `kill` SIGKILL. Returns once that is sent; nothing where it is gone."""

    async def close(self) -> None:
        """Let go; workers go on."""


def record_of(worker: PlacedWorker, announced: Announcement) -> WorkerRecord:
    """What is recorded of a worker that serves in the place of `worker`."""
    return WorkerRecord(
        name=worker.id,
        role=worker.role,
        node_id=worker.node_id,
        device_id=worker.device_id,
        address=announced.address,
        worker_id=announced.worker_id,
        pid=announced.pid,
        memory_bytes=worker.memory_bytes,
        kv_bytes=worker.kv_bytes,
    )
