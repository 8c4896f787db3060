"""Experts on other workers: rows go out by owner, outputs come back unweighted, and are added where the tokens are.

An expert worker returns each (token, choice) row by itself. The attention worker adds them in top-k order, as it does
with its own: who computed a row changes no bit of the sum (numerics class `invariant`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from cluster.errors import PeerLostError
from workers.experts.backend import Pending
from workers.experts.exchange import PeerLink, TensorSpec
from workers.kernels.moe_combine import moe_combine
from workers.kernels.moe_experts import moe_experts
from workers.models.weights import ExpertWeights
from workers.numerics import Numerics

STOP_LAYER = -1  # in a header: no more calls
IDLE_S = 3600.0  # an expert worker waits so long for a call; its link breaks at once when its peer dies


@dataclass(frozen=True)
class Shard:
    """The experts that one worker owns, of each layer: their ids, ascending, and their weights in that order."""

    expert_ids: Sequence[tuple[int, ...]]  # by layer; empty where it owns none
    weights: Sequence[ExpertWeights | None]

    def places(self, layer: int, num_experts: int) -> torch.Tensor:
        """[E] int64: an expert's place among the shard's own, -1 for others."""
        places = torch.full((num_experts,), -1, dtype=torch.int64)
        ids = torch.tensor(self.expert_ids[layer], dtype=torch.int64)
        places[ids] = torch.arange(len(ids))
        return places


def take_shard(layers: Sequence[ExpertWeights | None], expert_ids: Sequence[tuple[int, ...]]) -> Shard:
    """A copy of the named experts of each layer, laid out as the whole is."""

    def part(weight: torch.Tensor, ids: tuple[int, ...]) -> torch.Tensor:
        return weight.transpose(1, 2)[list(ids)].transpose(1, 2)

    weights = [
        None if layer is None or not ids else ExpertWeights(part(layer.gate_up, ids), part(layer.down, ids))
        for layer, ids in zip(layers, expert_ids, strict=True)
    ]
    return Shard(expert_ids, weights)


def expert_rows(weights: ExpertWeights, rows: torch.Tensor, places: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """rows [n, H] through the experts at `places` [n] of `weights`, unweighted -> [n, H]."""
    ones = torch.ones(rows.shape[0], 1)
    return moe_experts(rows, places.unsqueeze(1), ones, weights.gate_up, weights.down, numerics)


class MixedExperts:
    """Some experts here, the others behind links. `begin` sends and computes its own; `finish` waits for the rest."""

    def __init__(
        self,
        shard: Shard,
        links: Sequence[PeerLink],
        owners: Sequence[torch.Tensor],
        numerics: Numerics,
        deadline_s: float,
    ) -> None:
        """`owners[layer]` [E] int64: which of `links` has an expert, -1 for this worker."""
        self._shard = shard
        self._links = links
        self._owners = owners
        self._places = [shard.places(layer, owner.shape[0]) for layer, owner in enumerate(owners)]
        self._numerics = numerics
        self._deadline_s = deadline_s

    def begin(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> RemotePending:
        """hidden [T, H], topk_ids [T, k] int64, topk_weights [T, k] float32. Raises `PeerLostError`."""
        num_tokens, top_k = topk_ids.shape
        flat_ids = topk_ids.reshape(-1)
        owners = self._owners[layer][flat_ids]
        asked: dict[int, torch.Tensor] = {}
        for index, link in enumerate(self._links):
            rows = (owners == index).nonzero().squeeze(1)
            if rows.numel():
                asked[index] = rows
                header = torch.tensor([layer, rows.shape[0]])
                link.send([header, flat_ids[rows], hidden[rows // top_k]], self._deadline_s)
        by_choice = hidden.new_empty(num_tokens * top_k, hidden.shape[1])
        own = (owners < 0).nonzero().squeeze(1)
        weights = self._shard.weights[layer]
        if own.numel():
            assert weights is not None, f"layer {layer} has no experts here"
            places = self._places[layer][flat_ids[own]]
            by_choice[own] = expert_rows(weights, hidden[own // top_k], places, self._numerics)
        return RemotePending(by_choice, layer, topk_weights, asked)

    def finish(self, pending: Pending) -> torch.Tensor:
        """-> [T, H]. Raises `PeerLostError` where a peer died or is late."""
        assert isinstance(pending, RemotePending)
        for index, rows in pending.asked.items():
            spec = TensorSpec((rows.shape[0], pending.output.shape[1]), pending.output.dtype)
            (pending.output[rows],) = self._links[index].recv([spec], self._deadline_s)
        num_tokens, top_k = pending.topk_weights.shape
        return moe_combine(pending.output.view(num_tokens, top_k, -1), pending.topk_weights, self._numerics)

    def close(self) -> None:
        """Tell every peer that no more calls come."""
        for link in self._links:
            try:
                link.send([torch.tensor([STOP_LAYER, 0])], self._deadline_s)
            except PeerLostError:
                continue  # it is gone already
            link.close()


@dataclass(frozen=True, slots=True)
class RemotePending(Pending):
    """What is on its way: `output` holds a row for each (token, choice)."""

    layer: int
    topk_weights: torch.Tensor  # [T, k]
    asked: Mapping[int, torch.Tensor]  # link -> the rows that it computes


def serve_experts(shard: Shard, link: PeerLink, num_experts: int, hidden_size: int, numerics: Numerics) -> None:
    """An expert worker's loop for one attention worker, until that one says stop. Raises `PeerLostError`."""
    places = [shard.places(layer, num_experts) for layer in range(len(shard.weights))]
    while True:
        (header,) = link.recv([TensorSpec((2,), torch.int64)], IDLE_S)
        layer, num_rows = header.tolist()
        if layer == STOP_LAYER:
            return
        specs = [TensorSpec((num_rows,), torch.int64), TensorSpec((num_rows, hidden_size))]
        expert_ids, rows = link.recv(specs, IDLE_S)
        weights = shard.weights[layer]
        assert weights is not None, f"layer {layer} was asked for and has no experts here"
        link.send([expert_rows(weights, rows, places[layer][expert_ids], numerics)], IDLE_S)
