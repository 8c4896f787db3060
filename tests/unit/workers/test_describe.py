"""`python -m workers.describe`: a model's shape for whoever places it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from cluster.protocol import ModelShape
from tests.support.checkpoints import CONFIG, random_tensors, write
from workers.cache.kv_cache import page_bytes
from workers.describe import describe
from workers.models.loader import load_experts, load_model

ROOT = Path(__file__).resolve().parents[3]
MIXED = {**CONFIG, "num_hidden_layers": 3, "mlp_only_layers": [1], "intermediate_size": 40}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.describe", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [False, True])
def test_sizes_are_those_that_loading_takes(tmp_path: Path, dtype: torch.dtype, is_tied: bool) -> None:
    config = {**MIXED, "tie_word_embeddings": is_tied}
    path = write(tmp_path, config, random_tensors(config, dtype))
    cpu, gpu = describe(path, torch.device("cpu")), describe(path, torch.device("cuda"))
    assert (cpu.num_layers, cpu.moe_layers, cpu.num_experts, cpu.max_model_len) == (3, (0, 2), 4, 64)
    assert gpu.dense_bytes * 4 == cpu.dense_bytes * dtype.itemsize
    spec, _ = load_model(path, device=torch.device("cpu"), with_experts=False, limit_bytes=cpu.dense_bytes)
    load_experts(path, ((1,), (), ()), device=torch.device("cpu"), limit_bytes=cpu.expert_bytes)
    assert cpu.kv_token_bytes == page_bytes(spec, 1, torch.float32)
    total = sum(4 * tensor.numel() for tensor in random_tensors(config).values())
    assert cpu.dense_bytes + 8 * cpu.expert_bytes == total


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    config = {**MIXED, "mlp_only_layers": [0, 1, 2]}
    shape = describe(write(tmp_path, config, random_tensors(config)), torch.device("cpu"))
    assert (shape.moe_layers, shape.num_experts) == ((), 0)


def test_one_line_of_json(tmp_path: Path) -> None:
    path = write(tmp_path, MIXED, random_tensors(MIXED))
    done = run(str(path), "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert msgspec.json.decode(done.stdout, type=ModelShape) == describe(path, torch.device("cpu"))


def test_what_is_wrong_is_one_line_of_its_own(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "config.json" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run(str(tmp_path), "--device", "tpu")
    assert done.returncode == 2
    assert "error: device 'tpu'" in done.stderr
