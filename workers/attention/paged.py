"""The attention plan of a step: which queries read which pages. Made once a step, read by every layer.

Queries of one sequence are cut into blocks at absolute multiples of the page size; a block reads whole pages from the
sequence's first to its own last. Blocks of like size share a group, padded to the group's number of pages, so that a
group is one batched product. Padding is exact: a masked page adds zeros (see `workers.kernels.paged_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NEG_INF = float("-inf")


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """`num_tokens` queries of one sequence from index `start` on, at rows `first_row`… of the batch."""

    first_row: int
    start: int
    num_tokens: int
    page_ids: Sequence[int]  # the sequence's pages in order


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """N blocks of Q queries over P pages each.

    A block with fewer queries repeats its last one, which computes and writes the same row again.
    """

    query_rows: torch.Tensor  # [N * Q] int64, rows of the batch
    num_blocks: int
    page_ids: torch.Tensor  # [N * P] int64
    biases: dict[int | None, torch.Tensor]  # sliding window -> [N, P, 1, Q, 1, page_size], 0 or -inf


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Either form of the same blocks: a table that native kernels walk, or groups for batched torch products."""

    blocks: torch.Tensor  # [N, 5] int64: first row, index of its query, queries, first of `page_ids`, pages
    page_ids: torch.Tensor  # int64, each block's pages in order
    groups: tuple[AttentionGroup, ...] = ()
    in_order: bool = False  # one group whose query rows are 0..T-1: nothing to gather or scatter


@dataclass(frozen=True, slots=True)
class _Block:
    first_row: int
    start: int  # sequence index of the first query
    num_queries: int
    page_ids: Sequence[int]


def page_bucket(num_pages: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, 32 … that is not under `num_pages`: at most a third of padding."""
    power = 1
    while power < num_pages:
        if power * 3 // 2 >= num_pages and power >= 2:
            return power * 3 // 2
        power *= 2
    return power


def _cut(slices: Sequence[SequenceSlice], page_size: int) -> list[_Block]:
    blocks = []
    for item in slices:
        at, end = item.start, item.start + item.num_tokens
        while at < end:
            stop = min(end, (at // page_size + 1) * page_size)
            num_pages = (stop - 1) // page_size + 1
            row = item.first_row + at - item.start
            blocks.append(_Block(row, at, stop - at, item.page_ids[:num_pages]))
            at = stop
    return blocks


def plan_blocks(slices: Sequence[SequenceSlice], page_size: int) -> AttentionPlan:
    """The step's blocks as a table, on the CPU."""
    table: list[int] = []
    page_ids: list[int] = []
    for item in slices:
        if item.num_tokens == 1:  # most of them are, and this runs each step
            num_pages = item.start // page_size + 1
            table += (item.first_row, item.start, 1, len(page_ids), num_pages)
            page_ids += item.page_ids[:num_pages]
            continue
        for block in _cut([item], page_size):
            table += (block.first_row, block.start, block.num_queries, len(page_ids), len(block.page_ids))
            page_ids += block.page_ids
    return AttentionPlan(torch.tensor(table, dtype=torch.int64).view(-1, 5), torch.tensor(page_ids, dtype=torch.int64))


def plan_groups(
    slices: Sequence[SequenceSlice],
    page_size: int,
    windows: Sequence[int | None],
    device: torch.device,
    dtype: torch.dtype,
    max_group_bytes: int = 1 << 62,
    bytes_per_score_row: int = 1,
) -> AttentionPlan:
    """Group the step's queries. `windows` are the sliding windows that the model's layers use (None: full).

    `max_group_bytes` bounds a group's scores, `bytes_per_score_row` times queries times pages, so that they stay in
    the processor's cache; a group over it becomes several.
    """
    by_shape: dict[tuple[int, int], list[_Block]] = {}
    for block in _cut(slices, page_size):
        queries = 1 if block.num_queries == 1 else min(page_size, max(4, 1 << (block.num_queries - 1).bit_length()))
        by_shape.setdefault((queries, page_bucket(len(block.page_ids))), []).append(block)
    groups = []
    for (queries, pages), blocks in sorted(by_shape.items()):
        per_group = max(1, max_group_bytes // (bytes_per_score_row * queries * pages))
        for at in range(0, len(blocks), per_group):
            groups.append(_group(blocks[at : at + per_group], queries, pages, page_size, windows, device, dtype))
    num_rows = sum(item.num_tokens for item in slices)
    in_order = (
        len(groups) == 1
        and len(groups[0].query_rows) == num_rows
        and [item.first_row for item in slices] == list(range(len(slices)))
    )
    nothing = torch.empty(0, dtype=torch.int64)
    return AttentionPlan(nothing, nothing, tuple(groups), in_order)


def _group(
    blocks: Sequence[_Block],
    queries: int,
    pages: int,
    page_size: int,
    windows: Sequence[int | None],
    device: torch.device,
    dtype: torch.dtype,
) -> AttentionGroup:
    rows: list[int] = []
    indices: list[int] = []  # of each query in its sequence
    page_ids: list[int] = []
    for block in blocks:
        missing = queries - block.num_queries
        rows.extend(range(block.first_row, block.first_row + block.num_queries))
        indices.extend(range(block.start, block.start + block.num_queries))
        if missing:
            rows.extend([rows[-1]] * missing)
            indices.extend([indices[-1]] * missing)
        page_ids.extend(block.page_ids)
        page_ids.extend([block.page_ids[-1]] * (pages - len(block.page_ids)))
    query_at = torch.tensor(indices, device=device).view(-1, 1, 1, queries, 1, 1)
    key_at = torch.arange(pages * page_size, device=device).view(1, pages, 1, 1, 1, page_size)
    biases: dict[int | None, torch.Tensor] = {}
    for window in windows:
        hidden = key_at > query_at
        if window is not None:
            hidden = hidden | (key_at <= query_at - window)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        biases[window] = bias.masked_fill_(hidden, NEG_INF)
    return AttentionGroup(
        query_rows=torch.tensor(rows, device=device),
        num_blocks=len(blocks),
        page_ids=torch.tensor(page_ids, device=device),
        biases=biases,
    )
