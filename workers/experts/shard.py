"""A worker's share of the experts: which they are, of each layer, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.errors import ConfigError
from workers.kernels.moe_experts import moe_experts
from workers.models.weights import ExpertWeights
from workers.numerics import Numerics

ExpertIds = tuple[tuple[int, ...], ...]  # by layer of the model: ids, ascending; empty for dense layers


@dataclass(frozen=True)
class Shard:
    """The experts that one worker owns, of each layer: their ids, ascending, and their weights in that order."""

    expert_ids: ExpertIds
    weights: Sequence[ExpertWeights | None]  # None where it owns none

    def places(self, layer: int, num_experts: int) -> torch.Tensor:
        """[E] int64: an expert's place among the shard's own, -1 for others."""
        places = torch.full((num_experts,), -1, dtype=torch.int64)
        ids = torch.tensor(self.expert_ids[layer], dtype=torch.int64)
        places[ids] = torch.arange(len(ids))
        return places


def check_expert_ids(expert_ids: Sequence[Sequence[int]], num_experts: Sequence[int]) -> None:
    """Raise `ConfigError` unless the ids, by layer, are ascending experts of a model with `num_experts` by layer."""
    if len(expert_ids) != len(num_experts):
        raise ConfigError(
            f"experts of {len(expert_ids)} layers were named, and the model has {len(num_experts)}", param="experts"
        )
    for layer, (ids, count) in enumerate(zip(expert_ids, num_experts, strict=True)):
        if list(ids) != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < count):
            known = f"0..{count - 1}" if count else "none: it is dense"
            raise ConfigError(
                f"experts {list(ids)} of layer {layer} must be ascending, without repeats, among its own ({known})",
                param="experts",
            )


def expert_rows(weights: ExpertWeights, rows: torch.Tensor, places: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """rows [n, H] through the experts at `places` [n] of `weights`, unweighted -> [n, H].

    An expert's bits do not depend on its place, nor on what lies beside it.
    """
    ones = torch.ones(rows.shape[0], 1, device=rows.device)
    return moe_experts(rows, places.unsqueeze(1), ones, weights.gate_up, weights.down, numerics)
