"""From a folder in Hugging Face layout to the fused weights that the decoder reads.

Everything is checked from the headers first: names, shapes, dtypes, room. Then each tensor is read once, straight into
its place where that has the file's dtype and order and is on the host, otherwise through a small buffer. So the peak
of host memory is the weights themselves.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import torch

from cluster.errors import CheckpointError
from workers.models.checkpoint import (
    DTYPES,
    MAX_ITEMSIZE,
    TensorEntry,
    majority_dtype,
    read_config,
    read_entries,
    read_json,
)
from workers.models.families import DERIVED_SUFFIX, family_of, spec_from_config, weight_parts
from workers.models.spec import ModelSpec
from workers.models.weights import (
    AttentionWeights,
    DenseWeights,
    ExpertWeights,
    LayerWeights,
    ModelWeights,
    MoEWeights,
)

NUM_READERS = 4
PIECE_BYTES = 2 << 20  # of one read
SERIAL_NUMBERS = 1 << 15  # torch shares out larger copies, and would fight the readers for the processors

Progress = Callable[[int, int], None]  # bytes of the checkpoint read so far, and in all


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    limit_bytes: int | None = None,
    laid_out: bool = False,
) -> tuple[ModelSpec, ModelWeights]:
    """The architecture and the weights of the checkpoint in folder `path`.

    `dtype` None: the checkpoint's own on a GPU, float32 on a CPU. `limit_bytes`: the memory that the weights may take.
    `laid_out`: matrices lie in memory as products on a CPU read them (see `empty_weights`). Raises `CheckpointError`
    naming file and tensor, or `UnsupportedModelError` for what is not built; no memory is taken before names, shapes
    and dtypes are found right.
    """
    config = read_config(path)
    spec = spec_from_config(config)
    entries = read_entries(path)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else majority_dtype(entries)
    layouts = family_of(config).moe_layouts
    outline = empty_weights(spec, torch.device("meta"), dtype)
    needed_bytes = 0
    seen = set()
    for name, part in weight_parts(spec, outline, layouts, entries):
        _check_entry(path, name, entries.get(name), part)
        seen.add(name)
        needed_bytes += part.nbytes
    _check_extra(entries, seen, spec)
    if limit_bytes is not None and needed_bytes > limit_bytes:
        raise CheckpointError(
            f"the weights of {path} take {_gib(needed_bytes)} in {_name(dtype)}, and {_gib(limit_bytes)} are free on "
            f"{device}: take a smaller model or a larger machine"
        )
    try:
        weights = empty_weights(spec, device, dtype, laid_out)
    except RuntimeError as error:  # also torch.OutOfMemoryError
        raise CheckpointError(f"no room on {device} for the {_gib(needed_bytes)} of {path}: {error}") from error
    _read(entries, dict(weight_parts(spec, weights, layouts, entries)), progress)
    if spec.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= entries.keys():
        _check_tied(entries["lm_head.weight"], weights.embedding)
    return spec, weights


def empty_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype, laid_out: bool = False) -> ModelWeights:
    """Weights of the right shapes with nothing in them; on the device "meta", shapes alone.

    `laid_out`: a matrix [..., out, in] lies in memory as [..., in, out], see `workers.numerics.laid_out`; a tied
    embedding as well, whose lookup then gathers a column, which costs less than a second copy.
    """

    def vector(size: int) -> torch.Tensor:
        return torch.empty(size, device=device, dtype=dtype)

    def matrix(*shape: int) -> torch.Tensor:
        if not laid_out:
            return torch.empty(shape, device=device, dtype=dtype)
        *lead, num_out, num_in = shape
        return torch.empty((*lead, num_in, num_out), device=device, dtype=dtype).transpose(-1, -2)

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
                experts=ExpertWeights(
                    gate_up=matrix(moe.num_experts, 2 * moe.intermediate, spec.hidden),
                    down=matrix(moe.num_experts, spec.hidden, moe.intermediate),
                ),
                shared=dense(moe.shared_intermediate) if moe.shared_intermediate else None,
                shared_gate=matrix(1, spec.hidden) if moe.shared_intermediate else None,
            )
        layers.append(LayerWeights(attention, vector(spec.hidden), mlp))
    lm_head = matrix(spec.vocab_size, spec.hidden)
    embedding = lm_head if spec.tie_embeddings else torch.empty(lm_head.shape, device=device, dtype=dtype)
    return ModelWeights(embedding, tuple(layers), vector(spec.hidden), lm_head)


# ------------------------------------------------------------------------------------------------------- checking


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
    if entry.shape == tuple(embedding.shape) and entry.dtype in DTYPES:
        buffer = torch.empty(_buffer_bytes([embedding]), dtype=torch.uint8)
        with _opened({"lm_head.weight": entry}) as files:
            same = all(
                torch.equal(_numbers(piece, files, buffer).to(embedding.dtype), piece.target.cpu())
                for piece in _pieces("lm_head.weight", entry, embedding)
            )
        if same:
            return
    raise CheckpointError(
        f"{entry.file}: config.json says tie_word_embeddings, but lm_head.weight differs from the embedding: set "
        "tie_word_embeddings to false there, or remove the tensor"
    )


# -------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some of a tensor's numbers: where they lie, and where they go."""

    name: str
    entry: TensorEntry
    offset: int  # in the file
    target: torch.Tensor  # [n] or, where that is no run of memory, [rows, in]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.entry.dtype]

    @property
    def num_bytes(self) -> int:
        return self.target.numel() * self.dtype.itemsize

    @property
    def is_direct(self) -> bool:
        """The file's bytes are the target's."""
        target = self.target
        return target.device.type == "cpu" and target.dtype == self.dtype and target.is_contiguous()


