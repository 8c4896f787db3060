"""What checkpoints call their tensors, as a map onto the parts of the fused weights that they fill."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from workers.models.spec import ModelSpec
from workers.models.weights import AttentionWeights, DenseWeights, ExpertWeights, ModelWeights, MoEWeights

# Old checkpoints carry this buffer; it follows from config.json.
DERIVED_SUFFIX = ".rotary_emb.inv_freq"

Part = tuple[str, torch.Tensor]  # a checkpoint's name, and the contiguous part of the weights that it fills


@dataclass(frozen=True)
class MoENames:
    """Names of a routed block below `model.layers.<i>.`; `{expert}` stands for an expert's index.

    `gate`, `up` and `down` are one tensor an expert, as on the hub; `fused_gate_up` [E, 2I, H] and `fused_down`
    [E, H, I] hold all of them, as transformers 5 has them in memory.
    """

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"
    fused_gate_up: str = "mlp.experts.gate_up_proj"
    fused_down: str = "mlp.experts.down_proj"
    shared: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate.weight"


def weight_parts(
    spec: ModelSpec, weights: ModelWeights, layouts: Sequence[MoENames], available: Collection[str]
) -> Iterator[Part]:
    """Each tensor that a checkpoint must have for these weights, and where it goes.

    `layouts` are the families' namings of a routed block; the one whose names are `available` is taken.
    """
    embedding = "model.embed_tokens.weight"
    if spec.tie_embeddings and embedding not in available and "lm_head.weight" in available:
        embedding = "lm_head.weight"
    yield embedding, weights.embedding
    for index, layer in enumerate(weights.layers):
        prefix = _prefix(index)
        yield f"{prefix}input_layernorm.weight", layer.attention.norm
        yield from _attention(f"{prefix}self_attn.", layer.attention, spec)
        yield f"{prefix}post_attention_layernorm.weight", layer.mlp_norm
        if isinstance(layer.mlp, MoEWeights):
            yield from _moe(prefix, layer.mlp, layouts, available)
        else:
            yield from _dense(f"{prefix}mlp", layer.mlp)
    yield "model.norm.weight", weights.norm
    if not spec.tie_embeddings:
        yield "lm_head.weight", weights.lm_head


def _attention(prefix: str, weights: AttentionWeights, spec: ModelSpec) -> Iterator[Part]:
    widths = [spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim]
    for name, part in zip("qkv", weights.qkv.split(widths), strict=True):
        yield f"{prefix}{name}_proj.weight", part
    if weights.qkv_bias is not None:
        for name, part in zip("qkv", weights.qkv_bias.split(widths), strict=True):
            yield f"{prefix}{name}_proj.bias", part
    if weights.q_norm is not None and weights.k_norm is not None:
        yield f"{prefix}q_norm.weight", weights.q_norm
        yield f"{prefix}k_norm.weight", weights.k_norm
    yield f"{prefix}o_proj.weight", weights.out
    if weights.out_bias is not None:
        yield f"{prefix}o_proj.bias", weights.out_bias


def _dense(prefix: str, weights: DenseWeights) -> Iterator[Part]:
    gate, up = weights.gate_up.chunk(2)
    yield f"{prefix}.gate_proj.weight", gate
    yield f"{prefix}.up_proj.weight", up
    yield f"{prefix}.down_proj.weight", weights.down
    if weights.gate_up_bias is not None and weights.down_bias is not None:
        gate_bias, up_bias = weights.gate_up_bias.chunk(2)
        yield f"{prefix}.gate_proj.bias", gate_bias
        yield f"{prefix}.up_proj.bias", up_bias
        yield f"{prefix}.down_proj.bias", weights.down_bias


def _moe(prefix: str, weights: MoEWeights, layouts: Sequence[MoENames], available: Collection[str]) -> Iterator[Part]:
    names = _layout(prefix, layouts, available)
    yield prefix + names.router, weights.router
    if (experts := weights.experts) is not None:
        if prefix + names.fused_gate_up in available:
            yield prefix + names.fused_gate_up, experts.gate_up
            yield prefix + names.fused_down, experts.down
        else:
            for expert in range(experts.gate_up.shape[0]):
                yield from _expert(prefix, names, expert, experts, expert)
    if weights.shared is not None and weights.shared_gate is not None:
        yield from _dense(prefix + names.shared, weights.shared)
        yield prefix + names.shared_gate, weights.shared_gate


def expert_parts(
    layer: int, expert_ids: Sequence[int], weights: ExpertWeights, layouts: Sequence[MoENames],
    available: Collection[str],
) -> Iterator[tuple[str, int | None, torch.Tensor]]:  # fmt: skip
    """The tensors of some experts of a layer, `weights` being theirs in this order: the name, the row of its first
    dimension that is meant (None: all of it), and where it goes.
    """
    prefix = _prefix(layer)
    names = _layout(prefix, layouts, available)
    is_fused = prefix + names.fused_gate_up in available
    for place, expert in enumerate(expert_ids):
        if is_fused:
            yield prefix + names.fused_gate_up, expert, weights.gate_up[place]
            yield prefix + names.fused_down, expert, weights.down[place]
        else:
            for name, part in _expert(prefix, names, expert, weights, place):
                yield name, None, part


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _layout(prefix: str, layouts: Sequence[MoENames], available: Collection[str]) -> MoENames:
    return next((layout for layout in layouts if prefix + layout.router in available), layouts[0])


def _expert(prefix: str, names: MoENames, expert: int, weights: ExpertWeights, place: int) -> Iterator[Part]:
    gate, up = weights.gate_up[place].chunk(2)
    yield prefix + names.gate.format(expert=expert), gate
    yield prefix + names.up.format(expert=expert), up
    yield prefix + names.down.format(expert=expert), weights.down[place]
