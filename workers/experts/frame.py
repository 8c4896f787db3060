"""A frame: the small tensors of one message, packed so that they travel as one.

[bytes of the frame, tensors of the message] as int64, then each tensor at a multiple of eight bytes. A tensor for which
no room is left travels by itself, after the frame; both sides know which, since they go by the sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FRAME_BYTES = 1 << 20  # a decode step's rows fit; to copy so much takes less time than a message of its own
HEAD_BYTES = 16
ALIGN_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the peer will send: the receiver allocates it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def pack(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Contiguous CPU tensors -> (the frame, uint8, and those that travel by themselves, in order)."""
    offset, alone = HEAD_BYTES, []
    places: list[tuple[int, torch.Tensor]] = []
    for tensor in tensors:
        end = offset + tensor.nbytes
        if end > FRAME_BYTES:
            alone.append(tensor)
        else:
            places.append((offset, tensor))
            offset = _aligned(end)
    frame = torch.empty(offset, dtype=torch.uint8)
    frame[:HEAD_BYTES].view(torch.int64).copy_(torch.tensor([offset, len(tensors)]))
    for start, tensor in places:
        if tensor.numel():
            frame[start : start + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
    return frame, alone


class Unpacking:
    """What has not been taken yet of a message."""

    def __init__(self, room: torch.Tensor) -> None:
        """`room` [FRAME_BYTES] uint8 begins with a frame, which is copied. Raises `ValueError` where it does not."""
        num_bytes, self.num_left = room[:HEAD_BYTES].view(torch.int64).tolist()
        if not (HEAD_BYTES <= num_bytes <= FRAME_BYTES and self.num_left > 0):
            raise ValueError(f"a frame of {num_bytes} bytes with {self.num_left} tensors")
        self._frame = room[:num_bytes].clone()
        self._offset = HEAD_BYTES

    def take(self, spec: TensorSpec) -> torch.Tensor | None:
        """The message's next tensor; None where it comes by itself. Raises `ValueError` where the frame lacks it."""
        self.num_left -= 1
        start, end = self._offset, self._offset + spec.num_bytes
        if end > FRAME_BYTES:
            return None
        if end > len(self._frame):
            raise ValueError(f"a frame of {len(self._frame)} bytes, which lacks a tensor at {start} to {end}")
        self._offset = _aligned(end)
        return self._frame[start:end].view(spec.dtype).view(spec.shape)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES
