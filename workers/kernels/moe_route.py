"""`moe_route`: a router's logits -> each token's experts and their weights."""

from __future__ import annotations

import torch

from workers.numerics import Numerics


def moe_route(
    logits: torch.Tensor, top_k: int, norm_topk_prob: bool, numerics: Numerics
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> (topk_ids [T, k] int64, best first; topk_weights [T, k] float32).

    Weights are the softmax over all experts, in float32; with `norm_topk_prob` the k of them sum to one.
    """
    if numerics.native is not None:
        return numerics.native.moe_route(logits, top_k, norm_topk_prob)
    topk_weights, topk_ids = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return topk_ids, topk_weights
