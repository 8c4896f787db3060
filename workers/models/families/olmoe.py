"""OLMoE (arXiv:2409.02060): every layer routed, RMSNorm over all heads of q and of k together, q, k, v clipped."""

from __future__ import annotations

from workers.models.families.common import Family, decoder_spec, no_windows, num_layers, read_moe
from workers.models.families.fields import ConfigReader
from workers.models.families.names import MoENames
from workers.models.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", default=False)
    spec = decoder_spec(
        config,
        windows=no_windows(config),
        mlps=["moe"] * num_layers(config),
        moe=read_moe(
            config,
            intermediate="intermediate_size",
            norm_topk_prob=config.flag("norm_topk_prob", default=False),
        ),
        default_rms_eps=1e-5,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="full",
        clip_qkv=config.optional_number("clip_qkv"),
    )
    if spec.head_dim * spec.num_heads != spec.hidden:
        config.invalid("head_dim", f"{spec.head_dim}, not hidden_size {spec.hidden} over {spec.num_heads} heads")
    return spec


FAMILY = Family("olmoe", read, (MoENames(),))
