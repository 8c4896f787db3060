"""Random models without a checkpoint, and a driver that runs explicit schedules through a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cluster.protocol import Sampling, Stopping
from workers.batch import Batcher
from workers.cache.kv_cache import KVCache
from workers.experts.backend import LocalExperts
from workers.models.decoder import Decoder
from workers.models.spec import LayerSpec, ModelSpec, MoESpec, RopeSpec
from workers.models.weights import (
    AttentionWeights,
    DenseWeights,
    ExpertWeights,
    LayerWeights,
    ModelWeights,
    MoEWeights,
)
from workers.numerics import Numerics, laid_out
from workers.request import Request
from workers.step import Scheduled

TINY = ModelSpec(
    family="qwen3_moe",
    vocab_size=96,
    hidden=64,
    layers=(LayerSpec("moe"), LayerSpec("dense", sliding_window=20), LayerSpec("moe")),
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate=96,
    rms_eps=1e-6,
    rope=RopeSpec(),
    max_position=512,
    qk_norm="head",
    moe=MoESpec(num_experts=8, top_k=2, intermediate=32, norm_topk_prob=True),
)


def random_weights(spec: ModelSpec, seed: int = 0) -> ModelWeights:
    """Weights of a scale at which every part changes the logits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return laid_out(torch.randn(*shape, generator=generator) / shape[-1] ** 0.5)

    def gain(size: int) -> torch.Tensor:
        return 1 + 0.1 * torch.randn(size, generator=generator)

    width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layers = []
    for layer in spec.layers:
        attention = AttentionWeights(
            norm=gain(spec.hidden),
            qkv=normal(width + 2 * kv_width, spec.hidden),
            qkv_bias=None,
            q_norm=gain(spec.head_dim) if spec.qk_norm == "head" else None,
            k_norm=gain(spec.head_dim) if spec.qk_norm == "head" else None,
            out=normal(spec.hidden, width),
            out_bias=None,
        )
        mlp: DenseWeights | MoEWeights
        if layer.mlp == "moe":
            moe = spec.moe
            assert moe is not None
            experts = ExpertWeights(
                gate_up=normal(moe.num_experts, 2 * moe.intermediate, spec.hidden),
                down=normal(moe.num_experts, spec.hidden, moe.intermediate),
            )
            mlp = MoEWeights(normal(moe.num_experts, spec.hidden), experts, None, None)
        else:
            mlp = DenseWeights(
                normal(2 * spec.intermediate, spec.hidden), None, normal(spec.hidden, spec.intermediate), None
            )
        layers.append(LayerWeights(attention, gain(spec.hidden), mlp))
    embedding = torch.randn(spec.vocab_size, spec.hidden, generator=generator)
    lm_head = normal(spec.vocab_size, spec.hidden) * 4
    return ModelWeights(embedding, tuple(layers), gain(spec.hidden), lm_head)


def make_decoder(spec: ModelSpec, weights: ModelWeights, numerics: Numerics) -> Decoder:
    experts = LocalExperts(
        [layer.mlp.experts if isinstance(layer.mlp, MoEWeights) else None for layer in weights.layers], numerics
    )
    return Decoder(spec, weights, experts, numerics)


def make_request(request_id: str, tokens: Sequence[int], **changes: object) -> Request:
    request = Request(
        request_id=request_id,
        tokens=list(tokens),
        num_prompt=len(tokens),
        sampling=Sampling(seed=0, temperature=0.0),
        stopping=Stopping(max_tokens=8, ignore_eos=True),
    )
    return replace(request, **changes)  # type: ignore[arg-type]


class Driver:
    """Runs sequences of known tokens through a decoder, in whatever chunks and batches a test asks for."""

    def __init__(self, decoder: Decoder, sequences: Sequence[Sequence[int]], page_size: int = 16) -> None:
        self.decoder = decoder
        self.requests = [make_request(str(i), tokens) for i, tokens in enumerate(sequences)]
        dtype = decoder.weights.embedding.dtype
        pages_each = max(-(-len(tokens) // page_size) for tokens in sequences)
        self._kv = KVCache(
            decoder.spec, pages_each * len(sequences), page_size, decoder.weights.embedding.device, dtype
        )
        for page_id in range(self._kv.num_pages):
            self._kv.clear_page(page_id)
        for i, request in enumerate(self.requests):
            # Interleaved on purpose: neighbours in a sequence are not neighbours in memory.
            request.page_ids = [i + page * len(sequences) for page in range(pages_each)]
        self._batcher = Batcher(
            page_size,
            decoder.windows,
            decoder.spec.num_heads,
            decoder.weights.embedding.device,
            dtype,
            native=decoder.numerics.native is not None,
        )

    @torch.inference_mode()
    def step(self, schedule: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """`schedule`: (sequence, number of its next tokens) … -> logits [n, V] of each."""
        scheduled = [Scheduled(self.requests[i], count) for i, count in schedule]
        batch = self._batcher.build(scheduled, [0] * len(scheduled))
        logits = self.decoder.forward(batch, self._kv)
        for item in scheduled:
            item.request.num_computed += item.num_tokens
        return list(logits.split([item.num_tokens for item in scheduled]))

    def run(self, schedules: Sequence[Sequence[tuple[int, int]]]) -> list[torch.Tensor]:
        """All steps; -> logits [computed tokens, V] of each sequence."""
        parts: list[list[torch.Tensor]] = [[] for _ in self.requests]
        for schedule in schedules:
            for (i, _), logits in zip(schedule, self.step(schedule), strict=True):
                parts[i].append(logits)
        return [torch.cat(part) if part else torch.empty(0) for part in parts]
