"""Qwen3 (arXiv:2505.09388): dense, RMSNorm over each head of q and k, the upper layers may slide."""

from __future__ import annotations

from workers.models.families.common import Family, decoder_spec, windows_by_layer
from workers.models.families.fields import ConfigReader
from workers.models.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    config.only("use_qk_norm", True)
    bias = config.flag("attention_bias", default=False)
    return decoder_spec(
        config,
        windows=windows_by_layer(config, lambda layer, border: layer >= border),
        default_head_dim=128,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


FAMILY = Family("qwen3", read)
