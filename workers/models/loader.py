"""From a folder in Hugging Face layout to the fused weights that the decoder reads.

Everything is checked from the headers first: names, shapes, dtypes, room. Then each tensor is read once, into its place
(`workers.models.reading`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from cluster.errors import CheckpointError
from workers.experts.shard import ExpertIds, Shard, check_expert_ids
from workers.models.checkpoint import DTYPES, TensorEntry, majority_dtype, read_config, read_entries, read_json
from workers.models.families import DERIVED_SUFFIX, MoENames, expert_parts, family_of, spec_from_config, weight_parts
from workers.models.reading import Progress, Wanted, holds, read_tensors
from workers.models.spec import ModelSpec
from workers.models.weights import (
    AttentionWeights,
    DenseWeights,
    ExpertWeights,
    LayerWeights,
    ModelWeights,
    MoEWeights,
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, shapes and dtypes were found right. None of its tensors is read yet."""

    path: Path
    spec: ModelSpec
    dtype: torch.dtype  # that its weights take on the device
    layouts: Sequence[MoENames]
    entries: Mapping[str, TensorEntry]


def open_checkpoint(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Checkpoint:
    """The checkpoint in folder `path`. `dtype` None: its own on a GPU, float32 on a CPU.

    Raises `CheckpointError` naming file and tensor, or `UnsupportedModelError` for what is not built.
    """
    config = read_config(path)
    spec = spec_from_config(config)
    entries = read_entries(path)
    if dtype is None:
        # bf16 products on a CPU can be a hundred times slower than fp32, and are never needed for parity.
        dtype = torch.float32 if device.type == "cpu" else majority_dtype(entries)
    layouts = family_of(config).moe_layouts
    seen = set()
    for name, part in weight_parts(spec, empty_weights(spec, torch.device("meta"), dtype), layouts, entries):
        _check_entry(path, name, entries.get(name), part)
        seen.add(name)
    _check_extra(entries, seen, spec)
    return Checkpoint(path, spec, dtype, layouts, entries)


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    limit_bytes: int | None = None,
    laid_out: bool = False,
    with_experts: bool = True,
) -> tuple[ModelSpec, ModelWeights]:
    """The architecture and the weights of the checkpoint in folder `path`.

    `limit_bytes`: the memory that the weights may take. `laid_out`: matrices lie in memory as products on a CPU read
    them (see `empty_weights`). Without `with_experts` the routed experts are checked, and neither read nor given room.
    Raises what `open_checkpoint` raises, before any memory is taken, and `CheckpointError` for a tensor that cannot be
    read.
    """
    checkpoint = open_checkpoint(path, device, dtype)
    spec, dtype, entries = checkpoint.spec, checkpoint.dtype, checkpoint.entries
    outline = empty_weights(spec, torch.device("meta"), dtype, with_experts=with_experts)
    needed_bytes = sum(part.nbytes for _, part in weight_parts(spec, outline, checkpoint.layouts, entries))
    _check_room(path, needed_bytes, dtype, limit_bytes, device)
    try:
        weights = empty_weights(spec, device, dtype, laid_out, with_experts)
    except RuntimeError as error:  # also torch.OutOfMemoryError
        raise _no_room(path, needed_bytes, device, error) from error
    parts = weight_parts(spec, weights, checkpoint.layouts, entries)
    read_tensors([Wanted(name, entries[name], part) for name, part in parts], progress)
    if spec.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= entries.keys():
        _check_tied(entries["lm_head.weight"], weights.embedding)
    return spec, weights


