"""What there is to place workers on: nodes, their devices and memory. Values only."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import InvalidValueError
from cluster.machine import Machine, this_machine

MEMORY_SHARE = 0.8  # of what a machine has free, that workers may be given; the rest is for all else on it
LOAD_SHARE = 0.9  # of the same, that one worker loads weights into; what would go beyond, it refuses


@dataclass(frozen=True)
class Device:
    """What computes, and the memory beside it that workers on it share."""

    id: str  # "cpu", "cuda:0"; one of a kind on its node
    kind: Literal["cpu", "cuda"]
    memory_bytes: int  # that workers may use


@dataclass(frozen=True)
class Node:
    """One machine, or one share of a machine that is treated as one.

    What fails together has the same `failure_domain`: a node by itself, or the nodes of a rack or zone.
    """

    id: str
    failure_domain: str
    host_memory_bytes: int
    devices: tuple[Device, ...]
    num_cores: int = 0  # of its machine, that workers may use; 0: not known
    machine: str = ""  # its name, where nodes share one and its cores; "": the node is a machine by itself

    @property
    def compute_devices(self) -> tuple[Device, ...]:
        """Those that workers are placed on: its GPUs, or without any its processor."""
        gpus = tuple(device for device in self.devices if device.kind == "cuda")
        return gpus or self.devices


@dataclass(frozen=True)
class Topology:
    """Raises `InvalidValueError` for names used twice and sizes below zero."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        _no_twins("node", [node.id for node in self.nodes])
        for node in self.nodes:
            _no_twins(f"device of node {node.id}", [device.id for device in node.devices])
            for what, size in [("host", node.host_memory_bytes), *((d.id, d.memory_bytes) for d in node.devices)]:
                if size < 0:
                    raise InvalidValueError(f"node {node.id}: {what} memory is {size} bytes", param="memory_bytes")


def local_topology(num_nodes: int = 1, machine: Machine | None = None) -> Topology:
    """This machine's processor as one node, or as several that share its free memory evenly.

    Each such node is a failure domain: what is tried on one machine is the loss of processes.
    """
    if num_nodes < 1:
        raise InvalidValueError(f"num_nodes must be at least 1, not {num_nodes}", param="num_nodes")
    machine = machine or this_machine()
    memory_bytes = int(machine.available_bytes * MEMORY_SHARE) // num_nodes
    host = platform.node() or "localhost"
    names = [host] if num_nodes == 1 else [f"{host}-{i}" for i in range(num_nodes)]
    devices = (Device("cpu", "cpu", memory_bytes),)
    return Topology(tuple(Node(name, name, memory_bytes, devices, machine.num_usable_cores, host) for name in names))


def _no_twins(what: str, names: Sequence[str]) -> None:
    twins = {name for name in names if names.count(name) > 1}
    if twins:
        raise InvalidValueError(f"more than one {what} is called {min(twins)}", param="nodes")
