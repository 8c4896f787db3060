"""Tiny random checkpoints, written by transformers' own `save_pretrained`, one of each family and kind of setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workers.models.families import FAMILIES, spec_from_config, weight_parts
from workers.models.loader import empty_weights

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}


@dataclass(frozen=True)
class Recipe:
    """A family and the settings that differ from its plain form."""

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **{**SHAPE, **PLAIN[self.model_type], **self.settings})


PLAIN: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    "qwen2_moe": SHARED,
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}

RECIPES: Mapping[str, Recipe] = {
    **{model_type: Recipe(model_type) for model_type in PLAIN},
    "qwen3_moe-raw_topk": Recipe("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True}),
    "qwen3_moe-dense_layers": Recipe("qwen3_moe", {"mlp_only_layers": [1], "tie_word_embeddings": True}),
    "qwen3_moe-sparse_step": Recipe("qwen3_moe", {"decoder_sparse_step": 2, "num_key_value_heads": 1}),
    "qwen3_moe-window": Recipe("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}),
    "qwen3_moe-yarn": Recipe("qwen3_moe", {"rope_parameters": YARN}),
    "qwen2_moe-norm_topk": Recipe("qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [0], "qkv_bias": False}),
    "qwen2_moe-window": Recipe("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9}),
    "qwen2_moe-linear": Recipe("qwen2_moe", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "mixtral-window": Recipe("mixtral", {"sliding_window": 11, "head_dim": 32}),
    "mixtral-yarn": Recipe(
        "mixtral", {"rope_parameters": {**YARN, "rope_theta": 1e6, "truncate": False}, "head_dim": 16}
    ),
    "olmoe-clipped": Recipe("olmoe", {"clip_qkv": 0.7, "norm_topk_prob": True, "attention_bias": True}),
    "olmoe-llama3": Recipe("olmoe", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    "llama-biases": Recipe("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-llama3": Recipe("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": Recipe("llama", {"rope_parameters": LINEAR}),
    "llama-yarn": Recipe("llama", {"rope_parameters": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 24}}),
    "qwen2-window": Recipe("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-tied": Recipe("qwen2", {"tie_word_embeddings": True, "rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen3-layer_types": Recipe(
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
        },
    ),
}
MOE_RECIPES = [name for name, recipe in RECIPES.items() if recipe.model_type not in ("llama", "qwen2", "qwen3")]


def make_model(recipe: Recipe, seed: int = 0) -> Any:
    """A transformers model whose every part, experts and router first, moves the logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        recipe.config(), attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight") or "layernorm" in name:
                weight.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:
                gain = 2.0 if name.endswith("mlp.gate.weight") else 1.5 if ".experts." in name else 1.0
                weight.copy_(gain * noise / weight.shape[-1] ** 0.5)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """`save_pretrained` without its progress bars; `options` are its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model.save_pretrained(folder, **options)
    return folder


def old_style_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json as transformers 4 wrote it: `rope_theta` and `rope_scaling`, `torch_dtype`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    return config


# ------------------------------------------------------------------------------------------- without transformers

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 50,
    "hidden_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "eos_token_id": 7,
}
INDEX = "model.safetensors.index.json"

Tensors = dict[str, torch.Tensor]


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Tensors:
    """A tensor for each name that this `config.json` asks for, in the hub's layout."""
    spec = spec_from_config(config)
    outline = empty_weights(spec, torch.device("meta"), dtype)
    generator = torch.Generator().manual_seed(3)
    layouts = FAMILIES[spec.family].moe_layouts
    return {
        name: torch.randn(part.shape, generator=generator).to(dtype)
        for name, part in weight_parts(spec, outline, layouts, ())
    }


def write(folder: Path, config: dict[str, Any], tensors: Tensors, num_shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::num_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::num_shards], file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
