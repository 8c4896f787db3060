"""Which folders hold the same model, told without reading all of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import CheckpointError
from tests.support.checkpoints import CONFIG, random_tensors, write
from tests.support.tokenizers_ import build
from workers.models.fingerprint import SAMPLES, fingerprint

MANY = {**CONFIG, "num_experts": SAMPLES, "num_hidden_layers": 3}  # more experts of a kind than are looked at


def checkpoint(folder: Path, num_shards: int = 1, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    tensors = random_tensors(MANY, changes.pop("dtype", torch.float32))
    for name, change in changes.items():
        tensors[name.replace("__", ".")] = change(tensors[name.replace("__", ".")])
    return build("byte_level", write(folder, config or MANY, tensors, num_shards))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("ours"))


def test_the_same_content_is_the_same_wherever_and_however_it_lies(ours: Path, tmp_path: Path) -> None:
    known = fingerprint(ours)
    assert known == fingerprint(ours)
    copied = Path(shutil.copytree(ours, tmp_path / "copied"))
    os.utime(copied / "model.safetensors", (1, 1))
    config = json.loads((copied / "config.json").read_text())
    said = dict(reversed(config.items())) | {"_name_or_path": "/elsewhere", "transformers_version": "9.9"}
    (copied / "config.json").write_text(json.dumps(said, indent=4))
    assert fingerprint(copied) == known
    assert fingerprint(checkpoint(tmp_path / "shards", num_shards=3)) == known


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))

    return edit


@pytest.mark.parametrize(
    "change",
    [
        edited("config.json", rms_norm_eps=1e-5),
        edited("config.json", num_experts_per_tok=1),
        edited("generation_config.json", eos_token_id=[3, 4]),
        edited("tokenizer.json", truncation=None, padding=None, added=1),
    ],
    ids=["config", "top-k", "end", "tokenizer"],
)
def test_another_setting_is_another_model(ours: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(ours, tmp_path / "changed"))
    change(folder)
    assert fingerprint(folder) != fingerprint(ours)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
    ],
)
def test_another_tensor_of_any_kind_is_another_model(ours: Path, tmp_path: Path, name: str) -> None:
    changed = checkpoint(tmp_path, **{name.replace(".", "__"): lambda tensor: tensor * 1.01})
    assert fingerprint(changed) != fingerprint(ours)


def test_finetuned_experts_and_another_rounding_are_other_models(ours: Path, tmp_path: Path) -> None:
    names = [name for name in random_tensors(MANY) if name.endswith("down_proj.weight")]
    assert len(names) == 3 * SAMPLES
    tuned = checkpoint(tmp_path / "tuned", **{name.replace(".", "__"): lambda tensor: tensor + 1e-3 for name in names})
    rounded = checkpoint(tmp_path / "rounded", dtype=torch.bfloat16)
    assert len({fingerprint(folder) for folder in (ours, tuned, rounded)}) == 3


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        fingerprint(folder)
