"""Loading a checkpoint: every number in its place, in either layout of memory, within the memory it takes itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError, UnsupportedModelError
from tests.support.checkpoints import CONFIG, random_tensors, write
from workers.models.families import spec_from_config
from workers.models.loader import eos_token_ids, load_model
from workers.models.weights import MoEWeights

CPU = torch.device("cpu")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", CONFIG, random_tensors(CONFIG))


# --------------------------------------------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_number_is_in_its_place(tmp_path: Path, laid_out: bool, num_shards: int) -> None:
    tensors = random_tensors(CONFIG)
    path = write(tmp_path, CONFIG, tensors, num_shards)
    spec, weights = load_model(path, device=CPU, laid_out=laid_out)
    assert spec == spec_from_config(CONFIG)
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])
    assert torch.equal(weights.norm, tensors["model.norm.weight"])
    for index, layer in enumerate(weights.layers):
        named = {
            name.removeprefix(f"model.layers.{index}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{index}.")
        }
        q, k, v = (named[f"self_attn.{name}_proj.weight"] for name in "qkv")
        assert torch.equal(layer.attention.norm, named["input_layernorm.weight"])
        assert torch.equal(layer.attention.qkv, torch.cat([q, k, v]))
        assert torch.equal(layer.attention.out, named["self_attn.o_proj.weight"])
        assert layer.attention.q_norm is not None
        assert torch.equal(layer.attention.q_norm, named["self_attn.q_norm.weight"])
        assert layer.attention.qkv_bias is None
        assert torch.equal(layer.mlp_norm, named["post_attention_layernorm.weight"])
        assert isinstance(layer.mlp, MoEWeights)
        assert torch.equal(layer.mlp.router, named["mlp.gate.weight"])
        for expert in range(4):
            gate, up, down = (named[f"mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            assert torch.equal(layer.mlp.experts.gate_up[expert], torch.cat([gate, up]))
            assert torch.equal(layer.mlp.experts.down[expert], down)
        assert layer.attention.qkv.is_contiguous() is not laid_out
        assert layer.mlp.experts.gate_up.transpose(1, 2).is_contiguous() is laid_out


@pytest.mark.parametrize("laid_out", [False, True])
def test_tensors_larger_than_one_read(tmp_path: Path, laid_out: bool) -> None:
    config = {**CONFIG, "vocab_size": 3001, "hidden_size": 512}  # 6 MB of embedding, a ragged last piece
    tensors = random_tensors(config, torch.bfloat16)
    _, weights = load_model(write(tmp_path, config, tensors), device=CPU, laid_out=laid_out)
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"].float())
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"].float())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, None])
def test_dtypes_are_converted(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    tensors = random_tensors(CONFIG, stored)
    _, weights = load_model(write(tmp_path, CONFIG, tensors), device=CPU, dtype=wanted)
    assert weights.norm.dtype == (wanted or torch.float32)
    assert torch.equal(weights.layers[1].attention.qkv[:64], tensors[Q].to(wanted or torch.float32))


@pytest.mark.needs("cuda")
def test_a_gpu_keeps_the_checkpoints_dtype(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG, torch.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    _, weights = load_model(write(tmp_path, CONFIG, tensors), device=torch.device("cuda"))
    assert weights.embedding.dtype == weights.norm.dtype == torch.bfloat16
    assert torch.equal(weights.embedding.cpu(), tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_embeddings_are_one_tensor_whatever_they_are_called(tmp_path: Path, kept: str, laid_out: bool) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    embedding = tensors.pop("model.embed_tokens.weight")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if kept in (name, "both"):
            tensors[name] = embedding.clone()
    _, weights = load_model(write(tmp_path, config, tensors), device=CPU, laid_out=laid_out)
    assert weights.lm_head.data_ptr() == weights.embedding.data_ptr()
    assert torch.equal(weights.lm_head, embedding)


def test_tied_embeddings_that_differ_are_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* lm_head\.weight differs from the embedding"):
        load_model(write(tmp_path, config, tensors), device=CPU)


def test_buffers_that_follow_from_the_config_are_passed_over(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    load_model(write(tmp_path, CONFIG, tensors), device=CPU)


def test_one_file_of_any_name_will_do(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    load_model(checkpoint, device=CPU)


def test_progress_counts_every_byte_once(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(checkpoint, device=CPU, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in random_tensors(CONFIG).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {total}


def test_the_memory_that_is_free_is_respected(checkpoint: Path) -> None:
    needed = sum(tensor.nbytes for tensor in random_tensors(CONFIG).values())
    load_model(checkpoint, device=CPU, limit_bytes=needed)
    with pytest.raises(CheckpointError, match=r"float32, and .* GiB are free on cpu: take a smaller model"):
        load_model(checkpoint, device=CPU, limit_bytes=needed - 1)


# ------------------------------------------------------------------------ weights that do not belong to the config


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors[Q]
    with pytest.raises(CheckpointError, match=f"tensor {Q}, which config.json asks for"):
        load_model(write(tmp_path, CONFIG, tensors), device=CPU)


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors[Q] = tensors[Q].t().contiguous()
    with pytest.raises(CheckpointError, match=rf"tensor {Q} has the shape \[32, 64\], and .* \[64, 32\]"):
        load_model(write(tmp_path, CONFIG, tensors), device=CPU)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.mlp.experts.4.up_proj.weight",
        "v_head.weight",
    ],
)
def test_a_tensor_that_would_not_be_used_is_named(tmp_path: Path, name: str) -> None:
    tensors = {**random_tensors(CONFIG), name: torch.ones(4)}
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} would not be used"):
        load_model(write(tmp_path, CONFIG, tensors), device=CPU)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64, torch.int64])
def test_an_unsupported_dtype_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(CONFIG)
    tensors[Q] = tensors[Q].to(dtype)
    with pytest.raises(CheckpointError, match=f"tensor {Q} has the dtype .*; F32, F16, BF16 can be read"):
        load_model(write(tmp_path, CONFIG, tensors), device=CPU)


def test_config_and_weights_of_different_models(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 10_000, "num_experts": 60_000}))
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight has the shape \[4, 32\]"):
        load_model(checkpoint, device=CPU)


def test_an_unsupported_model_is_refused_before_its_weights_are_looked_at(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "router_bias": True}))
    with pytest.raises(UnsupportedModelError, match="router_bias = True"):
        load_model(checkpoint, device=CPU)


# ------------------------------------------------------------------------------------------------------------ memory

MEMORY_CHILD = """
import re, sys
from pathlib import Path
import torch
from workers.models.loader import load_model

