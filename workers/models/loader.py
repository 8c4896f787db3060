"""From a folder in Hugging Face layout to the fused weights that the decoder reads.

Everything is checked from the headers first: names, shapes, dtypes, room. Then each tensor is read once, straight into
its place where the dtype is the same and the device is the host, otherwise through a few small buffers. So the peak of
host memory is the weights themselves.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from cluster.errors import CheckpointError
from workers.models.checkpoint import DTYPES, TensorEntry, majority_dtype, read_config, read_entries, read_json
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

Progress = Callable[[int, int], None]  # bytes of the checkpoint read so far, and in all


def load_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    limit_bytes: int | None = None,
) -> tuple[ModelSpec, ModelWeights]:
    """The architecture and the weights of the checkpoint in folder `path`.

    `dtype` None: the checkpoint's own on a GPU, float32 on a CPU. `limit_bytes`: the memory that the weights may take.
    Raises `CheckpointError` naming file and tensor, or `UnsupportedModelError` for what is not built; no memory is
    taken before names, shapes and dtypes are found right.
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
        weights = empty_weights(spec, device, dtype)
    except RuntimeError as error:  # also torch.OutOfMemoryError
        raise CheckpointError(f"no room on {device} for the {_gib(needed_bytes)} of {path}: {error}") from error
    _read(entries, dict(weight_parts(spec, weights, layouts, entries)), progress)
    if spec.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= entries.keys():
        _check_tied(entries["lm_head.weight"], weights.embedding)
    return spec, weights


def empty_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    """Weights of the right shapes with nothing in them; on the device "meta", shapes alone."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def dense(intermediate: int) -> DenseWeights:
        return DenseWeights(
            gate_up=empty(2 * intermediate, spec.hidden),
            gate_up_bias=empty(2 * intermediate) if spec.mlp_bias else None,
            down=empty(spec.hidden, intermediate),
            down_bias=empty(spec.hidden) if spec.mlp_bias else None,
        )

    width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    normed = {"none": None, "head": (spec.head_dim, spec.head_dim), "full": (width, kv_width)}[spec.qk_norm]
    layers = []
    for layer in spec.layers:
        attention = AttentionWeights(
            norm=empty(spec.hidden),
            qkv=empty(width + 2 * kv_width, spec.hidden),
            qkv_bias=empty(width + 2 * kv_width) if spec.qkv_bias else None,
            q_norm=None if normed is None else empty(normed[0]),
            k_norm=None if normed is None else empty(normed[1]),
            out=empty(spec.hidden, width),
            out_bias=empty(spec.hidden) if spec.o_bias else None,
        )
        mlp: DenseWeights | MoEWeights
        if layer.mlp == "dense":
            mlp = dense(spec.intermediate)
        else:
            moe = spec.moe
            assert moe is not None
            mlp = MoEWeights(
                router=empty(moe.num_experts, spec.hidden),
                experts=ExpertWeights(
                    gate_up=empty(moe.num_experts, 2 * moe.intermediate, spec.hidden),
                    down=empty(moe.num_experts, spec.hidden, moe.intermediate),
                ),
                shared=dense(moe.shared_intermediate) if moe.shared_intermediate else None,
                shared_gate=empty(1, spec.hidden) if moe.shared_intermediate else None,
            )
        layers.append(LayerWeights(attention, empty(spec.hidden), mlp))
    embedding = empty(spec.vocab_size, spec.hidden)
    lm_head = embedding if spec.tie_embeddings else empty(spec.vocab_size, spec.hidden)
    return ModelWeights(embedding, tuple(layers), empty(spec.hidden), lm_head)


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
        buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        with _opened({"lm_head.weight": entry}) as files:
            same = all(
                torch.equal(_fill(piece, files, buffer).to(embedding.dtype), piece.target.cpu())
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
    target: torch.Tensor  # [n]

    @property
    def num_bytes(self) -> int:
        return self.target.numel() * DTYPES[self.entry.dtype].itemsize

    @property
    def is_direct(self) -> bool:
        """The file's bytes are the target's."""
        return self.target.device.type == "cpu" and self.target.dtype == DTYPES[self.entry.dtype]


def _pieces(name: str, entry: TensorEntry, part: torch.Tensor) -> Iterator[_Piece]:
    flat, itemsize = part.view(-1), DTYPES[entry.dtype].itemsize
    count = PIECE_BYTES // itemsize
    for at in range(0, flat.numel(), count):
        yield _Piece(name, entry, entry.offset + at * itemsize, flat[at : at + count])


def _read(entries: Mapping[str, TensorEntry], parts: Mapping[str, torch.Tensor], progress: Progress | None) -> None:
    """Fill `parts` from the files, in their order; several reads are under way while one piece is converted."""
    entries = {name: entry for name, entry in entries.items() if name in parts}
    total = sum(entry.num_bytes for entry in entries.values())
    done = 0
    buffers: list[torch.Tensor] = []
    under_way: deque[tuple[_Piece, torch.Tensor | None, Future[torch.Tensor]]] = deque()

    def finish_oldest() -> None:
        nonlocal done
        piece, buffer, future = under_way.popleft()
        numbers = future.result()
        if buffer is not None:
            piece.target.copy_(numbers)
            buffers.append(buffer)
        done += piece.num_bytes
        if progress is not None:
            progress(done, total)

    with _opened(entries) as files, ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read-weights") as pool:
        for name, entry in entries.items():
            for piece in _pieces(name, entry, parts[name]):
                if len(under_way) > NUM_READERS:
                    finish_oldest()
                buffer = None
                if not piece.is_direct:
                    pinned = piece.target.device.type == "cuda"
                    buffer = (
                        buffers.pop() if buffers else torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)
                    )
                under_way.append((piece, buffer, pool.submit(_fill, piece, files, buffer)))
        while under_way:
            finish_oldest()


def _fill(piece: _Piece, files: Mapping[Path, int], buffer: torch.Tensor | None) -> torch.Tensor:
    """Read a piece into `buffer`, or without one into its target; -> its numbers [n] in the file's dtype."""
    numbers = piece.target if buffer is None else buffer[: piece.num_bytes].view(DTYPES[piece.entry.dtype])
    view = numbers.view(torch.uint8).numpy().data
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


