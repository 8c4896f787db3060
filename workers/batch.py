"""A `StepPlan` as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.attention.paged import AttentionPlan, SequenceSlice, plan_blocks, plan_groups
from workers.request import Request
from workers.step import Batch, Scheduled

# A group's scores beyond this leave the processor's cache, and each pass over them goes to memory.
MAX_GROUP_BYTES = 4 << 20


class Batcher:
    """Builds batches for one model on one device."""

    def __init__(
        self,
        page_size: int,
        windows: Sequence[int | None],
        num_heads: int,
        device: torch.device,
        dtype: torch.dtype,
        native: bool = False,
    ) -> None:
        """`windows`: the sliding windows of the model's layers. `native`: plan for the host kernels."""
        self._native = native
        self._page_size = page_size
        self._windows = windows
        self._device = device
        self._dtype = dtype
        self._bytes_per_score_row = num_heads * page_size * dtype.itemsize

    def build(self, scheduled: Sequence[Scheduled], rows_from: Sequence[int]) -> Batch:
        """`rows_from[i]`: the first of item i's tokens, counted in the step, whose results are needed."""
        size = self._page_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        slices: list[SequenceSlice] = []
        for item, row_at in zip(scheduled, rows_from, strict=True):
            request, first_row = item.request, len(token_ids)
            start, end = request.num_computed, request.num_computed + item.num_tokens
            page_ids = request.page_ids
            if item.num_tokens == 1:
                token_ids.append(request.tokens[start])
                positions.append(start + request.position_offset)
                slots.append(page_ids[start // size] * size + start % size)
            else:
                token_ids.extend(request.tokens[start:end])
                positions.extend(range(start + request.position_offset, end + request.position_offset))
                slots.extend(page_ids[at // size] * size + at % size for at in range(start, end))
            rows.extend(range(first_row + row_at, first_row + item.num_tokens))
            slices.append(SequenceSlice(first_row, start, item.num_tokens, page_ids))
        device = self._device
        attention = plan_blocks(slices, size) if self._native else self._groups(slices)
        return Batch(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            kv_slots=torch.tensor(slots, device=device),
            attention=attention,
            rows=torch.tensor(rows, dtype=torch.int64, device=device),
        )

    def _groups(self, slices: Sequence[SequenceSlice]) -> AttentionPlan:
        return plan_groups(
            slices,
            self._page_size,
            self._windows,
            self._device,
            self._dtype,
            MAX_GROUP_BYTES,
            self._bytes_per_score_row,
        )


def first_row(request: Request, num_tokens: int) -> int:
    """Which of a request's next `num_tokens` tokens is the first whose result (logits, or hidden state) is needed.

    All of the prompt's where `prompt_logprobs` or their mean is asked for, otherwise the sequence's last token alone.
    """
    if request.pooling == "mean":
        return 0
    if request.sampling.prompt_logprobs is not None and request.num_computed < request.num_prompt:
        return 0
    reaches_end = request.num_computed + num_tokens == len(request.tokens)
    return num_tokens - 1 if reaches_end else num_tokens
