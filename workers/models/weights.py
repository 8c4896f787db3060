"""A model's weights as the decoder reads them, whatever a checkpoint calls them.

Shapes: H hidden, V vocabulary, A = num_heads * head_dim, B = num_kv_heads * head_dim, I intermediate, E experts.
Linear weights are [out, in], as `torch.nn.functional.linear` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [A + 2B, H]
    qkv_bias: torch.Tensor | None  # [A + 2B]
    q_norm: torch.Tensor | None  # [head_dim] or, over all heads, [A]
    k_norm: torch.Tensor | None  # [head_dim] or, over all heads, [B]
    out: torch.Tensor  # [H, A]
    out_bias: torch.Tensor | None  # [H]


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """SwiGLU: down(silu(gate x) * up x); gate and up lie behind each other."""

    gate_up: torch.Tensor  # [2I, H]
    gate_up_bias: torch.Tensor | None  # [2I]
    down: torch.Tensor  # [H, I]
    down_bias: torch.Tensor | None  # [H]


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Experts of one layer: all of them, or those of a shard."""

    gate_up: torch.Tensor  # [E, 2I, H]
    down: torch.Tensor  # [E, H, I]


@dataclass(frozen=True, slots=True)
class MoEWeights:
    router: torch.Tensor  # [E, H]
    experts: ExpertWeights | None  # None: they are on other workers
    shared: DenseWeights | None
    shared_gate: torch.Tensor | None  # [1, H]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention: AttentionWeights
    mlp_norm: torch.Tensor  # [H]
    mlp: DenseWeights | MoEWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: torch.Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [H]
    lm_head: torch.Tensor  # [V, H]; the embedding itself where they are tied