# ---------------------------------------------------------------------------------------- what a checkpoint advises


@dataclass(frozen=True)
class GenerationDefaults:
    """What `generation_config.json` advises where a request says nothing; None where it is silent as well.

    `do_sample` is not among them: the temperature alone decides, as everywhere in this API.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


def load_generation_config(path: Path) -> GenerationDefaults:
    """The advice of the checkpoint in folder `path`. Raises `CheckpointError` for a wrong type or range."""
    file = path / "generation_config.json"
    if not file.exists():
        return GenerationDefaults()
    advice = read_json(file)

    def number(name: str, low: float, high: float) -> float | None:
        value = advice.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(f"{file}: {name} is {value!r}, not a number in [{low:g}, {high:g}]", param=name)
        return float(value)

    top_k = number("top_k", 0, 2**31)
    if top_k is not None and not top_k.is_integer():
        raise CheckpointError(f"{file}: top_k is {top_k!r}, not a whole number", param="top_k")
    return GenerationDefaults(
        temperature=number("temperature", 0, 100),
        top_k=None if top_k is None else int(top_k),
        top_p=number("top_p", math.ulp(0), 1),
        min_p=number("min_p", 0, 1),
        typical_p=number("typical_p", math.ulp(0), 1),
        repetition_penalty=number("repetition_penalty", math.ulp(0), 100),
        eos_token_ids=_token_ids(file, advice.get("eos_token_id")),
    )


def eos_token_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end a sequence: `generation_config.json`'s where it names any, otherwise `config.json`'s.

    Without those beyond the vocabulary, which some checkpoints name and which can never be drawn.
    """
    config = read_config(path)
    ids = load_generation_config(path).eos_token_ids
    ids = ids or _token_ids(path / "config.json", config.get("eos_token_id"))
    return tuple(token for token in ids if token < spec_from_config(config).vocab_size)


def _token_ids(file: Path, value: object) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise CheckpointError(
            f"{file}: eos_token_id is {value!r}, neither a token id nor a list of them", param="eos_token_id"
        )
    return tuple(dict.fromkeys(ids))
