"""What an architecture is: a value that families make from `config.json` and the one decoder reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

QKNorm = Literal["none", "head", "full"]  # over each head (Qwen3), or over all heads together (OLMoE)


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding. `factor` and what follows belong to the scaled kinds (names as in `rope_scaling`)."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True)
class MoESpec:
    """A routed feed-forward block; `shared_intermediate` > 0 adds a shared expert behind a sigmoid gate."""

    num_experts: int
    top_k: int
    intermediate: int
    norm_topk_prob: bool  # the k weights sum to one
    shared_intermediate: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. `sliding_window` counts keys a query sees, itself included; None: all."""

    mlp: Literal["dense", "moe"]
    sliding_window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer: RMSNorm before each block, SwiGLU, rotary positions, grouped-query attention."""

    family: str  # `model_type` of config.json
    vocab_size: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int  # of dense layers
    rms_eps: float
    rope: RopeSpec
    max_position: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = "none"
    clip_qkv: float | None = None  # OLMoE: clamp q, k, v to [-clip, clip]
    moe: MoESpec | None = None

    @property
    def num_experts(self) -> list[int]:
        """By layer; 0 where it is dense."""
        count = self.moe.num_experts if self.moe is not None else 0
        return [count if layer.mlp == "moe" else 0 for layer in self.layers]
