"""`foretoken cluster worker`: one worker that the controller did not start, as a pod runs it.

The worker is a child of this process, which keeps it up, ends it when it hangs, and keeps its record in the store under
a lease: who reads the record knows that this process lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from pathlib import Path
from typing import Literal, cast

import msgspec
from pydantic import SecretStr

from cluster import logs
from cluster.config import Settings
from cluster.control.cluster_launch import member_launch
from cluster.control.launch import worker_environment
from cluster.control.model import find_model
from cluster.control.topology import MEMORY_SHARE
from cluster.control.worker_process import WorkerProcess
from cluster.errors import ConfigError, StoreUnavailableError
from cluster.event_loop import loop_factory
from cluster.machine import free_port, gpu_bytes, this_machine
from cluster.operate.pulse import end_hung
from cluster.protocol import Announcement, Launch
from cluster.serve import EXIT_AT_ONCE, on_signals
from cluster.silence import HUNG_LEASES, LASTING_LEASES, RENEWALS
from cluster.store import open_store
from cluster.store.base import Store
from cluster.store.records import WORKERS, Reader, WorkerRecord

logger = logging.getLogger(__name__)

# From SIGTERM until a worker must have ended, beside the time that its requests may take; a pod's grace period has
# room for both, or Kubernetes kills what drains.
STOP_EXTRA_S = 5.0
POD_NAME = re.compile(r"(?:^|-)((attention|expert)-(?:0|[1-9]\d{0,8}))$")  # of a StatefulSet: its own name comes first
WILDCARDS = ("0.0.0.0", "::")  # to listen on, but nowhere to be found at
SOMEWHERE = ("192.0.2.1", 9)  # never sent to: the way there shows our own address (RFC 5737)


def run(settings: Settings, role: str, name: str, node: str) -> int:
    """Serve until SIGTERM or SIGINT, then let what runs finish; returns the exit code.

    Raises `ForetokenError` for what stands in the way, and `WorkerLostError` when the worker cannot be started.
    """
    logs.configure(settings.log_level, settings.log_format)
    worker_name = name_of(role, name)
    if settings.store is None:
        raise ConfigError(
            "a worker says in the store that it is there: set FORETOKEN_STORE, or `store` in the config file, to its "
            "url (redis://…)",
            param="store",
        )
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(settings, settings.store, worker_name, node or socket.gethostname()))
    return 0


def name_of(role: str, pod_name: str) -> str:
    """The worker's name in the cluster, with which its pod's name ends. Raises `ConfigError`."""
    if role not in ("attention", "expert"):
        raise ConfigError(f"a worker's role is attention or expert, not {role!r}", param="role")
    found = POD_NAME.search(pod_name)
    if found is None or found[2] != role:
        raise ConfigError(
            f"an {role} worker's name is {role}-<number>, or ends with -{role}-<number>, not {pod_name!r}", param="name"
        )
    return found[1]


def advertised_host(settings: Settings) -> str:
    """Where others reach this process: as the settings say, or the address of the interface that leads outside."""
    if settings.advertise is not None:
        return settings.advertise
    if settings.host not in WILDCARDS:
        return settings.host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(SOMEWHERE)
        return str(probe.getsockname()[0])
    raise ConfigError("this machine's address was not found: set FORETOKEN_ADVERTISE to it", param="advertise")


async def _serve(settings: Settings, store_url: SecretStr, name: str, node: str) -> None:
    stop = asyncio.Event()
    on_signals(stop, lambda: os._exit(EXIT_AT_ONCE))
    record, launch = await asyncio.to_thread(_prepare, settings, name, node)
    worker = WorkerProcess(
        launch,
        environment=worker_environment(launch, this_machine(), os.environ),
        start_timeout_s=settings.start_timeout_s,
    )
    store = open_store(store_url.get_secret_value(), namespace=settings.cluster_name)
    registration = Registration(store, record, ttl_s=LASTING_LEASES * settings.lease_s)
    keep_up = asyncio.create_task(_keep_up(worker))
    pulse = asyncio.create_task(end_hung(worker, launch.token, HUNG_LEASES * settings.lease_s))
    stopped = asyncio.create_task(stop.wait())
    pause_s = LASTING_LEASES * settings.lease_s / RENEWALS
    try:
        while not stop.is_set() and not keep_up.done():
            await registration.renew(_announced(launch, worker.pid))
            await asyncio.wait({keep_up, stopped}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        if keep_up.done():
            await keep_up  # raises why there is no worker
    finally:
        stopped.cancel()
        pulse.cancel()
        try:
            await registration.renew(None)
        finally:  # whatever the store says, the worker ends
            await worker.stop(settings.drain_timeout_s + STOP_EXTRA_S)
            await asyncio.gather(keep_up, pulse, return_exceptions=True)
            await store.close()


def announce_path(settings: Settings, name: str) -> Path:
    """Where the worker of that name says that it serves: one file, whoever left it behind."""
    return settings.home / "clusters" / settings.cluster_name / "pods" / f"{name}.json"


def _prepare(settings: Settings, name: str, node: str) -> tuple[WorkerRecord, Launch]:
    """The worker's record, but for what only the running process knows, and its options. Raises `ConfigError`."""
    announcement = announce_path(settings, name)
    try:
        announcement.parent.mkdir(parents=True, exist_ok=True)
        announcement.unlink(missing_ok=True)  # in a container the next process may have the same id
    except OSError as error:
        raise ConfigError(f"cannot write {announcement}: {error.strerror}", param="home") from error
    host, machine, model = advertised_host(settings), this_machine(), find_model(settings)
    role = cast(Literal["attention", "expert"], name.partition("-")[0])
    gpus = gpu_bytes() if settings.device != "cpu" else []
    free_bytes = gpus[0] if gpus else machine.available_bytes
    memory_bytes = int(free_bytes * MEMORY_SHARE)
    port = settings.port or free_port(settings.host)
    record = WorkerRecord(
        name=name,
        role=role,
        node_id=node,
        device_id="cuda:0" if gpus else "cpu",
        address=f"{host}:{port}",
        worker_id="",
        pid=0,
        memory_bytes=memory_bytes,
        kv_bytes=int(settings.kv_cache_bytes or 0),
    )
    launch = msgspec.structs.replace(
        member_launch(settings, model, machine, role=role, name=name, node_id=node, address=f"{settings.host}:{port}"),
        announce_path=str(announcement),
        tensor_host=socket.gethostbyname(host),
    )
    return record, launch


