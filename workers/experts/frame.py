"""A frame: the small tensors of one message, packed so that they travel as one.

[bytes of the frame, tensors of the message] as int64, then each tensor at a multiple of eight bytes. A tensor for which
no room is left travels by itself, after the frame; both sides know which, since they go by the sizes alone.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

FRAME_BYTES = 1 << 20  # a decode step's rows fit; to copy so much takes less time than a message of its own
HEAD = struct.Struct("=qq")
ALIGN_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What the peer will send: the receiver allocates it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Room:
    """Where one frame lies at a time: to allocate and clear memory for each takes as long as to fill it."""

    def __init__(self) -> None:
        self._bytes = bytearray(FRAME_BYTES)  # to read and write two numbers in it is quicker than in a tensor
        self.tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)  # [FRAME_BYTES]

    def pack(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Contiguous CPU tensors -> (the frame, uint8, and those that travel by themselves, in order)."""
        offset, alone = HEAD.size, []
        for tensor in tensors:
            end = offset + tensor.nbytes
            if end > FRAME_BYTES:
                alone.append(tensor)
            elif end > offset:
                self.tensor[offset:end].copy_(tensor.view(-1).view(torch.uint8))
                offset = _aligned(end)
        HEAD.pack_into(self._bytes, 0, offset, len(tensors))
        return self.tensor[:offset], alone

    def unpack(self) -> Unpacking:
        """Raises `ValueError` where what lies here is no frame."""
        num_bytes, num_tensors = HEAD.unpack_from(self._bytes)
        if not (HEAD.size <= num_bytes <= FRAME_BYTES and num_tensors > 0):
            raise ValueError(f"a frame of {num_bytes} bytes with {num_tensors} tensors")
        return Unpacking(self.tensor[:num_bytes], num_tensors)


class Unpacking:
    """What has not been taken yet of a message. What is taken lies where the frame does."""

    def __init__(self, frame: torch.Tensor, num_tensors: int) -> None:
        self.num_left = num_tensors
        self._frame = frame
        self._offset = HEAD.size

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
