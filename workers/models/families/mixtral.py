"""Mixtral (arXiv:2401.04088): every layer routed, weights of the chosen experts always sum to one."""

from __future__ import annotations

from workers.models.families.common import Family, decoder_spec, num_layers, read_moe, windows_everywhere
from workers.models.families.fields import ConfigReader
from workers.models.families.names import MoENames
from workers.models.spec import ModelSpec

HUB_NAMES = MoENames(
    router="block_sparse_moe.gate.weight",
    gate="block_sparse_moe.experts.{expert}.w1.weight",
    up="block_sparse_moe.experts.{expert}.w3.weight",
    down="block_sparse_moe.experts.{expert}.w2.weight",
    fused_gate_up="block_sparse_moe.experts.gate_up_proj",
    fused_down="block_sparse_moe.experts.down_proj",
)


def read(config: ConfigReader) -> ModelSpec:
    config.only("norm_topk_prob", True)
    return decoder_spec(
        config,
        windows=windows_everywhere(config, switched=False),
        mlps=["moe"] * num_layers(config),
        moe=read_moe(config, intermediate="intermediate_size", norm_topk_prob=True),
        default_theta=1e6,
        default_rms_eps=1e-5,
    )


FAMILY = Family("mixtral", read, (HUB_NAMES, MoENames()))
