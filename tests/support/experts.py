"""Experts of random models: hosts of a part of them, links within one process, and routes that say who has what."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from cluster.errors import PeerLostError
from cluster.protocol import Peer, Route
from workers.experts.exchange import PeerLink
from workers.experts.frame import TensorSpec
from workers.experts.host import ExpertHost
from workers.experts.shard import ExpertIds, Shard
from workers.models.spec import ModelSpec
from workers.models.weights import ExpertWeights, ModelWeights, MoEWeights
from workers.numerics import Numerics

LIMIT_BYTES = 1 << 40


def experts_of(weights: ModelWeights) -> list[ExpertWeights | None]:
    return [layer.mlp.experts if isinstance(layer.mlp, MoEWeights) else None for layer in weights.layers]


def in_moe_layers(spec: ModelSpec, ids: Sequence[int]) -> ExpertIds:
    return tuple(tuple(ids) if count else () for count in spec.num_experts)


def take_shard(layers: Sequence[ExpertWeights | None], expert_ids: ExpertIds) -> Shard:
    """A copy of the named experts of each layer, laid out as the whole is."""

    def part(weight: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
        return weight.transpose(1, 2)[list(ids)].transpose(1, 2)

    weights = [
        None if layer is None or not ids else ExpertWeights(part(layer.gate_up, ids), part(layer.down, ids))
        for layer, ids in zip(layers, expert_ids, strict=True)
    ]
    return Shard(expert_ids, weights)


def make_host(spec: ModelSpec, weights: ModelWeights, numerics: Numerics, ids: Sequence[int] = ()) -> ExpertHost:
    """A host that loads out of `weights`, with the experts `ids` of each layer."""
    host = ExpertHost(lambda wanted, _: take_shard(experts_of(weights), wanted), spec, numerics, LIMIT_BYTES)
    host.assign(in_moe_layers(spec, ids))
    return host


def make_route(version: int, spec: ModelSpec, held: Mapping[str, Sequence[int]]) -> Route:
    """`held`: the experts of each layer that a worker has, by its id; who comes first is preferred."""
    peers = tuple(Peer(name=f"expert-{place}", worker_id=worker, address="here") for place, worker in enumerate(held))
    owners = tuple(
        tuple(tuple(place for place, ids in enumerate(held.values()) if expert in ids) for expert in range(count))
        for count in spec.num_experts
    )
    return Route(version=version, peers=peers, owners=owners)


class PipeLink:
    """A `PeerLink` between two threads. `send` returns once the peer has taken it, as gloo's does."""

    def __init__(self, sending: queue.Queue[torch.Tensor | None], receiving: queue.Queue[torch.Tensor | None]) -> None:
        self._sending = sending
        self._receiving = receiving
        self.is_closed = False

    @classmethod
    def pair(cls) -> tuple[PipeLink, PipeLink]:
        there: queue.Queue[torch.Tensor | None] = queue.Queue()
        back: queue.Queue[torch.Tensor | None] = queue.Queue()
        return cls(there, back), cls(back, there)

    def send(self, tensors: Sequence[torch.Tensor], deadline_s: float) -> None:
        if self.is_closed:
            raise PeerLostError("the link is broken")
        for tensor in tensors:
            assert tensor.is_contiguous()
            self._sending.put(tensor)

    def recv(self, specs: Sequence[TensorSpec], deadline_s: float) -> list[torch.Tensor]:
        tensors = []
        for spec in specs:
            try:
                tensor = None if self.is_closed else self._receiving.get(timeout=deadline_s)
            except queue.Empty:
                tensor = None
            if tensor is None:
                self.close()
                raise PeerLostError("the link broke")
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), "the two are out of step"
            tensors.append(tensor)
        return tensors

    def close(self) -> None:
        self.is_closed = True
        self._sending.put(None)


def serve_in_thread(host: ExpertHost) -> PipeLink:
    """A link to a host that serves it on a thread of its own."""
    here, there = PipeLink.pair()

    def serve() -> None:
        try:
            host.serve(there)
        except PeerLostError:
            there.close()

    threading.Thread(target=serve, daemon=True).start()
    return here


class FaultyLink:
    """A link that breaks by itself: `fails(what, number)` is asked at each send and each recv, from 0 on."""

    def __init__(self, link: PeerLink, fails: Callable[[str, int], bool]) -> None:
        self._link = link
        self._fails = fails
        self._counts = {"send": 0, "recv": 0}

    def _count(self, what: str) -> None:
        number = self._counts[what]
        self._counts[what] += 1
        if self._fails(what, number):
            self._link.close()

    def send(self, tensors: Sequence[torch.Tensor], deadline_s: float) -> None:
        self._count("send")
        self._link.send(tensors, deadline_s)

    def recv(self, specs: Sequence[TensorSpec], deadline_s: float) -> list[torch.Tensor]:
        self._count("recv")
        return self._link.recv(specs, deadline_s)

    def close(self) -> None:
        self._link.close()
