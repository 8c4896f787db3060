"""The files of a checkpoint in Hugging Face layout: JSON, and the headers of safetensors. Reads no tensor.

Only safetensors (https://github.com/huggingface/safetensors: 8 bytes of length, a JSON header, the data) are opened;
pickle never is, because to read one is to run it. Headers are read here because the data is then read with `pread`
straight into its place: a mapping would count against the process's memory a second time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch

from cluster.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_JSON_BYTES = 256 << 20
MAX_HEADER_BYTES = 100_000_000  # the format's own bound

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_ITEMSIZE = max(dtype.itemsize for dtype in DTYPES.values())
NUM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's bytes lie. `dtype` is the file's own word for it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    num_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` where the file is missing, huge or no JSON object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: this is no such file of a model")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object: fetch it again")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint's folder. Raises `CheckpointError` where either is missing."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: give the folder that holds config.json and the safetensors files")
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json: it is not a checkpoint in Hugging Face layout")
    return read_json(path / "config.json")


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in folder `path`, in the order of files and offsets.

    Raises `CheckpointError` naming the file (and the tensor) for pickles, missing, truncated or corrupt files, and
    for an index that disagrees with its files or leads out of the folder.
    """
    if (path / INDEX).exists():
        return _read_indexed(path)
    if (path / SINGLE).exists():
        return _read_header(path / SINGLE)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _read_header(files[0])
    if files:
        raise CheckpointError(
            f"{path} has {len(files)} safetensors files ({files[0].name}, …) but no {INDEX}: fetch that as well"
        )
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} has only pickled weights ({pickles[0]}), which are never opened, because a pickle can run any "
            "code: take a revision with safetensors files, or convert it where you trust it, with transformers' "
            "save_pretrained"
        )
    raise CheckpointError(f"{path} has no safetensors files: fetch the model's weights")


def _read_indexed(path: Path) -> dict[str, TensorEntry]:
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: fetch it again")
    names = sorted({str(file) for file in weight_map.values()})
    for name in names:
        if not _stays_inside(name):
            raise CheckpointError(f"{index} names {name[:200]!r}, which is no safetensors file inside the folder")
        if not (path / name).exists():
            raise CheckpointError(f"{index} names {name}, which is missing: fetch it into {path}")
    entries: dict[str, TensorEntry] = {}
    for name in names:
        for tensor, entry in _read_header(path / name).items():
            if weight_map.get(tensor) != name:
                where = f"in {weight_map[tensor]}" if tensor in weight_map else "nowhere"
                raise CheckpointError(f"{path / name} holds {tensor}, which {INDEX} says is {where}: fetch both again")
            entries[tensor] = entry
    for tensor, name in weight_map.items():
        if tensor not in entries:
            raise CheckpointError(f"{INDEX} says that {tensor} is in {name}, but {path / str(name)} has none")
    return entries


def _stays_inside(name: str) -> bool:
    """`name` is a relative path of a safetensors file that leads no step up."""
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and len(name) <= 200
        and path.suffix == ".safetensors"
        and not {"\\", "\0"} & set(name)
    )


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, by offset."""

    def corrupt(problem: str) -> NoReturn:
        raise CheckpointError(f"{file} is not a whole safetensors file: {problem}. Fetch it again")

    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if len(start) < 8:
                corrupt(f"it has {size} bytes")
            length = struct.unpack("<Q", start)[0]
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                corrupt(f"its header should have {length} bytes and the file has {size}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        corrupt(f"its header is no JSON ({error})")
    if not isinstance(header, dict):
        corrupt("its header is no JSON object")
    header.pop("__metadata__", None)
    data_start, data_bytes = 8 + length, size - 8 - length
    entries = {name: _entry(file, name, value, data_start) for name, value in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1].offset))
    at = data_start
    for name, entry in entries.items():
        if entry.offset != at:
            corrupt(f"tensor {name} begins at byte {entry.offset}, not at {at}")
        at += entry.num_bytes
    if at != data_start + data_bytes:
        corrupt(f"its tensors need {at - data_start} bytes and it has {data_bytes}")
    return entries


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            known = NUM_BYTES.get(dtype)
            if (
                all(type(size) is int and size >= 0 for size in shape)
                and 0 <= begin <= end
                and (known is None or prod(shape) * known == end - begin)
            ):
                return TensorEntry(file, dtype, tuple(shape), data_start + begin, end - begin)
    raise CheckpointError(f"{file}: the header's entry for tensor {name} makes no sense: {str(value)[:200]}")


def majority_dtype(entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """The dtype that most bytes of the weights have."""
    totals = dict.fromkeys(DTYPES, 0)
    for entry in entries.values():
        if entry.dtype in totals:
            totals[entry.dtype] += entry.num_bytes
    return DTYPES[max(totals, key=lambda dtype: totals[dtype])]
