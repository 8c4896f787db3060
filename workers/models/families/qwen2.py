"""Qwen2 and Qwen2.5 (arXiv:2407.10671): dense, biases on q, k and v, the upper layers may slide."""

from __future__ import annotations

from workers.models.families.common import Family, decoder_spec, windows_by_layer
from workers.models.families.fields import ConfigReader
from workers.models.spec import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    config.only("qkv_bias", True)
    windows = windows_by_layer(config, lambda layer, border: layer >= border)
    return decoder_spec(config, windows=windows, qkv_bias=True)


FAMILY = Family("qwen2", read)
