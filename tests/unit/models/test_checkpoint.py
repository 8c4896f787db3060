"""The files of a checkpoint: each way a folder, a file or an index can be wrong is an error that names it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import CheckpointError
from tests.support.checkpoints import CONFIG, INDEX, random_tensors, write
from workers.models.loader import load_model

CPU = torch.device("cpu")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint", CONFIG, random_tensors(CONFIG))


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


def test_a_dtype_of_the_future_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(edited(Q, dtype="F4_NEW")(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"tensor {Q} has the dtype F4_NEW"):
        load_model(checkpoint, device=CPU)


def test_a_file_that_shrinks_while_it_is_read(checkpoint: Path) -> None:
    def shrink(done: int, total: int) -> None:
        with (checkpoint / "model.safetensors").open("r+b") as stream:
            stream.truncate(1 << 20)

    config = {**CONFIG, "vocab_size": 60_000, "hidden_size": 256}  # far more than the reads that are under way
    write(checkpoint, config, random_tensors(config))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* cannot be read: the file ends before it"):
        load_model(checkpoint, device=CPU, progress=shrink)


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