def load_experts(
    path: Path,
    expert_ids: ExpertIds,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    limit_bytes: int | None = None,
    laid_out: bool = False,
) -> Shard:
    """Some routed experts of the checkpoint in folder `path`, by layer, ids ascending; nothing else is read.

    As `load_model`, whose experts they equal. Raises `ConfigError` for experts that the model does not have.
    """
    checkpoint = open_checkpoint(path, device, dtype)
    spec, dtype, entries = checkpoint.spec, checkpoint.dtype, checkpoint.entries
    check_expert_ids(expert_ids, spec.num_experts)
    needed_bytes = sum(map(len, expert_ids)) * expert_bytes(spec, dtype)
    _check_room(path, needed_bytes, dtype, limit_bytes, device)
    try:
        weights = [_empty_experts(spec, len(ids), device, dtype, laid_out) if ids else None for ids in expert_ids]
    except RuntimeError as error:
        raise _no_room(path, needed_bytes, device, error) from error
    wanted = [
        Wanted(name, entries[name] if row is None else _row(entries[name], row), part)
        for layer, (ids, experts) in enumerate(zip(expert_ids, weights, strict=True))
        if experts is not None
        for name, row, part in expert_parts(layer, ids, experts, checkpoint.layouts, entries)
    ]
    read_tensors(wanted)
    return Shard(expert_ids, weights)


def expert_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """What one routed expert takes; 0 for a dense model."""
    return 3 * spec.hidden * spec.moe.intermediate * dtype.itemsize if spec.moe is not None else 0


def empty_weights(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, laid_out: bool = False, with_experts: bool = True
) -> ModelWeights:
    """Weights of the right shapes with nothing in them; on the device "meta", shapes alone.

    `laid_out`: a matrix [..., out, in] lies in memory as [..., in, out], see `workers.numerics.laid_out`; a tied
    embedding as well, whose lookup then gathers a column, which costs less than a second copy.
    """

    def vector(size: int) -> torch.Tensor:
        return torch.empty(size, device=device, dtype=dtype)

    def matrix(num_out: int, num_in: int) -> torch.Tensor:
        return _empty_matrix((num_out, num_in), device, dtype, laid_out)

    def dense(intermediate: int) -> DenseWeights:
        return DenseWeights(
            gate_up=matrix(2 * intermediate, spec.hidden),
            gate_up_bias=vector(2 * intermediate) if spec.mlp_bias else None,
            down=matrix(spec.hidden, intermediate),
            down_bias=vector(spec.hidden) if spec.mlp_bias else None,
        )

    width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    normed = {"none": None, "head": (spec.head_dim, spec.head_dim), "full": (width, kv_width)}[spec.qk_norm]
    layers = []
    for layer in spec.layers:
        attention = AttentionWeights(
            norm=vector(spec.hidden),
            qkv=matrix(width + 2 * kv_width, spec.hidden),
            qkv_bias=vector(width + 2 * kv_width) if spec.qkv_bias else None,
            q_norm=None if normed is None else vector(normed[0]),
            k_norm=None if normed is None else vector(normed[1]),
            out=matrix(spec.hidden, width),
            out_bias=vector(spec.hidden) if spec.o_bias else None,
        )
        mlp: DenseWeights | MoEWeights
        if layer.mlp == "dense":
            mlp = dense(spec.intermediate)
        else:
            moe = spec.moe
            assert moe is not None
            mlp = MoEWeights(
                router=matrix(moe.num_experts, spec.hidden),
                experts=_empty_experts(spec, moe.num_experts, device, dtype, laid_out) if with_experts else None,
                shared=dense(moe.shared_intermediate) if moe.shared_intermediate else None,
                shared_gate=matrix(1, spec.hidden) if moe.shared_intermediate else None,
            )
        layers.append(LayerWeights(attention, vector(spec.hidden), mlp))
    lm_head = matrix(spec.vocab_size, spec.hidden)
    embedding = lm_head if spec.tie_embeddings else torch.empty(lm_head.shape, device=device, dtype=dtype)
    return ModelWeights(embedding, tuple(layers), vector(spec.hidden), lm_head)


def _empty_experts(
    spec: ModelSpec, count: int, device: torch.device, dtype: torch.dtype, laid_out: bool
) -> ExpertWeights:
    assert spec.moe is not None
    inner = spec.moe.intermediate
    return ExpertWeights(
        gate_up=_empty_matrix((count, 2 * inner, spec.hidden), device, dtype, laid_out),
        down=_empty_matrix((count, spec.hidden, inner), device, dtype, laid_out),
    )


