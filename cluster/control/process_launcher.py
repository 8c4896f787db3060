"""Workers as detached processes of this machine, without Ray: the plain reference of a launcher."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence

import msgspec

from cluster.config import Settings
from cluster.control import detached
from cluster.control.launch import COMMAND, worker_environment
from cluster.control.launcher import record_of
from cluster.control.placement import PlacedWorker
from cluster.control.topology import Topology, local_topology
from cluster.control.worker_folders import logs_folder
from cluster.machine import this_machine
from cluster.protocol import Announcement, Launch
from cluster.store.records import WorkerRecord

HOST = "127.0.0.1"


class ProcessLauncher:
    """A `Launcher`; this machine counts as `num_nodes` nodes that share its memory."""

    def __init__(
        self,
        settings: Settings,
        num_nodes: int = 1,
        *,
        command: Sequence[str] = COMMAND,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._logs = logs_folder(settings)
        self._start_timeout_s = settings.start_timeout_s
        self._topology = local_topology(num_nodes)
        self._command = tuple(command)
        self._environment = environment

    @property
    def starts_workers(self) -> bool:
        return True

    async def topology(self) -> Topology:
        """As it was before the first worker ran: what is free now is less by what they use."""
        return self._topology

    async def start(self, worker: PlacedWorker, launch: Launch) -> WorkerRecord:
        launch = msgspec.structs.replace(launch, address=f"{HOST}:0", tensor_host=HOST)
        give_up = threading.Event()
        started = asyncio.ensure_future(asyncio.to_thread(self._start, launch, give_up))
        try:
            announcement = await asyncio.shield(started)
        except asyncio.CancelledError:
            give_up.set()
            await asyncio.wait({started})
            if started.exception() is None:  # it served at that moment, and nobody would know of it
                detached.end(started.result().pid, launch.name, kill=True)
            raise
        return record_of(worker, announcement)

    def _start(self, launch: Launch, give_up: threading.Event) -> Announcement:
        return detached.start_detached(
            launch,
            worker_environment(launch, this_machine(), self._environment),
            self._logs / f"{launch.name}.log",
            self._start_timeout_s,
            command=self._command,
            give_up=give_up,
        )

    async def adopt(self, record: WorkerRecord) -> bool:
        return await self.is_running(record)

    async def is_running(self, record: WorkerRecord) -> bool:
        return detached.is_running(record.pid, record.name)

    async def stop(self, record: WorkerRecord, *, kill: bool) -> None:
        detached.end(record.pid, record.name, kill=kill)

    async def close(self) -> None:
        """Nothing is held."""
