"""`config.json` -> `ModelSpec`: what the hub's models say, what is honoured, and that nothing is ignored in silence."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import CheckpointError, UnsupportedModelError
from tests.support.hub_configs import HUB_CONFIGS, LLAMA_31_8B, QWEN3_30B_A3B, QWEN25_7B
from workers.models.families import FAMILIES, spec_from_config
from workers.models.spec import LayerSpec, ModelSpec, MoESpec, RopeSpec

MIXTRAL = HUB_CONFIGS["mistralai/Mixtral-8x7B-Instruct-v0.1"]
OLMOE = HUB_CONFIGS["allenai/OLMoE-1B-7B-0924"]
QWEN2_MOE = HUB_CONFIGS["Qwen/Qwen1.5-MoE-A2.7B"]
QWEN3 = HUB_CONFIGS["Qwen/Qwen3-8B"]


def spec_of(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return spec_from_config({**config, **changes})


def windows(spec: ModelSpec) -> list[int | None]:
    return [layer.sliding_window for layer in spec.layers]


# ------------------------------------------------------------------------------------------ what the hub's models say


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_models_of_the_hub_are_read(name: str) -> None:
    config = HUB_CONFIGS[name]
    spec = spec_from_config(config)
    assert spec.family == config["model_type"]
    assert len(spec.layers) == config["num_hidden_layers"]
    assert spec.num_heads % spec.num_kv_heads == 0
    assert spec.max_position == config["max_position_embeddings"]
    assert windows(spec) == [None] * len(spec.layers)


def test_every_family_has_a_model_of_the_hub() -> None:
    assert {config["model_type"] for config in HUB_CONFIGS.values()} == set(FAMILIES)


def test_a_whole_spec() -> None:
    assert spec_of(QWEN3_30B_A3B) == ModelSpec(
        family="qwen3_moe",
        vocab_size=151936,
        hidden=2048,
        layers=(LayerSpec("moe"),) * 48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        intermediate=6144,
        rms_eps=1e-6,
        rope=RopeSpec(theta=1e6),
        max_position=40960,
        qk_norm="head",
        moe=MoESpec(num_experts=128, top_k=8, intermediate=768, norm_topk_prob=True),
    )


def test_what_makes_each_family() -> None:
    assert spec_of(QWEN2_MOE).qkv_bias
    assert spec_of(QWEN2_MOE).moe == MoESpec(60, 4, 1408, norm_topk_prob=False, shared_intermediate=5632)
    assert spec_of(MIXTRAL).moe == MoESpec(8, 2, 14336, norm_topk_prob=True)
    assert spec_of(OLMOE).moe == MoESpec(64, 8, 1024, norm_topk_prob=False)
    assert spec_of(OLMOE).qk_norm == "full"
    assert spec_of(OLMOE, clip_qkv=8.0).clip_qkv == 8.0
    assert spec_of(QWEN25_7B).qkv_bias
    assert not spec_of(QWEN25_7B).o_bias
    assert spec_of(QWEN3).qk_norm == "head"
    assert spec_of(LLAMA_31_8B).qk_norm == "none"
    assert spec_of(HUB_CONFIGS["HuggingFaceTB/SmolLM2-1.7B-Instruct"]).tie_embeddings


# ------------------------------------------------------------------------------------------------- what is honoured


def test_biases() -> None:
    for config in (LLAMA_31_8B, QWEN3, QWEN3_30B_A3B, OLMOE):
        spec = spec_of(config, attention_bias=True)
        assert (spec.qkv_bias, spec.o_bias) == (True, True)
    assert spec_of(LLAMA_31_8B, mlp_bias=True).mlp_bias
    assert not spec_of(QWEN2_MOE, qkv_bias=False).qkv_bias


def test_dense_layers_among_routed_ones() -> None:
    spec = spec_of(QWEN3_30B_A3B, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [layer.mlp for layer in spec.layers] == ["dense", "moe", "dense", "dense", "dense", "moe"]
    all_dense = spec_of(QWEN3_30B_A3B, num_hidden_layers=2, mlp_only_layers=[0, 1])
    assert all_dense.moe is None


def test_sliding_windows() -> None:
    four = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 32}
    assert windows(spec_of(QWEN25_7B, **four, max_window_layers=3)) == [None, None, None, 32]
    assert windows(spec_of(QWEN3, **four, max_window_layers=1)) == [None, 32, 32, 32]
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(spec_of(QWEN3, **four, layer_types=types)) == [32, None, None, 32]
    assert windows(spec_of(QWEN2_MOE, **four, max_window_layers=3)) == [32, None, 32, None]
    assert windows(spec_of(QWEN3_30B_A3B, **four)) == [32] * 4
    assert windows(spec_of(MIXTRAL, num_hidden_layers=2, sliding_window=4096)) == [4096] * 2
    switched_off = {**four, "use_sliding_window": False}
    for config in (QWEN25_7B, QWEN3, QWEN2_MOE, QWEN3_30B_A3B, LLAMA_31_8B):
        assert windows(spec_of(config, **switched_off)) == [None] * 4


def test_head_dim_and_kv_heads() -> None:
    assert spec_of(QWEN3_30B_A3B).head_dim == 128
    assert spec_of(QWEN3_30B_A3B, head_dim=None).head_dim == 64
    assert spec_of({k: v for k, v in QWEN3.items() if k != "head_dim"}, hidden_size=2048).head_dim == 128
    assert spec_of(LLAMA_31_8B, num_key_value_heads=None).num_kv_heads == 32


def test_either_name_of_the_number_of_experts() -> None:
    renamed = {**QWEN3_30B_A3B, "num_local_experts": 128}
    assert spec_of(renamed) == spec_of(QWEN3_30B_A3B)
    del renamed["num_experts"]
    assert spec_of(renamed) == spec_of(QWEN3_30B_A3B)
    with pytest.raises(CheckpointError, match="num_experts is 128, but num_local_experts is 64"):
        spec_of(QWEN3_30B_A3B, num_local_experts=64)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, RopeSpec(1e6)),
        ({"type": "linear", "factor": 2}, RopeSpec(1e6, "linear", factor=2.0)),
        ({"type": "yarn", **YARN}, RopeSpec(1e6, "yarn", factor=4.0, original_max_position=32768)),
        (
            {"rope_type": "yarn", **YARN, "beta_fast": 30, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
            RopeSpec(
                1e6,
                "yarn",
                factor=4.0,
                original_max_position=32768,
                beta_fast=30.0,
                mscale=0.7,
                mscale_all_dim=1.0,
                truncate=False,
            ),
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
            RopeSpec(1e6, "yarn", factor=2.0, original_max_position=40960, attention_factor=1.25),
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **YARN},
            RopeSpec(1e6, "llama3", factor=4.0, original_max_position=32768),
        ),
    ],
)
def test_rope_in_the_old_and_the_new_form(scaling: dict[str, Any], expected: RopeSpec) -> None:
    old = spec_of(QWEN3_30B_A3B, rope_scaling=scaling)
    without = {key: value for key, value in QWEN3_30B_A3B.items() if key not in ("rope_scaling", "rope_theta")}
    new = spec_of(without, rope_parameters={**scaling, "rope_theta": 1e6})
    assert old.rope == new.rope == expected
    assert old == new


def test_default_theta() -> None:
    for config, theta in ((LLAMA_31_8B, 1e4), (MIXTRAL, 1e6)):
        without = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
        assert spec_of(without).rope == RopeSpec(theta)


def test_yarn_stretches_the_context() -> None:
    assert spec_of(QWEN25_7B, rope_scaling={"type": "yarn", **YARN}).max_position == 131072


# ------------------------------------------------------------------------------------ nothing is ignored in silence


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (QWEN3_30B_A3B, "attention_sinks", 4),
        (QWEN3_30B_A3B, "num_shared_experts", 1),
        (QWEN3_30B_A3B, "scoring_func", "sigmoid"),
        (QWEN3_30B_A3B, "hidden_act", "gelu"),
        (QWEN3_30B_A3B, "shared_expert_intermediate_size", 512),
        (QWEN3_30B_A3B, "qkv_bias", True),
        (QWEN3_30B_A3B, "use_qk_norm", False),
        (QWEN3_30B_A3B, "partial_rotary_factor", 0.5),
        (QWEN3_30B_A3B, "per_layer_config", {"0": {"sliding_window": 8}}),
        (QWEN25_7B, "dual_chunk_attention_config", {"chunk_size": 262144}),
        (QWEN25_7B, "use_mrope", True),
        (QWEN25_7B, "layer_types", ["sliding_attention"] * 28),
        (QWEN25_7B, "layer_types", ["chunked_attention"] * 28),
        (QWEN3_30B_A3B, "layer_types", ["sliding_attention"] * 48),
        (MIXTRAL, "attention_bias", True),
        (MIXTRAL, "norm_topk_prob", False),
        (OLMOE, "sliding_window", 128),
        (LLAMA_31_8B, "sliding_window", 4096),
        (LLAMA_31_8B, "use_sliding_window", True),
        (LLAMA_31_8B, "rope_interleaved", True),
        (LLAMA_31_8B, "logits_scaling", 8.0),
        (LLAMA_31_8B, "is_encoder_decoder", True),
        (LLAMA_31_8B, "architectures", ["LlamaForSequenceClassification"]),
        (LLAMA_31_8B, "model_type", "gemma9"),
    ],
)
def test_a_field_that_is_not_built_is_named_with_its_value(config: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_of(config, **{field: value})
    assert caught.value.param == field
    assert field in caught.value.message
    assert (repr(value[0]) if isinstance(value, list) else repr(value)) in caught.value.message


def test_quantized_checkpoints_are_refused_by_their_method() -> None:
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.quant_method = 'awq' is not supported"):
        spec_of(LLAMA_31_8B, quantization_config={"quant_method": "awq", "bits": 4})


def test_code_of_its_own_is_named_only_where_it_would_be_needed() -> None:
    remote = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    with pytest.raises(UnsupportedModelError, match=r"model_type 'x' .* auto_map asks for code .* never run"):
        spec_from_config({"model_type": "x", "auto_map": remote})
    assert spec_of(LLAMA_31_8B, auto_map=remote) == spec_of(LLAMA_31_8B)


@pytest.mark.parametrize(
    ("rope", "field", "error"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type", UnsupportedModelError),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_type", UnsupportedModelError),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type", UnsupportedModelError),
        ({"rope_type": "yarn", **YARN, "extrapolation_factor": 2}, "extrapolation_factor", UnsupportedModelError),
        ({"rope_type": "default", "factor": 2.0}, "factor", UnsupportedModelError),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "partial_rotary_factor",
            UnsupportedModelError,
        ),
        ({"full_attention": {"rope_type": "default"}}, "rope_scaling", UnsupportedModelError),
        ({"rope_type": "linear"}, "factor", CheckpointError),
        ({"rope_type": "linear", "factor": 0}, "factor", CheckpointError),
        ({"rope_type": "linear", "factor": float("nan")}, "factor", CheckpointError),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "high_freq_factor",
            CheckpointError,
        ),
        ({"rope_type": "default", "rope_theta": 5e5}, "rope_theta", CheckpointError),
        ("yarn", "rope_scaling", CheckpointError),
    ],
)
def test_rope_settings_that_are_wrong_or_not_built(rope: Any, field: str, error: type[CheckpointError]) -> None:
    with pytest.raises(error, match=field) as caught:
        spec_of(QWEN3_30B_A3B, rope_scaling=rope)
    assert type(caught.value) is error
    assert caught.value.param == field


def test_two_different_rope_settings_are_refused() -> None:
    with pytest.raises(CheckpointError, match="leave one out"):
        spec_of(LLAMA_31_8B, rope_parameters={"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", "2048"),
        ("hidden_size", 2048.0),
        ("hidden_size", True),
        ("hidden_size", -1),
        ("hidden_size", 10**12),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_experts", 10**9),
        ("num_experts_per_tok", 129),
        ("num_key_value_heads", 5),
        ("head_dim", 127),
        ("vocab_size", None),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("inf")),
        ("rope_theta", -1.0),
        ("tie_word_embeddings", "false"),
        ("norm_topk_prob", 1),
        ("mlp_only_layers", [0, "1"]),
        ("mlp_only_layers", [0, 999]),
        ("layer_types", ["full_attention"]),
        ("hidden_act", 3),
    ],
)
def test_wrong_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=field) as caught:
        spec_of(QWEN3_30B_A3B, **{field: value})
    assert caught.value.param == field
    assert not isinstance(caught.value, UnsupportedModelError)


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}, {"model_type": ["llama"]}])
def test_no_model_type(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model_type .* is not supported; qwen3_moe, .*, qwen3 are"):
        spec_from_config(config)
