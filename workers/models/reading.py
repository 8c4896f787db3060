"""Reads tensors out of safetensors files, straight into their places.

Each is read once, by `pread`: into its place where that has the file's dtype and order and is on the host, otherwise
through a small buffer. So the peak of host memory is the weights themselves.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import torch

from cluster.errors import CheckpointError
from workers.models.checkpoint import DTYPES, MAX_ITEMSIZE, TensorEntry

NUM_READERS = 4
PIECE_BYTES = 2 << 20  # of one read
SERIAL_NUMBERS = 1 << 15  # torch shares out larger copies, and would fight the readers for the processors

Progress = Callable[[int, int], None]  # bytes of the checkpoint read so far, and in all


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of a checkpoint, or a part of one, and where it goes."""

    name: str
    entry: TensorEntry
    target: torch.Tensor


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


def _pieces(wanted: Wanted) -> Iterator[_Piece]:
    name, entry, part = wanted.name, wanted.entry, wanted.target
    runs = [part.view(-1)] if part.is_contiguous() else part.unbind() if part.dim() == 3 else [part]
    offset = entry.offset
    for run in runs:
        row_bytes = run[:1].numel() * DTYPES[entry.dtype].itemsize
        for target in run.split(max(1, PIECE_BYTES // row_bytes)):
            yield _Piece(name, entry, offset, target)
            offset += target.numel() * DTYPES[entry.dtype].itemsize


def _buffer_bytes(parts: Iterable[torch.Tensor]) -> int:
    """What the largest piece of these needs: a few rows, or one very long one."""
    return max((PIECE_BYTES, *(part.shape[-1] * MAX_ITEMSIZE for part in parts)))


def read_tensors(wanted: Sequence[Wanted], progress: Progress | None = None) -> None:
    """Fill the targets from the files, in the files' order, several pieces at a time. Raises `CheckpointError`."""
    wanted = sorted(wanted, key=lambda item: (item.entry.file, item.entry.offset))
    total = sum(item.entry.num_bytes for item in wanted)
    done = 0
    pinned = any(item.target.device.type == "cuda" for item in wanted)
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(NUM_READERS):
        buffers.put(torch.empty(_buffer_bytes(item.target for item in wanted), dtype=torch.uint8, pin_memory=pinned))

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

    with _opened(wanted) as files, ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read-weights") as pool:
        under_way: deque[Future[int]] = deque()
        for item in wanted:
            for piece in _pieces(item):
                if len(under_way) == 2 * NUM_READERS:
                    finish(under_way.popleft())
                under_way.append(pool.submit(transfer, piece))
        for future in under_way:
            finish(future)


def holds(wanted: Wanted) -> bool:
    """Whether the target holds already what the file has. Raises `CheckpointError`."""
    buffer = torch.empty(_buffer_bytes([wanted.target]), dtype=torch.uint8)
    with _opened([wanted]) as files:
        return all(
            torch.equal(_numbers(piece, files, buffer).to(piece.target.dtype), piece.target.cpu())
            for piece in _pieces(wanted)
        )


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
def _opened(wanted: Iterable[Wanted]) -> Iterator[Mapping[Path, int]]:
    """The descriptors of their files, closed at the end."""
    files: dict[Path, int] = {}
    try:
        for file in {item.entry.file for item in wanted}:
            try:
                files[file] = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be opened: {error}") from error
        yield files
    finally:
        for descriptor in files.values():
            os.close(descriptor)
