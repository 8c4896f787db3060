"""A cluster on this machine for load tests and the demo: `foretoken cluster up --local`, and what it is made of."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from cluster.config import Settings, load
from cluster.errors import StoreUnavailableError
from cluster.machine import free_port
from cluster.operate.children import in_session
from cluster.operate.ray_nodes import STARTED
from cluster.operate.state_file import ClusterFiles, SupervisorState
from cluster.operate.up import is_ready
from cluster.store import open_store
from cluster.store.records import STALE_S, ClusterStatus, read_status
from loadtests.processes import BenchError, Child, Server, environment, get, python_command, served_model

POLL_S = 0.1
NUM_NODES = 3
STARTING = "Local node IP:"  # the first line of `ray start`
RAYLET = b"/raylet"  # a node's process
END_S = 60.0  # until nothing is left of a cluster that was told to end
FLAGS = ("local", "port", "cluster_name", "attention_workers", "expert_workers", "expert_copies")  # in the command


@dataclass(frozen=True)
class LocalCluster:
    """A cluster: where it answers, and which process is which."""

    supervisor: Child
    settings: Settings
    stale: SupervisorState | None = None  # of a dead supervisor before ours

    @cached_property
    def server(self) -> Server:
        """Once it is ready."""
        return Server(self.url, served_model(self.url))

    @cached_property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer, once it is ready."""
        return int(msgspec.json.decode(get(self.url, "/v1/models"))["data"][0]["max_model_len"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings.port}"

    def state(self) -> SupervisorState | None:
        """What its supervisor wrote last, if anything yet. Raises `BenchError` where it has ended, with its words."""
        try:
            self.supervisor.check_alive()
        except BenchError:
            lines = textwrap.dedent(self.supervisor.last_lines()).strip()
            start = lines.find("Error: ")
            said = lines[start:].removeprefix("Error: ") if start >= 0 else f"cluster up ended: {lines}"
            raise BenchError(said) from None
        state = ClusterFiles(self.settings).read()
        return None if state == self.stale else state

    def children(self) -> dict[str, int]:
        """Process ids of the supervisor's children: controller, gateway, redis, ray-0 …; those that run now."""
        state = self.state()
        return {} if state is None else dict(state.children)

    def status(self) -> ClusterStatus | None:
        """What the controller last wrote; None while the store cannot be read."""
        state = self.state()
        return None if state is None else asyncio.run(self._look(state.store))

    async def _look(self, url: str) -> ClusterStatus | None:
        store = open_store(url, namespace=self.settings.cluster_name)
        try:
            return await read_status(store)
        except StoreUnavailableError:
            return None
        finally:
            await store.close()

    def num_resumed(self) -> int:
        """How many requests the gateway has given to another worker."""
        told = msgspec.json.decode(get(self.url, "/cluster"), type=dict[str, Any])
        return int(told["gateway"]["requests_resumed"])

    def problem(self) -> str:
        """What is missing of the whole; "": nothing."""
        names = {"controller", "gateway", "redis", *(f"ray-{i}" for i in range(self.settings.local or 0))}
        if missing := names - self.children().keys():
            return f"{', '.join(sorted(missing))} not running"
        status = self.status()
        if status is None or time.time() - status.at_s > STALE_S:
            return "no fresh status"
        if status.problem:
            return status.problem
        if len([node for node in status.nodes if node.is_alive]) < (self.settings.local or 0):
            return "a node is missing"
        if starting := [name for name in sorted(names) if name.startswith("ray-") and not self.is_up(name)]:
            return f"{', '.join(starting)} starting"
        wanted = self.settings.attention_workers + self.settings.expert_workers
        serving = [worker for worker in status.workers if worker.condition == "serving"]
        if len(serving) < wanted or len(serving) < len(status.workers):
            return f"{len(serving)} of {wanted} workers serve"
        shards = [worker.num_experts for worker in serving if worker.role == "expert"]
        num_copies = min(self.settings.expert_copies, len(shards))
        if min(shards, default=0) == 0 or sum(shards) != status.num_experts * status.num_layers * num_copies:
            return f"experts held: {shards}"
        return "" if is_ready(self.url) else "the gateway is not ready"

    def is_up(self, node: str) -> bool:
        """Whether Ray runs on that node; it counts as alive as soon as one of its workers reports."""
        pid = self.children().get(node)
        if pid is None or not any(RAYLET in _command(each) for each in in_session(pid)):
            return False
        log = ClusterFiles(self.settings).logs / f"{node}.log"
        return STARTED in log.read_text(encoding="utf-8", errors="replace").rpartition(STARTING)[2]

    def wait_whole(self, timeout_s: float, look: Callable[[LocalCluster], None] = lambda _: None) -> None:
        """Until every process is there, every worker serves and the experts are shared out; `look` all the while.

        Raises `BenchError` with what is missing where that takes longer, or where the cluster has ended.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            problem = self.problem()
            look(self)
            if not problem:
                return
            if time.monotonic() > deadline:
                logs = ClusterFiles(self.settings).logs
                raise BenchError(f"the cluster is not whole after {timeout_s:g} s: {problem}; see the logs in {logs}")
            time.sleep(POLL_S)


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
    return b""


def own_settings(**given: Any) -> Settings:
    """A cluster's settings: what is given, and none that the environment has for other clusters but the home.

    Raises `ConfigError` for a value out of range. A port is found where none is given.
    """
    settings = load(given)
    ours = {*given, "home"}
    update = {name: field.get_default() for name, field in Settings.model_fields.items() if name not in ours}
    return settings.model_copy(update={**update, "port": given.get("port") or free_port()})


def own_environment(**changes: str) -> dict[str, str]:
    """Ours, without settings that are meant for other clusters; with `changes`."""
    inherited = environment()
    kept = {n: v for n, v in inherited.items() if n == "FORETOKEN_HOME" or not n.startswith(("FORETOKEN_", "RAY_"))}
    return kept | changes


@contextlib.contextmanager
def local_cluster(settings: Settings, variables: Mapping[str, str] | None = None) -> Iterator[LocalCluster]:
    """A cluster of the demo model that begins to start: see `wait_whole`. `variables` go into its environment.

    However the block is left, nothing of it is left behind. `settings` are of `own_settings`. Raises `ConfigError`
    where another cluster has its name, `BenchError` where it does not end.
    """
    files = ClusterFiles(settings)
    with files.held():
        stale = files.read()
    flags = [text for name in FLAGS for text in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
    command = python_command("cluster.cli", "cluster", "up", *flags)
    supervisor = Child("cluster up", command, own_environment(**(variables or {})))
    try:
        yield LocalCluster(supervisor, settings, stale)
    finally:
        supervisor.stop()
        deadline = time.monotonic() + END_S
        while files.is_held():  # it ends in order behind the command
            if time.monotonic() > deadline:
                raise BenchError(f"the cluster has not ended within {END_S:g} s; see the logs in {files.logs}")
            time.sleep(POLL_S)


@contextlib.contextmanager
def whole_cluster(
    num_nodes: int = NUM_NODES,
    *,
    start_timeout_s: float,
    variables: Mapping[str, str] | None = None,
    expert_copies: int = 1,
) -> Iterator[LocalCluster]:
    """A `local_cluster` under a name of its own, once it is whole."""
    name = f"loadtest-{secrets.token_hex(4)}"
    settings = own_settings(local=num_nodes, cluster_name=name, expert_copies=expert_copies)
    with local_cluster(settings, variables) as cluster:
        cluster.wait_whole(start_timeout_s)
        yield cluster
