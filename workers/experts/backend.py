"""Who computes the routed experts. Local, remote and mixed backends have one face: begin, then finish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from workers.kernels.moe_experts import moe_experts
from workers.models.weights import ExpertWeights
from workers.numerics import Numerics


class Pending:
    """What `begin` started and `finish` ends; each backend has its own kind, and looks into no other."""

    __slots__ = ()


class ExpertBackend(Protocol):
    """`begin` may already compute; what is independent of the experts runs between the two."""

    def begin(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> Pending: ...

    def finish(self, pending: Pending) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class LocalPending(Pending):
    """Nothing is left to do."""

    output: torch.Tensor  # [T, H]


class LocalExperts:
    """All experts lie on this worker's device."""

    def __init__(self, layers: Sequence[ExpertWeights | None], numerics: Numerics) -> None:
        """`layers[l]` are the experts of layer l, None where it is dense."""
        self._layers = layers
        self._numerics = numerics

    def begin(
        self, layer: int, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> LocalPending:
        """hidden [T, H], topk_ids [T, k] int64, topk_weights [T, k] float32."""
        weights = self._layers[layer]
        assert weights is not None, f"layer {layer} has no experts"
        output = moe_experts(hidden, topk_ids, topk_weights, weights.gate_up, weights.down, self._numerics)
        return LocalPending(output)

    def finish(self, pending: Pending) -> torch.Tensor:
        assert isinstance(pending, LocalPending)
        return pending.output
