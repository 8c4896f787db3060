"""A Qwen3-MoE written for fast training on a few CPU cores; its arithmetic is transformers' `Qwen3MoeForCausalLM`.

Three things make it fast there:
all experts of a layer run as three batched matrix products over rows padded to the busiest expert, the loss never
holds all logits at once, and everything between those two can be compiled into one region a layer.
Weights of all layers are stacked in one tensor a role, which lets the optimizer treat them in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """The architecture's sizes. Names follow Hugging Face's config where it has one."""

    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 64
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def to_config(self, end_of_text_id: int, turn_end_id: int, max_position_embeddings: int = 4096) -> dict[str, Any]:
        """The config.json of this shape."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **asdict(self),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "max_position_embeddings": max_position_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "use_cache": True,
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": turn_end_id,
            "pad_token_id": end_of_text_id,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Shape:
        """The shape a config.json describes."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


def initial_weights(shape: Shape, seed: int) -> Weights:
    """fp32 weights, seeded. What writes to the residual stream starts at zero, so each layer starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    layers, hidden, experts, inner = (
        shape.num_hidden_layers,
        shape.hidden_size,
        shape.num_experts,
        shape.moe_intermediate_size,
    )
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim

    def normal(*size: int, std: float) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * std

    wide = 0.6 / math.sqrt(hidden)
    return {
        "embed": normal(shape.vocab_size, hidden, std=0.02),
        "final_norm": torch.ones(hidden),
        "input_norm": torch.ones(layers, hidden),
        "post_norm": torch.ones(layers, hidden),
        "q_norm": torch.ones(layers, shape.head_dim),
        "k_norm": torch.ones(layers, shape.head_dim),
        "q": normal(layers, query, hidden, std=wide),
        "k": normal(layers, key, hidden, std=wide),
        "v": normal(layers, key, hidden, std=wide),
        "o": torch.zeros(layers, hidden, query),
        "router": normal(layers, experts, hidden, std=0.02),
        "gate_up": normal(layers, experts, 2 * inner, hidden, std=wide),
        "down": torch.zeros(layers, experts, hidden, inner),
    }


def rope_tables(shape: Shape, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, head_dim], the two halves equal, as Hugging Face lays them out."""
    inverse = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis, in fp32, as Qwen3 does it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding; x [batch, length, heads, head_dim], tables [length, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int = 256) -> torch.Tensor:
    """Grouped-query causal attention -> [batch, length, heads * head_dim].

    q [batch, length, heads, head_dim], k and v [batch, length, kv heads, head_dim]. The query heads of a group are
    stacked as rows, so keys are never repeated; blocks of queries skip the keys that come after all of them.
    """
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    queries = q.view(batch, length, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
    keys = k.permute(0, 2, 3, 1).reshape(batch * groups, width, length)
    values = v.transpose(1, 2).reshape(batch * groups, length, width)
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        rows = queries[:, :, :, start:stop].reshape(batch * groups, -1, width) * width**-0.5
        scores = torch.bmm(rows, keys[:, :, :stop]).view(batch * groups, heads // groups, stop - start, stop)
        ahead = torch.arange(stop)[None, :] > torch.arange(start, stop)[:, None]
        shares = torch.softmax(scores.float().masked_fill(ahead, float("-inf")), dim=-1).to(q.dtype)
        mixed = torch.bmm(shares.view(batch * groups, -1, stop), values[:, :stop])
        outputs.append(mixed.view(batch, groups, heads // groups, stop - start, width))
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4).reshape(batch, length, heads * width)


def activate(projected: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * scale [rows, inner] of projected [rows, 2 * inner] and a row's weight, scale [rows, 1]."""
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate) * up * scale


