"""The one forward pass of every family, driven by a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.cache.kv_cache import KVCache
from workers.experts.backend import ExpertBackend
from workers.kernels.linear import linear
from workers.kernels.moe_route import moe_route
from workers.kernels.norm_rope_append import norm_rope_append
from workers.kernels.paged_attention import paged_attention
from workers.kernels.rms_norm import rms_norm
from workers.kernels.swiglu import swiglu
from workers.models.rope import rope_tables
from workers.models.spec import ModelSpec
from workers.models.weights import AttentionWeights, DenseWeights, ModelWeights, MoEWeights
from workers.numerics import Numerics
from workers.step import Batch


class Decoder:
    """A decoder-only transformer: `forward` takes a batch and the KV cache, and gives logits."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        experts: ExpertBackend,
        numerics: Numerics,
        num_positions: int | None = None,
        on_layer: Callable[[], object] = lambda: None,
    ) -> None:
        """`num_positions` bounds the rotary tables (default: the checkpoint's); `on_layer` precedes each layer."""
        self.spec = spec
        self.weights = weights
        self.experts = experts
        self.numerics = numerics
        self._on_layer = on_layer
        self.windows = tuple(dict.fromkeys(layer.sliding_window for layer in spec.layers))
        embedding = weights.embedding
        self._cos, self._sin = rope_tables(
            spec.rope, spec.head_dim, num_positions or spec.max_position, embedding.device, embedding.dtype
        )

    def forward(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """-> logits [R, V] of `batch.rows`, float32. Appends the batch's K and V to `kv`."""
        return self.logits(self.last_hidden(batch, kv))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states [R, H] -> logits [R, V], float32."""
        return linear(hidden, self.weights.lm_head, None, self.numerics).float()

    def last_hidden(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """-> the last hidden states [R, H] of `batch.rows`. Appends the batch's K and V to `kv`."""
        hidden = self.hidden(batch, kv)
        if len(batch.rows) != len(batch.token_ids):
            hidden = hidden.index_select(0, batch.rows)
        return hidden

    def hidden(self, batch: Batch, kv: KVCache) -> torch.Tensor:
        """-> the last hidden states [T, H], normalised."""
        spec, weights = self.spec, self.weights
        cos = self._cos.index_select(0, batch.positions)
        sin = self._sin.index_select(0, batch.positions)
        hidden = weights.embedding.index_select(0, batch.token_ids)
        for index, (layer_spec, layer) in enumerate(zip(spec.layers, weights.layers, strict=True)):
            self._on_layer()
            normed = rms_norm(hidden, layer.attention.norm, spec.rms_eps, self.numerics)
            q = self._project(normed, layer.attention, cos, sin, kv.k[index], kv.v[index], batch.kv_slots)
            attended = paged_attention(
                q,
                kv.k[index],
                kv.v[index],
                batch.attention,
                layer_spec.sliding_window,
                spec.head_dim**-0.5,
                self.numerics,
            )
            attended = attended.reshape(len(hidden), -1)
            hidden = hidden + linear(attended, layer.attention.out, layer.attention.out_bias, self.numerics)
            normed = rms_norm(hidden, layer.mlp_norm, spec.rms_eps, self.numerics)
            if isinstance(layer.mlp, MoEWeights):
                hidden = hidden + self._moe(index, normed, layer.mlp)
            else:
                hidden = hidden + self._dense(normed, layer.mlp)
        return rms_norm(hidden, weights.norm, spec.rms_eps, self.numerics)

    def _project(
        self,
        hidden: torch.Tensor,
        weights: AttentionWeights,
        cos: torch.Tensor,
        sin: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        kv_slots: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [T, H] -> q [T, num_heads, head_dim]; K and V are appended to the caches."""
        spec = self.spec
        qkv = linear(hidden, weights.qkv, weights.qkv_bias, self.numerics)
        return norm_rope_append(
            qkv,
            weights.q_norm,
            weights.k_norm,
            spec.rms_eps,
            cos,
            sin,
            k_cache,
            v_cache,
            kv_slots,
            spec.num_heads,
            spec.clip_qkv,
            self.numerics,
        )

    def _dense(self, hidden: torch.Tensor, weights: DenseWeights) -> torch.Tensor:
        inner = swiglu(linear(hidden, weights.gate_up, weights.gate_up_bias, self.numerics), self.numerics)
        return linear(inner, weights.down, weights.down_bias, self.numerics)

    def _moe(self, index: int, hidden: torch.Tensor, weights: MoEWeights) -> torch.Tensor:
        """hidden [T, H] -> the routed experts' sum, plus the shared expert behind its gate."""
        moe = self.spec.moe
        assert moe is not None
        router_logits = linear(hidden, weights.router, None, self.numerics)
        topk_ids, topk_weights = moe_route(router_logits, moe.top_k, moe.norm_topk_prob, self.numerics)
        pending = self.experts.begin(index, hidden, topk_ids, topk_weights)
        if weights.shared is None or weights.shared_gate is None:
            return self.experts.finish(pending)
        shared = self._dense(hidden, weights.shared)
        # 1 / (1 + exp(-x)): `sigmoid` takes a scalar path at the end of a vector, and one column is all ends.
        gate = linear(hidden, weights.shared_gate, None, self.numerics).neg().exp_().add_(1.0).reciprocal_()
        return self.experts.finish(pending) + gate * shared
