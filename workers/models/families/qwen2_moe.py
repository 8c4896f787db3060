"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): routed experts beside a shared one behind a sigmoid gate."""

from __future__ import annotations

from workers.models.families.common import (
    MAX_WIDTH,
    Family,
    decoder_spec,
    read_moe,
    sparse_mlps,
    windows_by_layer,
)
from workers.models.families.fields import ConfigReader
from workers.models.families.names import MoENames
from workers.models.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    moe = read_moe(
        config,
        norm_topk_prob=config.flag("norm_topk_prob", default=False),
        shared_intermediate=config.integer("shared_expert_intermediate_size", high=MAX_WIDTH),
    )
    return decoder_spec(
        config,
        # Every other one of the lower layers slides: so transformers defines this family, unlike dense Qwen2.
        windows=windows_by_layer(config, lambda layer, border: layer % 2 == 0 and layer < border),
        mlps=sparse_mlps(config),
        moe=moe,
        qkv_bias=config.flag("qkv_bias", default=True),
    )


FAMILY = Family("qwen2_moe", read, (MoENames(),))
