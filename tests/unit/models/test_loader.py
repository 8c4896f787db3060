"""Loading a checkpoint: every number in its place, in either layout of memory; and each way a folder can be wrong."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import CheckpointError, UnsupportedModelError
from workers.models.families import FAMILIES, spec_from_config, weight_parts
from workers.models.loader import (
    GenerationDefaults,
    empty_weights,
    eos_token_ids,
    load_generation_config,
    load_model,
)
from workers.models.weights import MoEWeights

CPU = torch.device("cpu")
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
Q = "model.layers.1.self_attn.q_proj.weight"
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


# ------------------------------------------------------------------------------------------- folders that are wrong


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: give the folder"):
        load_model(tmp_path / "nowhere", device=CPU)
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        load_model(file, device=CPU)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path, device=CPU)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": ' * 100_000, "\xff"])
def test_a_config_that_is_no_json_object(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|holds .*, not a JSON object)"):
        load_model(checkpoint, device=CPU)


class Bomb:
    """A pickle that leaves a file behind where somebody opens it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pkl"])
def test_a_pickle_is_refused_and_never_opened(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "opened"), checkpoint / name)
    with pytest.raises(CheckpointError, match=f"only pickled weights \\({name}\\), which are never opened"):
        load_model(checkpoint, device=CPU)
    assert not (tmp_path / "opened").exists()


def test_no_weights_at_all(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no safetensors files"):
        load_model(checkpoint, device=CPU)


def test_several_files_need_an_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "a.safetensors")
    save_file({"x": torch.ones(1)}, checkpoint / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files \(a\.safetensors, …\) but no model"):
        load_model(checkpoint, device=CPU)


def header_of(data: bytes) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


def with_header(data: bytes, header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def edited(name: str, **changes: Any) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        header = header_of(data)
        header[name] |= changes
        return with_header(data, header)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "it has 0 bytes"),
        (lambda data: data[:5], "it has 5 bytes"),
        (lambda data: data[:-1], "its tensors need .* bytes and it has"),
        (lambda data: data + b"\0", "its tensors need .* bytes and it has"),
        (lambda data: data[:200], "its header should have .* bytes"),
        (lambda data: b"\xff" * 8 + data[8:], "its header should have .* bytes"),
        (lambda data: struct.pack("<Q", 0) + data[8:], "its header should have .* bytes"),
        (lambda data: with_header(data, b"not json"), "its header is no JSON"),
        (lambda data: with_header(data, b"[" * 200_000), "its header is no JSON"),
        (lambda data: with_header(data, []), "its header is no JSON object"),
        (lambda data: b"PK\x03\x04" + data, "its header should have .* bytes"),
        (edited(Q, data_offsets=[0, 8192]), "tensor .* begins at byte"),
        (edited(Q, data_offsets=[0, 4]), f"entry for tensor {Q} makes no sense"),
        (edited(Q, data_offsets=[8192, 0]), f"entry for tensor {Q} makes no sense"),
        (edited(Q, data_offsets="0"), f"entry for tensor {Q} makes no sense"),
        (edited(Q, shape=[-64, -32]), f"entry for tensor {Q} makes no sense"),
        (edited(Q, shape=[64, 32.0]), f"entry for tensor {Q} makes no sense"),
        (edited(Q, shape=[10**30, 10**30]), f"entry for tensor {Q} makes no sense"),
        (edited(Q, dtype=3), f"entry for tensor {Q} makes no sense"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(checkpoint: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(checkpoint, device=CPU)
    assert str(file) in caught.value.message


def test_a_file_that_shrinks_while_it_is_read(checkpoint: Path) -> None:
    def shrink(done: int, total: int) -> None:
        with (checkpoint / "model.safetensors").open("r+b") as stream:
            stream.truncate(1 << 20)

    config = {**CONFIG, "vocab_size": 60_000, "hidden_size": 256}  # far more than the reads that are under way
    write(checkpoint, config, random_tensors(config))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* cannot be read: the file ends before it"):
        load_model(checkpoint, device=CPU, progress=shrink)


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


def test_a_dtype_of_the_future_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(edited(Q, dtype="F4_NEW")(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"tensor {Q} has the dtype F4_NEW"):
        load_model(checkpoint, device=CPU)


def test_config_and_weights_of_different_models(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 10_000, "num_experts": 60_000}))
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight has the shape \[4, 32\]"):
        load_model(checkpoint, device=CPU)


def test_an_unsupported_model_is_refused_before_its_weights_are_looked_at(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "router_bias": True}))
    with pytest.raises(UnsupportedModelError, match="router_bias = True"):
        load_model(checkpoint, device=CPU)


# ---------------------------------------------------------------------------------------------------------- indexes


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write(tmp_path / "sharded", CONFIG, random_tensors(CONFIG), num_shards=2)


def reindex(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names model-00002-of-00002\.safetensors, which is missing"):
        load_model(sharded, device=CPU)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../x.safetensors",
        "model.bin",
        "..\\x.safetensors",
        "a\0.safetensors",
        "a" * 300 + ".safetensors",
        7,
    ],
)
def test_an_index_never_leads_out_of_the_folder(sharded: Path, name: Any) -> None:
    write(sharded.parent, CONFIG, random_tensors(CONFIG))  # what ../model.safetensors would find
    reindex(sharded, lambda weight_map: weight_map.update({Q: name}))
    with pytest.raises(CheckpointError, match="which is no safetensors file inside the folder"):
        load_model(sharded, device=CPU)


def test_an_index_and_files_that_disagree(sharded: Path) -> None:
    reindex(sharded, lambda weight_map: weight_map.pop(Q))
    with pytest.raises(CheckpointError, match=f"holds {Q}, which .* says is nowhere"):
        load_model(sharded, device=CPU)
    reindex(sharded, lambda weight_map: weight_map.update({Q: "model-00001-of-00002.safetensors"}))
    reindex(sharded, lambda weight_map: weight_map.update({"ghost": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match=f"ghost is in model-00001|{Q}, which .* says is in model-00001"):
        load_model(sharded, device=CPU)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "nonsense"])
def test_an_index_that_is_none(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json (has no weight_map|is not valid JSON)"):
        load_model(sharded, device=CPU)


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


# ---------------------------------------------------------------------------------------- what a checkpoint advises


def test_generation_defaults(checkpoint: Path) -> None:
    assert load_generation_config(checkpoint) == GenerationDefaults()
    (checkpoint / "generation_config.json").write_text(
        json.dumps(
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "min_p": None,
                "repetition_penalty": 1,
                "eos_token_id": [3, 4, 3],
                "transformers_version": "5.24.0",
            }
        )
    )
    assert load_generation_config(checkpoint) == GenerationDefaults(
        temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.0, eos_token_ids=(3, 4)
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.6"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", 2.5),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, None]),
        ("eos_token_id", -1),
    ],
)
def test_wrong_advice_is_named(checkpoint: Path, field: str, value: Any) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {field} is ") as caught:
        load_generation_config(checkpoint)
    assert caught.value.param == field


def test_the_tokens_that_end_a_sequence(checkpoint: Path) -> None:
    assert eos_token_ids(checkpoint) == (7,)
    (checkpoint / "generation_config.json").write_text('{"temperature": 1.0}')
    assert eos_token_ids(checkpoint) == (7,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 6, 50279]}')
    assert eos_token_ids(checkpoint) == (5, 6), "an id beyond the vocabulary can never be drawn"
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": None}))
    assert eos_token_ids(checkpoint) == ()
