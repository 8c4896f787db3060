from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.control.topology import Device, Node, Topology, local_topology
from cluster.errors import InvalidValueError
from cluster.machine import Machine

MACHINE = Machine("Linux", "x86_64", "A processor", frozenset(), 8, None, 2**34, 10 * 2**30)
CPU = Device("cpu", "cpu", 2**30)


def _node(name: str, *devices: Device, host_memory_bytes: int = 2**30) -> Node:
    return Node(name, name, host_memory_bytes, devices or (CPU,))


def test_this_machine_is_one_node_whose_workers_leave_memory_to_others() -> None:
    (node,) = local_topology(machine=MACHINE).nodes
    (device,) = node.compute_devices
    assert device.kind == "cpu"
    assert device.memory_bytes == node.host_memory_bytes == int(0.8 * 10 * 2**30)


def test_several_local_nodes_share_the_memory_and_fail_apart() -> None:
    nodes = local_topology(3, MACHINE).nodes
    assert len({node.id for node in nodes}) == len({node.failure_domain for node in nodes}) == 3
    total = sum(device.memory_bytes for node in nodes for device in node.devices)
    assert 0.8 * 10 * 2**30 - 3 <= total <= 0.8 * 10 * 2**30


def test_the_real_machine_has_room() -> None:
    (node,) = local_topology().nodes
    assert node.devices[0].memory_bytes > 0


def test_workers_are_placed_on_gpus_where_there_are_any() -> None:
    gpus = (Device("cuda:0", "cuda", 2**34), Device("cuda:1", "cuda", 2**34))
    assert _node("a", CPU, *gpus).compute_devices == gpus
    assert _node("a").compute_devices == (CPU,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Topology((_node("a"), _node("a"))), "more than one node is called a"),
        (lambda: Topology((_node("a", CPU, CPU),)), "more than one device of node a is called cpu"),
        (lambda: Topology((_node("a", host_memory_bytes=-1),)), "node a: host memory is -1 bytes"),
        (lambda: Topology((_node("a", Device("cpu", "cpu", -1)),)), "node a: cpu memory is -1 bytes"),
        (lambda: local_topology(0, MACHINE), "num_nodes must be at least 1"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(make: Callable[[], Topology], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        make()
