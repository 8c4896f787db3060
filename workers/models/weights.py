"""A model's weights as the decoder reads them, whatever a checkpoint calls them.

Shapes: H hidden, V vocabulary, A = num_heads * head_dim, B = num_kv_heads * head_dim, I intermediate, E experts.
Linear weights are [out, in], as `torch.nn.functional.linear` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """All experts of one layer."""

    gate_up: torch.Tensor  # [E, 2I, H]
    down: torch.Tensor  # [E, H, I]


@dataclass(frozen=True, slots=True)
class MoEWeights:
    router: torch.Tensor  # [E, H]
    experts: ExpertWeights
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


def _lay_out(weight: torch.Tensor) -> torch.Tensor:
    """[..., out, in] -> the same values in the same memory, running [..., in, out]; at most a matrix more meanwhile."""
    for matrix in weight.view(-1, *weight.shape[-2:]):
        matrix.view(-1).copy_(matrix.t().reshape(-1))
    return weight.view(*weight.shape[:-2], weight.shape[-1], weight.shape[-2]).transpose(-1, -2)


def lay_out(weights: ModelWeights) -> ModelWeights:
    """The same weights as the products on a CPU read them (see `workers.numerics`). Takes over `weights`' memory.

    A tied embedding stays one tensor: a lookup then gathers a column, which costs less than a second copy.
    """

    def dense(mlp: DenseWeights) -> DenseWeights:
        return replace(mlp, gate_up=_lay_out(mlp.gate_up), down=_lay_out(mlp.down))

    layers = []
    for layer in weights.layers:
        attention = replace(layer.attention, qkv=_lay_out(layer.attention.qkv), out=_lay_out(layer.attention.out))
        mlp = layer.mlp
        if isinstance(mlp, MoEWeights):
            experts = ExpertWeights(_lay_out(mlp.experts.gate_up), _lay_out(mlp.experts.down))
            mlp = replace(
                mlp,
                router=_lay_out(mlp.router),
                experts=experts,
                shared=None if mlp.shared is None else dense(mlp.shared),
                shared_gate=None if mlp.shared_gate is None else _lay_out(mlp.shared_gate),
            )
        else:
            mlp = dense(mlp)
        layers.append(replace(layer, attention=attention, mlp=mlp))
    tied = weights.lm_head.data_ptr() == weights.embedding.data_ptr()
    lm_head = _lay_out(weights.lm_head)
    return replace(weights, layers=tuple(layers), lm_head=lm_head, embedding=lm_head if tied else weights.embedding)
