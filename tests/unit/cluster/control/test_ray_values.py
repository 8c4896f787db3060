from __future__ import annotations

import pytest

from cluster.control.launch import PACKAGES
from cluster.control.ray_actor import for_workers
from cluster.control.ray_launcher import RayNode, bridge_environment, to_node
from cluster.control.topology import MEMORY_SHARE

GIB = 2**30


def test_a_nodes_gpus_are_what_is_placed_on() -> None:
    node = to_node(RayNode(name="n", machine="10.0.0.1", num_cores=8, memory_bytes=64 * GIB, gpu_bytes=(80 * GIB,) * 2))
    assert [device.id for device in node.compute_devices] == ["cuda:0", "cuda:1"]
    assert node.compute_devices[0].memory_bytes == int(80 * GIB * MEMORY_SHARE)
    assert (node.failure_domain, node.num_cores, node.machine) == ("n", 8, "10.0.0.1")


def test_a_node_without_gpus_is_its_processor() -> None:
    node = to_node(RayNode(name="n", machine="m", num_cores=8, memory_bytes=10 * GIB))
    (device,) = node.compute_devices
    assert (device.id, device.memory_bytes) == ("cpu", int(10 * GIB * MEMORY_SHARE))


def test_secrets_go_no_further_than_they_must() -> None:
    given = {"FORETOKEN_TOKEN": "t", "RAY_AUTH_TOKEN": "r", "OMP_NUM_THREADS": "1", "HOME": "/h"}
    assert for_workers(given) == {"HOME": "/h"}
    bridge = bridge_environment(given | {"PYTHONPATH": "/p"})
    assert "FORETOKEN_TOKEN" not in bridge
    assert bridge["RAY_AUTH_TOKEN"] == "r"
    assert bridge["PYTHONPATH"] == f"{PACKAGES}:/p"


@pytest.mark.needs("ray")
def test_a_worker_reserves_its_share_of_a_gpu() -> None:
    from cluster.control.ray_bridge import gpu_share

    assert gpu_share(20 * GIB, (80 * GIB, 40 * GIB), 0) == 0.25
    assert gpu_share(20 * GIB, (80 * GIB, 40 * GIB), 1) == 0.5
    assert gpu_share(100 * GIB, (80 * GIB,), 0) == 1.0
    assert gpu_share(1, (80 * GIB,), 0) == 0.0001  # Ray's least
    assert gpu_share(GIB, (), 3) == 1.0  # its size is not known