async def _keep_up(worker: WorkerProcess) -> None:
    await worker.start()
    await worker.watch()


def _announced(launch: Launch, pid: int | None) -> Announcement | None:
    """What the process that runs now has announced."""
    assert launch.announce_path is not None
    try:
        announcement = msgspec.json.decode(Path(launch.announce_path).read_bytes(), type=Announcement)
    except FileNotFoundError:
        return None
    return announcement if announcement.pid == pid else None


class Registration:
    """A worker's record in the store, kept there while its process runs, also by a store that was emptied."""

    def __init__(self, store: Store, record: WorkerRecord, *, ttl_s: float) -> None:
        self._store = store
        self._reader = Reader()
        self._record = record
        self._ttl_s = ttl_s

    async def renew(self, announcement: Announcement | None) -> None:
        """The record of the process that announced itself; None: of none. Tried again by the next call."""
        try:
            await self._renew(announcement)
        except StoreUnavailableError as error:
            logger.debug("the worker's record was not renewed: %s", error.message)

    async def _renew(self, announcement: Announcement | None) -> None:
        key = WORKERS + self._record.name
        held = await self._store.get(key)
        expected = held.version if held is not None else 0
        if announcement is None:
            found = self._reader.read_worker(key, held.value) if held is not None else None
            if found is not None and found.address == self._record.address:
                await self._store.compare_and_set(key, None, expected=expected)
            return
        record = msgspec.structs.replace(self._record, worker_id=announcement.worker_id, pid=announcement.pid)
        value = msgspec.json.encode(record)
        if held is None or held.value != value:
            await self._store.compare_and_set(key, value, expected=expected, ttl_s=self._ttl_s)
        else:
            await self._store.renew(key, expected=expected, ttl_s=self._ttl_s)
