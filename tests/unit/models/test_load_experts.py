"""Parts of a checkpoint: a shard's experts, and everything but the experts, equal to the whole and no larger."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError, ConfigError
from tests.support.checkpoints import CONFIG, Tensors, random_tensors, write
from workers.models.loader import expert_bytes, load_experts, load_model
from workers.models.spec import ModelSpec
from workers.models.weights import DenseWeights, MoEWeights

CPU = torch.device("cpu")
MIXED = {**CONFIG, "num_hidden_layers": 3, "mlp_only_layers": [1], "intermediate_size": 40}
IDS = ((0, 3), (), (1, 2, 3))


def fused(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """The experts of each layer in one tensor, as transformers 5 has them in memory."""
    tensors = dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        if f"{prefix}gate.weight" in tensors:
            gate, up, down = (
                [tensors.pop(f"{prefix}experts.{i}.{name}_proj.weight") for i in range(config["num_experts"])]
                for name in ("gate", "up", "down")
            )
            tensors[f"{prefix}experts.gate_up_proj"] = torch.stack(
                [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            )
            tensors[f"{prefix}experts.down_proj"] = torch.stack(down)
    return tensors


def checkpoint(folder: Path, layout: str, dtype: torch.dtype = torch.float32, num_shards: int = 1) -> Path:
    tensors = random_tensors(MIXED, dtype)
    return write(folder, MIXED, fused(MIXED, tensors) if layout == "fused" else tensors, num_shards)


@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
@pytest.mark.parametrize(("dtype", "num_shards"), [(torch.float32, 1), (torch.bfloat16, 3)])
def test_a_shard_equals_its_part_of_the_whole(
    tmp_path: Path, layout: str, laid_out: bool, dtype: torch.dtype, num_shards: int
) -> None:
    path = checkpoint(tmp_path, layout, dtype, num_shards)
    _, weights = load_model(path, device=CPU, laid_out=laid_out)
    shard = load_experts(path, IDS, device=CPU, laid_out=laid_out)
    assert shard.expert_ids == IDS
    assert shard.weights[1] is None
    for layer, ids in enumerate(IDS):
        whole, part = weights.layers[layer].mlp, shard.weights[layer]
        if isinstance(whole, MoEWeights):
            assert whole.experts is not None
            assert part is not None
            assert torch.equal(part.gate_up, whole.experts.gate_up[list(ids)])
            assert torch.equal(part.down, whole.experts.down[list(ids)])
            assert part.gate_up.stride()[1:] == whole.experts.gate_up.stride()[1:]
            assert part.down.stride()[1:] == whole.experts.down.stride()[1:]


def test_nothing_is_a_shard_too(tmp_path: Path) -> None:
    shard = load_experts(checkpoint(tmp_path, "per_expert"), ((), (), ()), device=CPU)
    assert shard.weights == [None, None, None]


@pytest.mark.parametrize(
    "ids", [((0,), ()), ((0,), (0,), ()), ((4,), (), ()), ((-1,), (), ()), ((1, 0), (), ()), ((0, 0), (), ())]
)
def test_experts_that_the_model_does_not_have_are_named(tmp_path: Path, ids: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ConfigError, match="experts") as caught:
        load_experts(checkpoint(tmp_path, "per_expert"), ids, device=CPU)
    assert caught.value.param == "experts"


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_all_but_the_experts(tmp_path: Path, layout: str) -> None:
    path = checkpoint(tmp_path, layout)
    spec, whole = load_model(path, device=CPU)
    seen: list[tuple[int, int]] = []
    _, weights = load_model(path, device=CPU, with_experts=False, progress=lambda *at: seen.append(at))
    assert torch.equal(weights.embedding, whole.embedding)
    for layer, expected in zip(weights.layers, whole.layers, strict=True):
        assert torch.equal(layer.attention.qkv, expected.attention.qkv)
        if isinstance(layer.mlp, DenseWeights):
            assert isinstance(expected.mlp, DenseWeights)
            assert torch.equal(layer.mlp.down, expected.mlp.down)
        else:
            assert isinstance(expected.mlp, MoEWeights)
            assert layer.mlp.experts is None
            assert torch.equal(layer.mlp.router, expected.mlp.router)
    assert seen[-1] == (dense_bytes(spec), dense_bytes(spec))


def dense_bytes(spec: ModelSpec) -> int:
    total = sum(tensor.nbytes for tensor in random_tensors(MIXED).values())
    return total - sum(spec.num_experts) * expert_bytes(spec, torch.float32)


def test_room_is_needed_for_what_is_loaded_alone(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "per_expert")
    spec, _ = load_model(path, device=CPU, with_experts=False)
    load_model(path, device=CPU, with_experts=False, limit_bytes=dense_bytes(spec))
    with pytest.raises(CheckpointError, match="are free on cpu"):
        load_model(path, device=CPU, with_experts=False, limit_bytes=dense_bytes(spec) - 1)
    five = 5 * expert_bytes(spec, torch.float32)
    load_experts(path, IDS, device=CPU, limit_bytes=five)
    with pytest.raises(CheckpointError, match="are free on cpu"):
        load_experts(path, IDS, device=CPU, limit_bytes=five - 1)


@pytest.mark.parametrize("without", ["model.layers.2.mlp.experts.0.up_proj.weight", "model.norm.weight"])
def test_the_whole_checkpoint_is_checked_whatever_is_loaded(tmp_path: Path, without: str) -> None:
    tensors = random_tensors(MIXED)
    del tensors[without]
    path = write(tmp_path, MIXED, tensors)
    with pytest.raises(CheckpointError, match=without):
        load_model(path, device=CPU, with_experts=False)
    with pytest.raises(CheckpointError, match=without):
        load_experts(path, IDS, device=CPU)


MEMORY_CHILD = """
import re, sys
from pathlib import Path
import torch
from workers.models.loader import load_experts, load_model

def peak_bytes():  # not getrusage's, which starts from the parent's peak
    return int(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

cpu, folder, small = torch.device("cpu"), Path(sys.argv[1]), Path(sys.argv[2])
load_model(small, device=cpu, laid_out=True)  # what torch and the threads take at first use is no weight
before = peak_bytes()
dense = load_model(folder, device=cpu, laid_out=True, with_experts=False)
print(peak_bytes() - before)
before = peak_bytes()
shard = load_experts(folder, ((0, 5, 9, 11), (2, 3, 20, 31)), device=cpu, laid_out=True)
print(peak_bytes() - before)
"""


@pytest.mark.needs("linux")
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_the_peak_of_host_memory(tmp_path: Path, layout: str) -> None:
    config = {**CONFIG, "vocab_size": 8000, "hidden_size": 1024, "num_experts": 32, "moe_intermediate_size": 512}
    tensors = random_tensors(config, torch.bfloat16)
    folder = write(tmp_path / "large", config, fused(config, tensors) if layout == "fused" else tensors)
    small = write(tmp_path / "small", CONFIG, random_tensors(CONFIG, torch.bfloat16))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, str(folder), str(small)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    dense_peak, shard_peak = map(int, done.stdout.split())
    experts = 8 * 3 * 1024 * 512 * 4
    dense = sum(4 * tensor.numel() for tensor in tensors.values()) - 8 * experts
    assert 0.9 * dense <= dense_peak <= 1.2 * dense
    assert 0.85 * experts <= shard_peak <= 1.3 * experts
