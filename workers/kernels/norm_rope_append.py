"""`norm_rope_append`: the q/k norms, the rotary embedding and the write into the KV cache, after the qkv product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workers.numerics import Numerics


def norm_rope_append(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_slots: torch.Tensor,
    num_heads: int,
    clip: float | None,
    numerics: Numerics,
) -> torch.Tensor:
    """Normalise and rotate q and k, append k and v to the cache, return q.

    qkv [T, (num_heads + 2 num_kv_heads) * head_dim]; q_norm and k_norm [head_dim] (each head by itself) or as wide
    as all of q or k (OLMoE), or None; cos and sin [T, 1, head_dim], sin negated in its first half;
    k_cache [num_pages, num_kv_heads, head_dim, page_size], v_cache [num_pages, num_kv_heads, page_size, head_dim];
    kv_slots [T] int64 is page * page_size + offset; `clip` clamps q, k and v after the norms (OLMoE).
    -> q [T, num_heads, head_dim]. Rotation is the half-split form (RoFormer, arXiv:2104.09864, as in GPT-NeoX).
    """
    if numerics.native is not None:
        return numerics.native.norm_rope_append(
            qkv, q_norm, k_norm, eps, cos, sin, k_cache, v_cache, kv_slots, num_heads, clip
        )
    page_size, head_dim = v_cache.shape[-2:]
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, -1, head_dim)
    num_kv_heads = (heads.shape[1] - num_heads) // 2
    rotated = heads[:, : num_heads + num_kv_heads]
    if q_norm is not None and k_norm is not None:
        if q_norm.shape[0] == head_dim:
            weight = torch.cat((q_norm.expand(num_heads, -1), k_norm.expand(num_kv_heads, -1)))
            rotated = F.rms_norm(rotated, (head_dim,), None, eps).mul_(weight)
        else:
            q = F.rms_norm(rotated[:, :num_heads].reshape(num_tokens, -1), (q_norm.shape[0],), q_norm, eps)
            k = F.rms_norm(rotated[:, num_heads:].reshape(num_tokens, -1), (k_norm.shape[0],), k_norm, eps)
            rotated = torch.cat((q, k), dim=-1).view(num_tokens, -1, head_dim)
    if clip is not None:
        rotated = rotated.clamp(-clip, clip)
        heads = heads.clamp(-clip, clip)
    # Two roundings, not a fused one: `addcmul` contracts or not by where a vector ends, hence by the batch.
    rotated = (rotated * cos).add_(rotated.roll(head_dim // 2, dims=-1).mul_(sin))
    pages, offsets = kv_slots // page_size, kv_slots % page_size
    k_cache.permute(0, 3, 1, 2)[pages, offsets] = rotated[:, num_heads:]
    v_cache.permute(0, 2, 1, 3)[pages, offsets] = heads[:, num_heads + num_kv_heads :]
    return rotated[:, :num_heads]
