"""Ray nodes on this machine for `cluster up --local`: a head and others, each a child that stays in the foreground.

They share the machine's free memory evenly and show each other a token. The head keeps its tables on disk (RocksDB), so
that one that is started again is the same cluster: nodes join it, and named actors are found.

A node that hangs cannot end itself: Ray counts it as lost after its own health checks, and nothing takes its place.

A raylet dies where its agents, which are Python, have not told their ports within 15 s, and `ray start` notices that
only after 30 s. So the others wait for a head that runs: beside five more such processes it may never get that far.
"""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import grpc
import grpc.aio

from cluster.channel import CHANNEL_OPTIONS
from cluster.environment import child_environment, ray_variables
from cluster.machine import Machine, free_port
from cluster.operate.children import Child

RAY = (sys.executable, "-m", "ray.scripts.scripts", "start")
STARTED = "Ray runtime started"  # `ray start` prints it once the node runs
# Where a head leaves its address. While it is there, and others' raylets show that address on their command lines, the
# next head takes them for a head that runs, and does not start until all of them have given up.
ADDRESS_FILE = "ray_current_cluster"
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
NICENESS = -10  # Linux shares the processor by session: a node's seven processes would get as much as one worker
OBJECT_STORE_BYTES = 80_000_000  # about the least that Ray takes: no tensor goes through it


def node_environment(
    inherited: Mapping[str, str], *, token: str, folder: Path, mark: Mapping[str, str]
) -> dict[str, str]:
    """What a node and its actors run with: of secrets, Ray's own token."""
    given = {
        **tuned_variables(inherited),
        **mark,
        **access(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # processes for tasks, of which there are none
        "RAY_worker_niceness": "0",  # workers inherit it from their actors: behind everything else they would starve
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(folder / "gcs"),
    }
    return child_environment(inherited, given)


def tuned_variables(inherited: Mapping[str, str]) -> dict[str, str]:
    """How Ray is tuned, such as the time until a node gives up its head; nothing of another Ray's."""
    return {name: value for name, value in ray_variables(inherited).items() if name[4:5].islower()}


def access(token: str) -> dict[str, str]:
    """What opens a Ray of ours."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def node_names(num_nodes: int) -> list[str]:
    """As `local_topology` names them; they stay the same when a node is started again."""
    host = platform.node() or "localhost"
    return [host] if num_nodes == 1 else [f"{host}-{i}" for i in range(num_nodes)]


def node_children(
    num_nodes: int, *, port: int, folder: Path, logs: Path, environment: Mapping[str, str], machine: Machine
) -> list[Child]:
    """The head, which listens on `port`, then the others; none is started yet. `folder` must have a short path."""
    client_port, dashboard_port = free_port(), free_port()
    children: list[Child] = []
    for i, name in enumerate(node_names(num_nodes)):
        node_port = free_port()
        options = [
            "--block",
            f"--node-name={name}",
            f"--node-manager-port={node_port}",
            f"--num-cpus={machine.num_usable_cores}",
            f"--memory={machine.available_bytes // num_nodes}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={folder / f'r{i}'}",
            "--dashboard-agent-listen-port=0",
            "--include-log-monitor=false",
            "--disable-usage-stats",
            "--log-style=record",
            "--log-color=false",
        ]
        if i == 0:
            options += [
                "--head",
                f"--port={port}",
                f"--dashboard-port={dashboard_port}",
                "--include-dashboard=false",
                f"--ray-client-server-port={client_port}",
                "--no-monitor",  # an autoscaler has nothing to do here, and its start would be in the others' way
            ]
        else:
            options.append(f"--address=127.0.0.1:{port}")
        child = Child(f"ray-{i}", (*RAY, *options), environment, logs / f"ray-{i}.log", grace_s=0.0, niceness=NICENESS)
        if i == 0:
            child.before_start = partial((folder / "r0" / ADDRESS_FILE).unlink, missing_ok=True)
        else:
            child.may_start = partial(is_started, children[0])
        child.is_answering = partial(are_answering, (port, node_port) if i == 0 else (node_port,))
        children.append(child)
    return children


def is_started(node: Child) -> bool:
    """Whether the node runs."""
    return node.pid is not None and STARTED in node.output


async def are_answering(ports: Iterable[int], timeout_s: float) -> bool:
    """Whether the gRPC servers at these ports of this machine all answer; a refusal is an answer."""
    return all(await asyncio.gather(*(_is_answering(port, timeout_s) for port in ports)))


async def _is_answering(port: int, timeout_s: float) -> bool:
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
            await channel.unary_unary(HEALTH_METHOD)(b"", timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code() not in SILENT
    except grpc.aio.UsageError:
        return False
    return True
