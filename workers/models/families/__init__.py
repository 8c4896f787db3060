"""Families of models: from `config.json` to a `ModelSpec`, and from a checkpoint's names to its weights' places."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import UnsupportedModelError
from workers.models.families import llama, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe
from workers.models.families.common import Family
from workers.models.families.fields import ConfigReader
from workers.models.families.names import DERIVED_SUFFIX, MoENames, expert_parts, weight_parts
from workers.models.spec import ModelSpec

__all__ = [
    "DERIVED_SUFFIX",
    "FAMILIES",
    "Family",
    "MoENames",
    "expert_parts",
    "family_of",
    "spec_from_config",
    "weight_parts",
]

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (qwen3_moe, qwen2_moe, mixtral, olmoe, llama, qwen2, qwen3)
}


def family_of(config: Mapping[str, object]) -> Family:
    """The family of a `config.json`. Raises `UnsupportedModelError` for a `model_type` that is not built."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        remote = " Its auto_map asks for code of its own, which is never run." if config.get("auto_map") else ""
        raise UnsupportedModelError(
            f"config.json: model_type {model_type!r} is not supported; {', '.join(FAMILIES)} are.{remote}",
            param="model_type",
        )
    return family


def spec_from_config(config: Mapping[str, object]) -> ModelSpec:
    """The architecture that a `config.json` describes.

    Raises `CheckpointError` for a field that is missing, of the wrong type or out of range, and
    `UnsupportedModelError` for one that is not built or not known; each names the field and its value.
    """
    family = family_of(config)
    reader = ConfigReader(config)
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and not any("CausalLM" in str(a) for a in architectures):
        reader.unsupported("architectures", architectures, "only models that generate text (…ForCausalLM) are")
    quantization = reader.table("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        reader.unsupported("quantization_config.quant_method", method, "use the checkpoint in bf16, fp16 or fp32")
    spec = family.read(reader)
    reader.finish()
    return spec