def _pieces(name: str, entry: TensorEntry, part: torch.Tensor) -> Iterator[_Piece]:
    runs = [part.view(-1)] if part.is_contiguous() else part.unbind() if part.dim() == 3 else [part]
    offset = entry.offset
    for run in runs:
        row_bytes = run[:1].numel() * DTYPES[entry.dtype].itemsize
        for target in run.split(max(1, PIECE_BYTES // row_bytes)):
            yield _Piece(name, entry, offset, target)
            offset += target.numel() * DTYPES[entry.dtype].itemsize


def _buffer_bytes(parts: Iterable[torch.Tensor]) -> int:
    """What the largest piece of these needs: a few rows, or one very long one."""
    return max(PIECE_BYTES, *(part.shape[-1] * MAX_ITEMSIZE for part in parts))


def _read(entries: Mapping[str, TensorEntry], parts: Mapping[str, torch.Tensor], progress: Progress | None) -> None:
    """Fill `parts` from the files, in the files' order, several pieces at a time."""
    entries = {name: entry for name, entry in entries.items() if name in parts}
    total = sum(entry.num_bytes for entry in entries.values())
    done = 0
    pinned = any(part.device.type == "cuda" for part in parts.values())
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(NUM_READERS):
        buffers.put(torch.empty(_buffer_bytes(parts.values()), dtype=torch.uint8, pin_memory=pinned))

    def transfer(piece: _Piece) -> int:
        if piece.is_direct:
            _numbers(piece, files, None)
            return piece.num_bytes
        buffer = buffers.get_nowait()  # there are as many as readers
        try:
            _copy(_numbers(piece, files, buffer), piece.target)
        finally:
            buffers.put(buffer)
        return piece.num_bytes

    def finish(future: Future[int]) -> None:
        nonlocal done
        done += future.result()
        if progress is not None:
            progress(done, total)

    with _opened(entries) as files, ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read-weights") as pool:
        under_way: deque[Future[int]] = deque()
        for name, entry in entries.items():
            for piece in _pieces(name, entry, parts[name]):
                if len(under_way) == 2 * NUM_READERS:
                    finish(under_way.popleft())
                under_way.append(pool.submit(transfer, piece))
        for future in under_way:
            finish(future)


def _copy(numbers: torch.Tensor, target: torch.Tensor) -> None:
    if target.device.type == "cpu":
        count = max(1, SERIAL_NUMBERS // numbers[:1].numel())
        for source, into in zip(numbers.split(count), target.split(count), strict=True):
            into.copy_(source)
    else:
        target.copy_(numbers)


def _numbers(piece: _Piece, files: Mapping[Path, int], buffer: torch.Tensor | None) -> torch.Tensor:
    """Read a piece into `buffer`, or without one into its target; -> its numbers in the target's shape, as they are."""
    numbers = piece.target
    if buffer is not None:
        numbers = buffer[: piece.num_bytes].view(piece.dtype).view(piece.target.shape)
    view = numbers.view(-1).view(torch.uint8).numpy().data
    offset = piece.offset

    def fail(problem: object) -> NoReturn:
        raise CheckpointError(
            f"{piece.entry.file}: tensor {piece.name} cannot be read: {problem}. Fetch the file again"
        )

    while view:
        try:
            count = os.preadv(files[piece.entry.file], [view], offset)
        except OSError as error:
            fail(error)
        if count == 0:
            fail("the file ends before it")
        view, offset = view[count:], offset + count
    return numbers


@contextmanager
def _opened(entries: Mapping[str, TensorEntry]) -> Iterator[Mapping[Path, int]]:
    """The descriptors of the entries' files, closed at the end."""
    files: dict[Path, int] = {}
    try:
        for entry in entries.values():
            if entry.file not in files:
                try:
                    files[entry.file] = os.open(entry.file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{entry.file} cannot be opened: {error}") from error
        yield files
    finally:
        for descriptor in files.values():
            os.close(descriptor)


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
