"""`paged_attention`: grouped-query attention over paged K and V, exact, and independent of the batch.

Softmax is the two-pass form over tiles of one page (FlashAttention-2's partials, arXiv:2307.08691, with the maximum
known beforehand). A tile's product always has the same shape per head, tiles lie at absolute key positions, and their
partial sums are added as a binary tree over neighbours: a page that is masked or was added as padding gives exact
zeros, so the result of a row depends on its own keys alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workers.numerics import Numerics

if TYPE_CHECKING:
    from workers.attention.paged import AttentionGroup, AttentionPlan


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum x over dimension 1 by pairing neighbours: the order of additions does not depend on trailing zeros."""
    while (count := x.shape[1]) > 1:
        pairs = x[:, 0 : count - 1 : 2] + x[:, 1::2]
        x = torch.cat((pairs, x[:, -1:]), dim=1) if count % 2 else pairs
    return x.squeeze(1)


def _attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    group: AttentionGroup,
    bias: torch.Tensor,
) -> torch.Tensor:
    """q [N * Q, num_heads, head_dim], already scaled -> the same shape."""
    num_blocks = group.num_blocks
    num_queries, num_heads, head_dim = q.shape[0] // num_blocks, q.shape[1], q.shape[2]
    num_kv_heads, page_size = v_cache.shape[1], v_cache.shape[2]
    per_kv = num_heads // num_kv_heads
    num_pages = group.page_ids.shape[0] // num_blocks

    q = q.view(num_blocks, num_queries, num_kv_heads, per_kv, head_dim).transpose(1, 2)
    q = q.reshape(num_blocks, 1, num_kv_heads, num_queries * per_kv, head_dim)
    single = q.shape[3] == 1
    if single:  # a product of one row takes another kernel than one of many
        q = q.expand(-1, -1, -1, 2, -1)
    q = q.expand(-1, num_pages, -1, -1, -1)
    k = k_cache.index_select(0, group.page_ids).view(num_blocks, num_pages, num_kv_heads, head_dim, page_size)
    v = v_cache.index_select(0, group.page_ids).view(num_blocks, num_pages, num_kv_heads, page_size, head_dim)

    scores = torch.matmul(q, k)  # [N, P, kv heads, Q * per_kv, page_size]
    split = scores.view(num_blocks, num_pages, num_kv_heads, num_queries, -1, page_size)
    split += bias
    top = scores.amax(dim=-1, keepdim=True).amax(dim=1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = tree_sum(weights.sum(dim=-1, keepdim=True))
    out = tree_sum(torch.matmul(weights, v)).div_(total)
    if single:
        out = out[:, :, :1]
    out = out.view(num_blocks, num_kv_heads, num_queries, per_kv, head_dim).transpose(1, 2)
    return out.reshape(num_blocks * num_queries, num_heads, head_dim)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    window: int | None,
    scale: float,
    numerics: Numerics,
) -> torch.Tensor:
    """q [T, num_heads, head_dim], caches as in `KVCache` -> [T, num_heads, head_dim].

    `window` counts the keys that a query sees, itself included; None: all before it.
    """
    if numerics.native is not None:
        return numerics.native.paged_attention(q, k_cache, v_cache, plan.blocks, plan.page_ids, window, scale)
    q = q * scale
    if plan.in_order:
        group = plan.groups[0]
        return _attend(q, k_cache, v_cache, group, group.biases[window])
    out = torch.empty_like(q)
    for group in plan.groups:
        attended = _attend(q.index_select(0, group.query_rows), k_cache, v_cache, group, group.biases[window])
        out.index_copy_(0, group.query_rows, attended)
    return out
