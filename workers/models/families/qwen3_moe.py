"""Qwen3-MoE (arXiv:2505.09388): routed experts, RMSNorm over each head of q and k."""

from __future__ import annotations

from workers.models.families.common import Family, decoder_spec, read_moe, sparse_mlps, windows_everywhere
from workers.models.families.fields import ConfigReader
from workers.models.families.names import MoENames
from workers.models.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    config.only("use_qk_norm", True)
    bias = config.flag("attention_bias", default=False)
    return decoder_spec(
        config,
        windows=windows_everywhere(config, switched=True),
        mlps=sparse_mlps(config),
        moe=read_moe(config, norm_topk_prob=config.flag("norm_topk_prob", default=False)),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


FAMILY = Family("qwen3_moe", read, (MoENames(),))