def activate_backward(
    projected: torch.Tensor, scale: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`activate` again, and the gradients of projected [rows, 2 * inner] and scale [rows], given that of its result."""
    gate, up = projected.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    grad_scale = (grad * activated * up).sum(-1)
    grad = grad * scale
    grad_gate = grad * up * (sigmoid + activated * (1 - sigmoid))
    return activated * up * scale, torch.cat((grad_gate, grad * activated), dim=-1), grad_scale


def loss_and_slope(logits: torch.Tensor, wanted: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of logits [rows, vocab] against wanted [rows, 1], and scale times its gradient."""
    logits = logits.float()
    log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
    hit = torch.arange(logits.shape[1]) == wanted
    slope = (torch.exp(logits - log_total) - hit.float()) * scale
    return (log_total - logits.gather(1, wanted)).sum(), slope


class RunExperts(torch.autograd.Function):
    """y [tokens, hidden] = sum over a token's experts of weight * down(silu(gate(x)) * up(x)).

    Inputs: x [tokens, hidden], weights and expert_ids [tokens, k], gate_up [experts, 2 * inner, hidden],
    down [experts, hidden, inner]. Rows are laid out by expert and padded to the busiest one. A padded row holds token 0
    with weight 0: it is computed and never read, and its zero weight keeps it out of every gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        parts: Parts,
    ) -> torch.Tensor:
        num_tokens, top_k = expert_ids.shape
        num_experts, hidden = gate_up.shape[0], x.shape[1]
        flat = expert_ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=num_experts)
        capacity = (
            -(-int(counts.max()) // 32) * 32
        )  # few distinct shapes: the matrix library compiles one kernel a shape
        sorted_ids = flat[order]
        starts = torch.cumsum(counts, 0) - counts
        slots_sorted = sorted_ids * capacity + torch.arange(flat.numel()) - starts[sorted_ids]
        slots = torch.empty_like(flat).index_copy_(0, order, slots_sorted).view(num_tokens, top_k)
        rows = torch.zeros(num_experts * capacity, dtype=torch.long).index_copy_(0, slots_sorted, order // top_k)
        scale = x.new_zeros(num_experts * capacity).index_copy_(0, slots_sorted, weights.reshape(-1)[order])[:, None]
        packed = x.index_select(0, rows).view(num_experts, capacity, hidden)
        projected = torch.bmm(packed, gate_up.transpose(1, 2)).flatten(0, 1)
        inner = parts.activate(projected, scale).view(num_experts, capacity, -1)
        out = torch.bmm(inner, down.transpose(1, 2)).flatten(0, 1)
        ctx.save_for_backward(packed, projected, rows, scale, slots, gate_up, down)
        ctx.parts = parts
        return F.embedding_bag(slots, out, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, projected, rows, scale, slots, gate_up, down = ctx.saved_tensors
        grad_out = grads[0].index_select(0, rows).view_as(packed)
        grad_inner = torch.bmm(grad_out, down)
        inner, grad_projected, grad_scale = ctx.parts.activate_backward(projected, scale, grad_inner.flatten(0, 1))
        grad_projected = grad_projected.view(*packed.shape[:2], -1)
        grad_down = torch.bmm(grad_out.transpose(1, 2), inner.view_as(grad_inner))
        grad_gate_up = torch.bmm(grad_projected.transpose(1, 2), packed)
        grad_x = F.embedding_bag(slots, torch.bmm(grad_projected, gate_up).flatten(0, 1), mode="sum")
        return grad_x, grad_scale[slots], None, grad_gate_up, grad_down, None


class NextTokenLoss(torch.autograd.Function):
    """Mean cross entropy (nats) of x @ embed.T against targets, a thousand rows at a time.

    x [tokens, hidden], embed [vocab, hidden], targets [tokens] -> scalar. The gradients are made in the forward, while
    the logits are still in the cache.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, embed: torch.Tensor, targets: torch.Tensor, parts: Parts, rows: int = 1024
    ) -> torch.Tensor:
        total = torch.zeros(())
        grad_x, grad_embed = torch.empty_like(x), torch.zeros(embed.shape)
        for start in range(0, x.shape[0], rows):
            part = x[start : start + rows]
            loss, slope = parts.loss_and_slope(part @ embed.t(), targets[start : start + rows, None], 1 / x.shape[0])
            total += loss
            slope = slope.to(x.dtype)
            grad_x[start : start + rows] = slope @ embed
            grad_embed += slope.t() @ part
        ctx.save_for_backward(grad_x, grad_embed.to(embed.dtype))
        return total / x.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_embed = ctx.saved_tensors
        return grad_x * grads[0].to(grad_x.dtype), grad_embed * grads[0].to(grad_embed.dtype), None, None, None