def peak_bytes():  # not getrusage's, which starts from the parent's peak
    return int(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

device, folder, small, laid_out = torch.device("cpu"), Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "True"
load_model(small, device=device, laid_out=laid_out)  # what torch and the threads take at first use is no weight
before = peak_bytes()
kept = load_model(folder, device=device, laid_out=laid_out)
print(peak_bytes() - before)
"""


@pytest.mark.needs("linux")
@pytest.mark.parametrize(
    ("dtype", "num_shards", "laid_out"),
    [(torch.float32, 1, False), (torch.bfloat16, 2, True), (torch.float32, 2, True)],
)
def test_the_peak_of_host_memory(tmp_path: Path, dtype: torch.dtype, num_shards: int, laid_out: bool) -> None:
    config = {
        **CONFIG,
        "vocab_size": 24_000,
        "hidden_size": 512,
        "num_hidden_layers": 3,
        "num_experts": 32,
        "moe_intermediate_size": 384,
        "tie_word_embeddings": True,
    }
    tensors = random_tensors(config, dtype)
    compute_bytes = sum(tensor.numel() for tensor in tensors.values()) * 4
    assert compute_bytes > 200e6
    folder = write(tmp_path / "large", config, tensors, num_shards)
    small = write(tmp_path / "small", CONFIG, random_tensors(CONFIG, dtype))
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, str(folder), str(small), str(laid_out)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert 0.95 * compute_bytes <= int(done.stdout) <= 1.15 * compute_bytes


# ----------------------------------------------------------------------------------------------- where sequences end


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["</s>", [1, None], -1, True, 2.0, {"id": 2}])
def test_a_wrong_end_is_named(checkpoint: Path, file: str, value: Any) -> None:
    config = CONFIG if file == "config.json" else {}
    (checkpoint / file).write_text(json.dumps({**config, "eos_token_id": value}))
    with pytest.raises(CheckpointError, match=rf"/{file}: eos_token_id is ") as caught:
        eos_token_ids(checkpoint)
    assert caught.value.param == "eos_token_id"


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_advice_that_is_no_json_object_is_named(checkpoint: Path, content: str) -> None:
    (checkpoint / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        eos_token_ids(checkpoint)


def test_the_tokens_that_end_a_sequence(checkpoint: Path) -> None:
    assert eos_token_ids(checkpoint) == (7,)
    (checkpoint / "generation_config.json").write_text('{"temperature": 1.0}')
    assert eos_token_ids(checkpoint) == (7,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 6, 5, 50279]}')
    assert eos_token_ids(checkpoint) == (5, 6), "an id beyond the vocabulary can never be drawn"
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": None}))
    assert eos_token_ids(checkpoint) == ()
