"""`moe_combine`: a token's expert outputs, weighted and added."""

from __future__ import annotations

import torch

from workers.numerics import Numerics


def moe_combine(by_choice: torch.Tensor, topk_weights: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """by_choice [T, k, H], topk_weights [T, k] -> their weighted sum [T, H], added in top-k order."""
    if numerics.native is not None:
        return numerics.native.moe_combine(by_choice, topk_weights)
    weights = topk_weights.to(by_choice.dtype)
    total = by_choice[:, 0] * weights[:, :1]
    for choice in range(1, by_choice.shape[1]):
        total += by_choice[:, choice] * weights[:, choice : choice + 1]
    return total
