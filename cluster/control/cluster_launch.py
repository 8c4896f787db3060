"""A cluster's workers from its settings: what the model asks for, and each worker's `Launch`."""

from __future__ import annotations

import msgspec

from cluster.config import Settings
from cluster.control.launch import launch_message
from cluster.control.model import Model
from cluster.control.placement import Demand, PlacedWorker, Placement
from cluster.control.topology import MEMORY_SHARE, Topology
from cluster.machine import Machine
from cluster.protocol import Launch, ModelShape, Role
from cluster.silence import HEARTBEATS

WORKING_BYTES = 512 * 2**20  # an attention worker's program, activations and logits


def demand_for(settings: Settings, shape: ModelShape) -> Demand:
    """What is placed. Without measured loads every expert counts alike."""
    is_dense = shape.num_experts == 0
    return Demand(
        load=() if is_dense else ((1.0,) * shape.num_experts,) * len(shape.moe_layers),
        expert_bytes=max(1, shape.expert_bytes),
        num_expert_workers=0 if is_dense else settings.expert_workers,
        num_attention_workers=settings.attention_workers,
        attention_bytes=shape.dense_bytes + WORKING_BYTES,
        kv_bytes=_kv_bytes(settings, shape, 1) if settings.kv_cache_bytes is None else int(settings.kv_cache_bytes),
        max_copies=settings.expert_copies,
    )


def most_kv_bytes(settings: Settings, shape: ModelShape) -> int:
    """The KV room that an attention worker can make use of: every sequence at full length, or what the settings say."""
    if settings.kv_cache_bytes is not None:
        return int(settings.kv_cache_bytes)
    return _kv_bytes(settings, shape, settings.max_num_seqs)


def _kv_bytes(settings: Settings, shape: ModelShape, num_seqs: int) -> int:
    num_pages = -(-(settings.max_model_len or shape.max_model_len) // settings.page_size)
    return num_seqs * num_pages * settings.page_size * shape.kv_token_bytes


def cluster_launch(
    settings: Settings, model: Model, worker: PlacedWorker, placement: Placement, topology: Topology, machine: Machine
) -> Launch:
    """A placed worker's options; where it listens is for its node to say."""
    room = {(node.id, device.id): device.memory_bytes for node in topology.nodes for device in node.devices}
    base = member_launch(
        settings, model, machine, role=worker.role, name=worker.id, node_id=worker.node_id, address="127.0.0.1:0"
    )
    return msgspec.structs.replace(
        base,
        device=worker.device_id if settings.device == "auto" else settings.device,
        # The device's, not the worker's part: that it keeps to its part is seen to by what it is told to hold.
        host_memory_bytes=int(room.get(worker.place, worker.memory_bytes) / MEMORY_SHARE),
        kv_cache_bytes=worker.kv_bytes if worker.role == "attention" else None,
        num_threads=num_threads(settings, worker, placement, topology, machine),
        exit_with_parent=False,
        orphan_timeout_s=settings.orphan_timeout_s,
    )


def member_launch(
    settings: Settings, model: Model, machine: Machine, *, role: Role, name: str, node_id: str, address: str
) -> Launch:
    """The options of a worker of a cluster, whoever starts it, on the machine that it starts on."""
    base = launch_message(
        settings, address=address, model_path=model.path, served_name=model.name, progress=False, machine=machine
    )
    return msgspec.structs.replace(
        base,
        role=role,
        name=name,
        node_id=node_id,
        token=settings.token.get_secret_value() if settings.token is not None else None,
        heartbeat_s=settings.lease_s / HEARTBEATS,
        peer_timeout_s=settings.peer_timeout_s,
        reroute_timeout_s=settings.reroute_timeout_s,
    )


def num_threads(
    settings: Settings, worker: PlacedWorker, placement: Placement, topology: Topology, machine: Machine
) -> int | None:
    """An even part of the cores of the worker's machine, which nodes may share; None where its cores are not known."""
    if settings.num_threads is not None:
        return settings.num_threads
    if settings.local is not None:  # all nodes are this machine
        return max(1, machine.num_usable_cores // len(placement.workers))
    machines = {node.id: node.machine or node.id for node in topology.nodes}
    num_cores = {machines[node.id]: node.num_cores for node in topology.nodes}.get(machines[worker.node_id], 0)
    num_workers = sum(machines[other.node_id] == machines[worker.node_id] for other in placement.workers)
    return max(1, num_cores // num_workers) if num_cores else None