def _empty_matrix(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, laid_out: bool) -> torch.Tensor:
    """[..., out, in]; see `empty_weights`."""
    if not laid_out:
        return torch.empty(shape, device=device, dtype=dtype)
    *lead, num_out, num_in = shape
    return torch.empty((*lead, num_in, num_out), device=device, dtype=dtype).transpose(-1, -2)


def _row(entry: TensorEntry, row: int) -> TensorEntry:
    """Where a row of a tensor's first dimension lies."""
    shape = entry.shape[1:]
    num_bytes = prod(shape) * DTYPES[entry.dtype].itemsize
    return TensorEntry(entry.file, entry.dtype, shape, entry.offset + row * num_bytes, num_bytes)


# ------------------------------------------------------------------------------------------------------- checking


def _check_room(path: Path, needed_bytes: int, dtype: torch.dtype, limit: int | None, device: torch.device) -> None:
    if limit is not None and needed_bytes > limit:
        raise CheckpointError(
            f"the weights of {path} take {_gib(needed_bytes)} in {_name(dtype)}, and {_gib(limit)} are free on "
            f"{device}: take a smaller model or a larger machine"
        )


def _no_room(path: Path, needed_bytes: int, device: torch.device, error: Exception) -> CheckpointError:
    return CheckpointError(f"no room on {device} for the {_gib(needed_bytes)} of {path}: {error}")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_entry(path: Path, name: str, entry: TensorEntry | None, part: torch.Tensor) -> None:
    if entry is None:
        raise CheckpointError(
            f"{path}: tensor {name}, which config.json asks for, is in none of the safetensors files: config.json and "
            "weights do not belong together, or a file is missing"
        )
    if entry.shape != tuple(part.shape):
        raise CheckpointError(
            f"{entry.file}: tensor {name} has the shape {list(entry.shape)}, and config.json asks for "
            f"{list(part.shape)}: they do not belong together"
        )
    if entry.dtype not in DTYPES:
        raise CheckpointError(
            f"{entry.file}: tensor {name} has the dtype {entry.dtype}; {', '.join(DTYPES)} can be read: take a "
            "checkpoint in one of them"
        )


def _check_extra(entries: Mapping[str, TensorEntry], seen: set[str], spec: ModelSpec) -> None:
    extra = [name for name in entries if name not in seen and not name.endswith(DERIVED_SUFFIX)]
    if spec.tie_embeddings:  # both names of the one tensor may be there
        extra = [name for name in extra if name != "lm_head.weight"]
    if extra:
        more = f" and {len(extra) - 1} others" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{entries[extra[0]].file}: tensor {extra[0]}{more} would not be used: by config.json this {spec.family} "
            "has none of that name, so config.json and weights do not belong together"
        )


def _check_tied(entry: TensorEntry, embedding: torch.Tensor) -> None:
    """A checkpoint with tied embeddings may hold the matrix twice, but then it must be the same."""
    if (
        entry.shape == tuple(embedding.shape)
        and entry.dtype in DTYPES
        and holds(Wanted("lm_head.weight", entry, embedding))
    ):
        return
    raise CheckpointError(
        f"{entry.file}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding: set "
        "tie_word_embeddings to false there, or remove the tensor"
    )


# ----------------------------------------------------------------------------------------------- where sequences end


def eos_token_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end a sequence: `generation_config.json`'s where it names any, otherwise `config.json`'s.

    Without those beyond the vocabulary, which some checkpoints name and which can never be drawn. Raises
    `CheckpointError` for what is neither an id nor a list of them.
    """
    config = read_config(path)
    advice = path / "generation_config.json"
    ids = _token_ids(advice, read_json(advice).get("eos_token_id")) if advice.exists() else ()
    ids = ids or _token_ids(path / "config.json", config.get("eos_token_id"))
    return tuple(token for token in ids if token < spec_from_config(config).vocab_size)


def _token_ids(file: Path, value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise CheckpointError(
            f"{file}: eos_token_id is {value!r}, neither a token id nor a list of them", param="eos_token_id"
        )
    return tuple(dict.fromkeys(ids))
