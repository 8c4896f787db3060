from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cluster.config import load
from cluster.control.cluster_launch import cluster_launch, demand_for, most_kv_bytes, num_threads
from cluster.control.model import Model
from cluster.control.placement import PlacedWorker, Placement, place
from cluster.control.topology import MEMORY_SHARE, Device, Node, Topology
from cluster.machine import Machine
from cluster.protocol import ModelShape

MACHINE = Machine("Linux", "x86_64", "A processor", frozenset(), 8, None, 2**34, 2**33)
SHAPE = ModelShape(
    num_layers=4,
    moe_layers=(1, 3),
    num_experts=8,
    expert_bytes=1000,
    dense_bytes=5000,
    kv_token_bytes=10,
    max_model_len=100,
)
NODES = Topology(tuple(Node(name, name, 1000, (Device("cpu", "cpu", 800),)) for name in ("a", "b")))
WORKERS = Placement(
    (
        PlacedWorker("attention", 0, "a", "cpu", 500, 100),
        PlacedWorker("attention", 1, "b", "cpu", 500, 100),
        PlacedWorker("expert", 0, "a", "cpu", 300),
    )
)


def test_demand_counts_moe_layers_only_and_room_for_one_sequence() -> None:
    demand = demand_for(load({"page_size": 64, "expert_copies": 2}), SHAPE)
    assert demand.num_experts == 16
    assert demand.kv_bytes == 128 * 10  # whole pages
    assert demand.max_copies == 2
    assert demand_for(load({"kv_cache_bytes": "1KiB"}), SHAPE).kv_bytes == 1024


def test_a_dense_model_needs_no_expert_workers() -> None:
    shape = msgspec.structs.replace(SHAPE, moe_layers=(), num_experts=0, expert_bytes=0)
    demand = demand_for(load({"expert_workers": 5}), shape)
    gib = 2**30
    nodes = Topology((Node("a", "a", 8 * gib, (Device("cpu", "cpu", 8 * gib),)),))
    assert [worker.id for worker in place(nodes, demand).workers] == ["attention-0", "attention-1"]


def test_kv_room_beyond_every_sequence_at_full_length_is_of_no_use() -> None:
    assert most_kv_bytes(load({"page_size": 64, "max_num_seqs": 3}), SHAPE) == 3 * 128 * 10
    assert most_kv_bytes(load({"page_size": 64, "max_num_seqs": 3, "max_model_len": 64}), SHAPE) == 3 * 64 * 10
    assert most_kv_bytes(load({"kv_cache_bytes": 99}), SHAPE) == 99


@pytest.mark.parametrize(
    ("settings", "nodes", "threads"),
    [
        ({}, NODES, None),
        ({"num_threads": 5}, NODES, 5),
        ({"local": 2}, NODES, 2),  # 8 cores here, three workers
        ({}, Topology(tuple(replace(node, num_cores=6) for node in NODES.nodes)), 3),
        ({}, Topology(tuple(replace(node, num_cores=6, machine="m") for node in NODES.nodes)), 2),
        ({}, Topology(tuple(replace(node, num_cores=1) for node in NODES.nodes)), 1),
    ],
)
def test_workers_of_a_machine_share_its_cores(
    settings: dict[str, object], nodes: Topology, threads: int | None
) -> None:
    assert num_threads(load(settings), WORKERS.workers[0], WORKERS, nodes, MACHINE) == threads


def test_a_launch_has_the_workers_place_and_no_more_than_its_node_has() -> None:
    settings = load({"lease_s": 2.0, "token": "secret", "orphan_timeout_s": 39})
    attention, _, expert = (
        cluster_launch(settings, Model("m", Path("/models/m")), worker, WORKERS, NODES, MACHINE)
        for worker in WORKERS.workers
    )
    assert (attention.role, attention.name, attention.node_id) == ("attention", "attention-0", "a")
    assert (attention.kv_cache_bytes, expert.kv_cache_bytes) == (100, None)
    assert (attention.device, attention.model_path, attention.served_name) == ("cpu", "/models/m", "m")
    assert expert.host_memory_bytes == int(800 / MEMORY_SHARE)
    assert (expert.token, expert.heartbeat_s, expert.orphan_timeout_s) == ("secret", 0.2, 39)
    assert not expert.exit_with_parent
