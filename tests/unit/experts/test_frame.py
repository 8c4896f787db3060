"""Frames: whatever was packed is taken out again, and what is no frame is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.experts.frame import FRAME_BYTES, HEAD, Room, TensorSpec, Unpacking

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
SHAPES = st.sampled_from([(0,), (1,), (3,), (5, 7), (0, 4), (127, 129), (200, 200), (600, 300)])


def received(frame: torch.Tensor) -> Unpacking:
    """As a link finds it: at the beginning of a room whose rest is anything."""
    room = Room()
    room.tensor.fill_(255)
    room.tensor[: len(frame)] = frame
    return room.unpack()


@settings(deadline=None)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=8))
def test_tensors_come_out_as_they_went_in_and_only_what_has_no_room_travels_by_itself(
    kinds: list[tuple[tuple[int, ...], torch.dtype]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(0, 100, shape, generator=generator).to(dtype) for shape, dtype in kinds]
    room = Room()
    room.pack([torch.ones(20_000)])  # what was there before does not matter
    frame, alone = room.pack(tensors)
    assert len(frame) <= FRAME_BYTES
    message = received(frame)
    room.tensor.zero_()  # the next frame may be packed at once
    by_itself = iter(alone)
    for tensor in tensors:
        assert message.num_left
        found = message.take(TensorSpec(tuple(tensor.shape), tensor.dtype))
        if found is None:
            found = next(by_itself)
            assert found.nbytes > 1 << 12
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert not message.num_left
    assert next(by_itself, None) is None


@pytest.mark.parametrize(
    "head",
    [(0, 1), (HEAD.size - 1, 1), (FRAME_BYTES + 1, 1), (-1, 1), (HEAD.size, 0), (HEAD.size, -1), (1 << 62, 1)],
)
def test_what_is_no_frame_is_refused(head: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a frame of"):
        received(torch.tensor(head).view(torch.uint8))


def test_a_tensor_that_was_not_sent_is_refused() -> None:
    message = received(Room().pack([torch.zeros(3)])[0])
    with pytest.raises(ValueError, match="lacks a tensor"):
        message.take(TensorSpec((5,)))
