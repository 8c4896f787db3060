"""Workers started through Ray. The Ray driver is a child process, `cluster.control.ray_bridge`.

A driver ends its own process when Ray's head stays away. So it lives in a child that this one asks by JSON lines over
its standard input and output: without Ray every call raises `UnavailableError`, and the child is started again until
Ray is back. No tensor and no token of a text ever goes through Ray; a worker's `Launch` does, with the cluster's token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from cluster.config import Settings
from cluster.control.identity import cluster_id, kept_id
from cluster.control.launch import COMMAND
from cluster.control.launcher import record_of
from cluster.control.placement import PlacedWorker
from cluster.control.ray_messages import CALL_TIMEOUT_S, Call, Connect, RayNode, Reply, Target
from cluster.control.topology import MEMORY_SHARE, Device, Node, Topology
from cluster.control.worker_folders import logs_folder
from cluster.environment import child_environment, ray_variables
from cluster.errors import ForetokenError, StoreUnavailableError, UnavailableError, by_code
from cluster.protocol import Announcement, Launch
from cluster.store.records import UNREADABLE, WorkerRecord

logger = logging.getLogger(__name__)

BRIDGE = (sys.executable, "-P", "-m", "cluster.control.ray_bridge")
CONNECT_TIMEOUT_S = 8.0  # so long after the first start calls wait for the bridge; later ones fail at once
GIVE_UP_TIMEOUT_S = 3.0  # for a start that was cancelled
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 5.0  # before a bridge that ended is started again
PROBE_S = 0.5  # between two looks whether Ray's head is back: cheaper than a bridge, which imports Ray first
PROBE_TIMEOUT_S = 1.0
LINE_LIMIT_BYTES = 2**22
LOCAL_HOST = "127.0.0.1"


T = TypeVar("T")


class RayLauncher:
    """A `Launcher` for the nodes of a Ray cluster. Used from one event loop; `close` it, workers go on."""

    def __init__(
        self,
        settings: Settings,
        *,
        command: Sequence[str] = COMMAND,
        address: str | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """`command` starts a worker; `address` is Ray's (None: RAY_ADDRESS, or the Ray that runs here)."""
        self._settings = settings
        self._connect = Connect(
            cluster_name=settings.cluster_name,
            address=address or environment.get("RAY_ADDRESS"),
            host=LOCAL_HOST if settings.local else None,
            logs_dir=str(logs_folder(settings)),
            start_timeout_s=settings.start_timeout_s,
            command=tuple(command),
        )
        self._environment = child_environment(environment, ray_variables(environment))
        self._cluster_id: str | None = None  # not known yet
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._tried = asyncio.Event()  # the first bridge is connected, or could not be
        self._first_attempt_at = 0.0
        self._why = f"it has not answered within {CONNECT_TIMEOUT_S:g} s"
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[Reply]] = {}

    @property
    def bridge_pid(self) -> int | None:
        """The Ray driver's process id; None between two."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    @property
    def starts_workers(self) -> bool:
        return True

    async def topology(self) -> Topology:
        nodes = await self._call("nodes", list[RayNode])
        return Topology(tuple(to_node(node) for node in nodes))

    async def check_alone(self) -> None:
        """Raises `ConfigError` where another cluster of this one's name has workers on this Ray."""
        await self._ask("check_alone", type(None))

    async def start(self, worker: PlacedWorker, launch: Launch) -> WorkerRecord:
        target = Target(
            name=worker.id, node_id=worker.node_id, memory_bytes=worker.memory_bytes, device_id=worker.device_id
        )
        timeout_s = self._settings.start_timeout_s + CALL_TIMEOUT_S
        text = msgspec.json.encode(launch).decode()
        try:
            announced = await self._ask("start", Announcement, target=target, launch=text, timeout_s=timeout_s)
        except asyncio.CancelledError:
            with contextlib.suppress(ForetokenError):  # nobody would know of it
                await self._ask("stop", type(None), target=target, kill=True, timeout_s=GIVE_UP_TIMEOUT_S)
            raise
        return record_of(worker, announced)

    async def adopt(self, record: WorkerRecord) -> bool:
        return await self._ask("adopt", bool, target=_target(record))

    async def is_running(self, record: WorkerRecord) -> bool:
        return await self._ask("is_running", bool, target=_target(record))

    async def stop(self, record: WorkerRecord, *, kill: bool) -> None:
        await self._ask("stop", type(None), target=_target(record), kill=kill)

    async def end_all(self, timeout_s: float) -> int:
        """End every worker that this cluster's actors watch, one that starts just now included; how many there were.

        SIGTERM first, SIGKILL to what still runs after `timeout_s`. A store that is away does not keep it from that.
        """
        try:
            found = await self._find_cluster_id()
        except StoreUnavailableError:
            found = kept_id(self._settings)
        return await self._call("end_all", int, cluster_id=found, timeout_s=timeout_s + CALL_TIMEOUT_S)

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None

    async def _ask(self, method: Any, result: type[T], **fields: Any) -> T:
        """`_call` what is about this cluster's actors; raises `StoreUnavailableError` while it is not known which."""
        return await self._call(method, result, cluster_id=await self._find_cluster_id(), **fields)

    async def _find_cluster_id(self) -> str:
        if self._cluster_id is None:
            self._cluster_id = await cluster_id(self._settings)
        return self._cluster_id

    async def _call(self, method: Any, result: type[T], **fields: Any) -> T:
        """Ask the bridge; raises `UnavailableError` where it is not there, or what it answered."""
        await self._wait_connected()
        call = Call(id=next(self._ids), method=method, **fields)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._open[call.id] = future
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(call) + b"\n")
            reply = await asyncio.wait_for(future, call.timeout_s + 1.0)  # the bridge keeps the deadline itself
        except TimeoutError:
            raise UnavailableError(f"Ray did not answer within {call.timeout_s:g} s") from None
        except OSError as error:
            raise UnavailableError(f"the bridge to Ray is gone: {error}") from None
        finally:
            self._open.pop(call.id, None)
        if reply.error_code is not None:
            raise by_code(reply.error_code)(reply.error_message)
        try:
            return msgspec.json.decode(reply.result, type=result)
        except UNREADABLE as error:
            raise UnavailableError(f"the bridge's answer to {method} cannot be read: {error}") from None

    async def _wait_connected(self) -> None:
        if self._keeper is None:
            self._first_attempt_at = time.monotonic()
            self._keeper = asyncio.create_task(self._keep_bridge())
        remaining_s = self._first_attempt_at + CONNECT_TIMEOUT_S - time.monotonic()
        if not self._tried.is_set() and remaining_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._tried.wait(), remaining_s)
        if not self._connected.is_set():
            raise UnavailableError(f"Ray cannot be reached: {self._why}")

    async def _keep_bridge(self) -> None:
        """Run the bridge, one after the other, with growing pauses while Ray stays away."""
        pause_s = FIRST_PAUSE_S
        while True:
            was_connected = False
            try:
                await self._wait_listening()
                was_connected = await self._run_bridge()
            except OSError as error:
                self._why = f"the bridge could not be started: {error}"
            pause_s = FIRST_PAUSE_S if was_connected else min(2 * pause_s, LAST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _wait_listening(self) -> None:
        """Until something answers at Ray's address, where it names a host and a port."""
        address = self._connect.address or ""
        host, _, port = address.rpartition(":")
        while host and "/" not in host and port.isdigit():
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            except OSError as error:  # a `TimeoutError` is one
                self._lack(f"nothing answers at {address}: {error or 'no answer'}")
                await asyncio.sleep(PROBE_S)
            else:
                writer.close()
                return

    def _lack(self, why: str) -> None:
        """Ray cannot be reached, and why."""
        if self._why != why:
            logger.warning("Ray cannot be reached: %s", why)
        self._why = why
        self._tried.set()

    async def _run_bridge(self) -> bool:
        """One bridge until it ends, or is ended for what it says; whether it was connected and only lost Ray."""
        self._process = process = await asyncio.create_subprocess_exec(
            *BRIDGE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            limit=LINE_LIMIT_BYTES,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        was_connected = False
        unreadable = ""
        try:
            process.stdin.write(msgspec.json.encode(self._connect) + b"\n")
            while line := await process.stdout.readline():
                reply = msgspec.json.decode(line, type=Reply)
                if reply.id == 0 and reply.error_code is None:
                    was_connected = True
                    self._why = ""
                    self._connected.set()
                    self._tried.set()
                elif reply.id == 0:
                    self._lack(reply.error_message)
                elif (future := self._open.get(reply.id)) is not None and not future.done():
                    future.set_result(reply)
        except UNREADABLE as error:  # a line that is too long is a `ValueError`
            unreadable = str(error)
        finally:
            self._connected.clear()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
            self._lose_calls()
        if unreadable:
            self._lack(f"the bridge to Ray said what cannot be read ({unreadable}); another one is started")
            return False  # the next one may be no better: the pauses grow
        if was_connected:
            self._why = "the bridge to Ray ended, as it does when Ray's head stays away"
            logger.warning("%s; trying to reach Ray again", self._why)
        elif not self._tried.is_set():  # it said nothing
            self._why = f"the bridge to Ray ended with exit code {code}; what it printed tells why"
            self._tried.set()
        return was_connected

    def _lose_calls(self) -> None:
        for future in self._open.values():
            if not future.done():
                future.set_exception(UnavailableError("the bridge to Ray ended before it answered"))


def to_node(node: RayNode) -> Node:
    """A node for the placement: its GPUs, or without any its processor. Ray's memory is what it may reserve there."""
    memory_bytes = int(node.memory_bytes * MEMORY_SHARE)
    devices = [Device(f"cuda:{i}", "cuda", int(size * MEMORY_SHARE)) for i, size in enumerate(node.gpu_bytes)]
    cpu = Device("cpu", "cpu", memory_bytes)
    return Node(node.name, node.name, memory_bytes, (cpu, *devices), node.num_cores, node.machine)


def _target(record: WorkerRecord) -> Target:
    return Target(
        name=record.name,
        node_id=record.node_id,
        pid=record.pid,
        memory_bytes=record.memory_bytes,
        device_id=record.device_id,
    )