def layer_front(
    x: torch.Tensor,
    before: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    shape: Shape,
) -> tuple[torch.Tensor, ...]:
    """A layer up to its experts.

    x and before (the last layer's expert output, not yet added) [batch, length, hidden] -> x after attention, the
    experts' input [tokens, hidden], weights and ids [tokens, k], and two scalars: the load-balancing loss of
    Switch Transformers (1.0 when even) and the router's mean squared log-sum-exp (the z-loss of ST-MoE).
    """
    input_norm, post_norm, q_norm, k_norm, q_proj, k_proj, v_proj, o_proj, router = weights
    x = x + before
    batch, length, hidden = x.shape
    normed = rms_norm(x, input_norm, shape.rms_norm_eps)
    q = (normed @ q_proj.t()).view(batch, length, -1, shape.head_dim)
    k = (normed @ k_proj.t()).view(batch, length, -1, shape.head_dim)
    v = (normed @ v_proj.t()).view(batch, length, -1, shape.head_dim)
    q = rotate(rms_norm(q, q_norm, shape.rms_norm_eps), cos, sin)
    k = rotate(rms_norm(k, k_norm, shape.rms_norm_eps), cos, sin)
    x = x + causal_attention(q, k, v) @ o_proj.t()
    normed = rms_norm(x, post_norm, shape.rms_norm_eps).reshape(-1, hidden)
    logits = (normed @ router.t()).float()
    shares = torch.softmax(logits, dim=-1)
    top, expert_ids = torch.topk(shares, shape.num_experts_per_tok, dim=-1)
    top = (top / top.sum(-1, keepdim=True)).to(x.dtype)
    load = torch.zeros_like(shares).scatter_(1, expert_ids, 1.0).mean(0) / shape.num_experts_per_tok
    balance = shape.num_experts * (load.detach() * shares.mean(0)).sum()
    z_loss = torch.logsumexp(logits, dim=-1).square().mean()
    return x, normed, top, expert_ids, balance, z_loss, load.detach()


@dataclass(frozen=True)
class Parts:
    """The elementwise pieces between the matrix products, as they are or each compiled to one loop."""

    front: Callable[..., Any] = layer_front
    activate: Callable[..., Any] = activate
    activate_backward: Callable[..., Any] = activate_backward
    loss_and_slope: Callable[..., Any] = loss_and_slope

    @classmethod
    def compiled(cls) -> Parts:
        """Compiled parts: about 1.5 times as fast. Needs a C++ compiler and a minute for each window length."""
        return cls(
            torch.compile(layer_front, fullgraph=True, dynamic=False),
            torch.compile(activate, fullgraph=True, dynamic=True),
            torch.compile(activate_backward, fullgraph=True, dynamic=True),
            torch.compile(loss_and_slope, fullgraph=True, dynamic=False),
        )


PLAIN = Parts()


@dataclass
class Output:
    """loss in nats a token; balance and z_loss averaged over layers; load [layers, experts], each row sums to 1."""

    loss: torch.Tensor
    balance: torch.Tensor
    z_loss: torch.Tensor
    load: torch.Tensor


FRONT_KEYS = ("input_norm", "post_norm", "q_norm", "k_norm", "q", "k", "v", "o", "router")


