"""However transformers writes a checkpoint down, the same numbers are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import MOE_RECIPES, RECIPES, make_model, old_style_config, save
from workers.models.loader import load_model
from workers.models.weights import MoEWeights

pytestmark = pytest.mark.needs("transformers")

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "is_sharded"),
    [({}, False), ({"max_shard_size": "60KB"}, True), ({"save_original_format": False}, False)],
)
@pytest.mark.parametrize("name", MOE_RECIPES)
def test_one_tensor_an_expert_shards_and_fused_experts(
    tmp_path: Path, name: str, options: dict[str, Any], is_sharded: bool
) -> None:
    model = make_model(RECIPES[name])
    folder = save(model, tmp_path, **options)
    assert (folder / "model.safetensors.index.json").exists() is is_sharded
    _, weights = load_model(folder, device=CPU)
    state = model.state_dict()
    assert torch.equal(weights.embedding, state["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head, state["lm_head.weight"])
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        qkv = [state[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(layer.attention.qkv, torch.cat(qkv))
        if isinstance(layer.mlp, MoEWeights):
            assert torch.equal(layer.mlp.router, state[f"{prefix}.mlp.gate.weight"])
            assert torch.equal(layer.mlp.experts.gate_up, state[f"{prefix}.mlp.experts.gate_up_proj"])
            assert torch.equal(layer.mlp.experts.down, state[f"{prefix}.mlp.experts.down_proj"])


@pytest.mark.parametrize("name", RECIPES)
def test_configs_of_older_versions_mean_the_same(tmp_path: Path, name: str) -> None:
    folder = save(make_model(RECIPES[name]), tmp_path)
    new, _ = load_model(folder, device=CPU)
    (folder / "config.json").write_text(json.dumps(old_style_config(folder)))
    old, _ = load_model(folder, device=CPU)
    assert old == new
