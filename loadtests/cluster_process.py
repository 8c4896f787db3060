"""A cluster on this machine for a load test: `foretoken cluster up --local`, and a look at what it is made of."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.config import Settings, load
from cluster.errors import StoreUnavailableError
from cluster.operate.show import read_status
from cluster.operate.state_file import Places, SupervisorState
from cluster.protocol import ClusterStatus, Role
from cluster.store import open_store
from loadtests.processes import BenchError, Child, Server, environment, free_port, get, python_command, served_model

POLL_S = 0.1
NUM_NODES = 3
END_S = 60.0


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster: where it answers, and which process is which."""

    server: Server
    supervisor: Child
    settings: Settings

    def state(self) -> SupervisorState:
        """What its supervisor wrote. Raises `BenchError` where it has ended."""
        self.supervisor.check_alive()
        state = Places(self.settings).read()
        if state is None:
            raise BenchError(f"the cluster has no state file{self.supervisor.last_lines()}")
        return state

    def status(self) -> ClusterStatus | None:
        """What the controller last wrote; None while the store cannot be read."""

        async def look() -> ClusterStatus | None:
            store = open_store(self.state().store, namespace=self.settings.cluster_name)
            try:
                return await read_status(store)
            except StoreUnavailableError:
                return None
            finally:
                await store.close()

        return asyncio.run(look())

    def pids(self, role: Role) -> list[int]:
        """The serving workers of a role."""
        status = self.status()
        workers = () if status is None else status.workers
        return [worker.pid for worker in workers if worker.role == role and worker.condition == "serving"]

    def process(self, name: str) -> int | None:
        """A child of the supervisor: controller, gateway, redis, ray-0 …; None while it is being started again."""
        return self.state().children.get(name)

    def problem(self) -> str:
        """What is missing of the whole; "": nothing."""
        names = {"controller", "gateway", *(f"ray-{i}" for i in range(self.settings.local or 0))}
        if self.settings.store is None:
            names.add("redis")
        if missing := names - self.state().children.keys():
            return f"{', '.join(sorted(missing))} not running"
        status = self.status()
        if status is None or time.time() - status.at_s > 3.0:
            return "no fresh status"
        if status.problem:
            return status.problem
        if len([node for node in status.nodes if node.is_alive]) < (self.settings.local or 0):
            return "a node is missing"
        wanted = self.settings.attention_workers + self.settings.expert_workers
        serving = [worker for worker in status.workers if worker.condition == "serving"]
        if len(serving) < wanted or len(serving) < len(status.workers):
            return f"{len(serving)} of {wanted} workers serve"
        shards = [worker.num_experts for worker in serving if worker.role == "expert"]
        if min(shards, default=0) == 0 or sum(shards) != status.num_experts * status.num_layers:
            return f"experts held: {shards}"
        return ""

    def wait_until_whole(self, timeout_s: float) -> float:
        """Seconds until every process is there, every worker serves and the experts are shared out again."""
        started = time.monotonic()
        while problem := self.problem():
            if time.monotonic() > started + timeout_s:
                raise BenchError(f"the cluster is not whole after {timeout_s:g} s: {problem}")
            time.sleep(POLL_S)
        return time.monotonic() - started


@contextlib.contextmanager
def local_cluster(
    num_nodes: int = NUM_NODES, *, start_timeout_s: float, variables: Mapping[str, str] | None = None
) -> Iterator[LocalCluster]:
    """A cluster of the demo model under a name of its own, ended afterwards. `variables` go into its environment.

    Raises `BenchError` where it does not come up in time.
    """
    settings = load({"local": num_nodes, "port": free_port(), "cluster_name": f"loadtest-{secrets.token_hex(4)}"})
    arguments = ["--local", str(num_nodes), "--port", str(settings.port), "--cluster-name", settings.cluster_name]
    base_url = f"http://127.0.0.1:{settings.port}"
    command = python_command("cluster.cli", "cluster", "up", *arguments)
    started = time.monotonic()
    with Child("foretoken cluster up", command, environment(**(variables or {}))) as supervisor:
        while not _is_ready(base_url):
            supervisor.check_alive()
            if time.monotonic() > started + start_timeout_s:
                raise BenchError(f"no cluster after {start_timeout_s:g} s{supervisor.last_lines()}")
            time.sleep(POLL_S)
        cluster = LocalCluster(Server(base_url, served_model(base_url)), supervisor, settings)
        cluster.wait_until_whole(start_timeout_s)
        yield cluster
    wait_ended(settings)


def wait_ended(settings: Settings) -> None:
    """Until the process behind `cluster up` has ended what it had started: the next measurement begins undisturbed."""
    end = time.monotonic() + END_S
    while Places(settings).is_held():
        if time.monotonic() > end:
            raise BenchError(f"the cluster {settings.cluster_name} did not end within {END_S:g} s")
        time.sleep(POLL_S)


def _is_ready(base_url: str) -> bool:
    try:
        get(base_url, "/health/ready")
    except BenchError:
        return False
    return True