def hidden_states(
    weights: Weights, tokens: torch.Tensor, shape: Shape, parts: Parts = PLAIN
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Final normed hidden states [batch, length, hidden] and each layer's (balance, z_loss, load)."""
    dtype = weights["embed"].dtype
    cos, sin = rope_tables(shape, tokens.shape[1], dtype)
    x = F.embedding(tokens, weights["embed"])
    before = torch.zeros_like(x)
    layers = {name: weights[name].unbind(0) for name in (*FRONT_KEYS, "gate_up", "down")}
    extras = []
    for index in range(shape.num_hidden_layers):
        own = tuple(layers[name][index] for name in FRONT_KEYS)
        x, normed, top, expert_ids, balance, z_loss, load = parts.front(x, before, cos, sin, own, shape)
        before = RunExperts.apply(
            normed, top, expert_ids, layers["gate_up"][index], layers["down"][index], parts
        ).view_as(x)
        extras.append((balance, z_loss, load))
    return rms_norm(x + before, weights["final_norm"], shape.rms_norm_eps), extras


def forward(weights: Weights, tokens: torch.Tensor, shape: Shape, parts: Parts = PLAIN) -> Output:
    """Loss of predicting tokens [batch, length + 1] from their predecessors."""
    hidden, extras = hidden_states(weights, tokens[:, :-1], shape, parts)
    loss = NextTokenLoss.apply(
        hidden.reshape(-1, shape.hidden_size), weights["embed"], tokens[:, 1:].reshape(-1), parts
    )
    balance, z_loss, load = (torch.stack(part) for part in zip(*extras, strict=True))
    return Output(loss, balance.mean(), z_loss.mean(), load)


def to_checkpoint(weights: Weights, shape: Shape) -> Weights:
    """Weights under Hugging Face's names, one tensor an expert and role, in bf16."""
    named = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["final_norm"]}
    for index in range(shape.num_hidden_layers):
        prefix = f"model.layers.{index}"
        named[f"{prefix}.input_layernorm.weight"] = weights["input_norm"][index]
        named[f"{prefix}.post_attention_layernorm.weight"] = weights["post_norm"][index]
        for name in ("q", "k", "v", "o"):
            named[f"{prefix}.self_attn.{name}_proj.weight"] = weights[name][index]
        for name in ("q_norm", "k_norm"):
            named[f"{prefix}.self_attn.{name}.weight"] = weights[name][index]
        named[f"{prefix}.mlp.gate.weight"] = weights["router"][index]
        for expert in range(shape.num_experts):
            gate, up = weights["gate_up"][index, expert].chunk(2)
            for name, tensor in (("gate", gate), ("up", up), ("down", weights["down"][index, expert])):
                named[f"{prefix}.mlp.experts.{expert}.{name}_proj.weight"] = tensor
    return {name: tensor.detach().to(torch.bfloat16).contiguous().clone() for name, tensor in named.items()}


def from_checkpoint(named: Weights, shape: Shape) -> Weights:
    """The inverse of `to_checkpoint`, in the checkpoint's dtype. Raises KeyError naming a missing tensor."""
    layers = range(shape.num_hidden_layers)

    def stack(name: str) -> torch.Tensor:
        return torch.stack([named[f"model.layers.{index}.{name}.weight"] for index in layers])

    def experts(name: str) -> torch.Tensor:
        return torch.stack(
            [
                torch.stack(
                    [
                        named[f"model.layers.{index}.mlp.experts.{expert}.{name}_proj.weight"]
                        for expert in range(shape.num_experts)
                    ]
                )
                for index in layers
            ]
        )

    return {
        "embed": named["model.embed_tokens.weight"],
        "final_norm": named["model.norm.weight"],
        "input_norm": stack("input_layernorm"),
        "post_norm": stack("post_attention_layernorm"),
        **{name: stack(f"self_attn.{name}_proj") for name in ("q", "k", "v", "o")},
        **{name: stack(f"self_attn.{name}") for name in ("q_norm", "k_norm")},
        "router": stack("mlp.gate"),
        "gate_up": torch.cat([experts("gate"), experts("up")], dim=2),
        "down": experts("down"),
    }
