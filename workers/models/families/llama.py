"""Llama (arXiv:2302.13971, 2407.21783): dense, biases where the config asks for them."""

from __future__ import annotations

from workers.models.families.common import Family, decoder_spec, no_windows
from workers.models.families.fields import ConfigReader
from workers.models.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", default=False)
    return decoder_spec(
        config,
        windows=no_windows(config),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", default=False),
    )


FAMILY = Family("llama", read)
