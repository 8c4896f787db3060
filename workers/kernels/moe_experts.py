"""`moe_experts`: routed SwiGLU feed-forward blocks as grouped products over tokens sorted by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workers.kernels.moe_combine import moe_combine
from workers.kernels.swiglu import swiglu
from workers.numerics import Numerics


def _grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x [rows, in] sorted by expert, weight [E, out, in], ends [E] int32: each expert's last row + 1 -> [rows, out]."""
    grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return grouped_mm(x, weight.transpose(1, 2), offs=ends)


def _sorted_rows(flat_ids: torch.Tensor, num_experts: int, row_block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each (token, choice) pair's row lies once rows are sorted by expert; and each expert's end.

    flat_ids [N] -> (rows [N] int64, ends [E] int32). With `row_block` every expert has room for whole blocks.
    """
    counts = torch.bincount(flat_ids, minlength=num_experts)
    order = flat_ids.argsort(stable=True)
    room = counts if row_block is None else (counts + (row_block - 1)) // row_block * row_block
    ends = room.cumsum(0)
    rows = torch.empty_like(flat_ids)
    rows[order] = torch.arange(flat_ids.shape[0], device=flat_ids.device)
    if row_block is not None:
        rows += (ends - room - (counts.cumsum(0) - counts))[flat_ids]
    return rows, ends.to(torch.int32)


def moe_experts(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    numerics: Numerics,
) -> torch.Tensor:
    """hidden [T, H], topk_ids and topk_weights [T, k], gate_up [E, 2I, H], down [E, H, I] -> [T, H].

    A token's expert outputs are added in the order of its top-k, whatever the batch.
    """
    if numerics.native is not None:
        return numerics.native.moe_experts(hidden, topk_ids, topk_weights, gate_up, down)
    num_tokens, top_k = topk_ids.shape
    num_experts = gate_up.shape[0]
    flat_ids = topk_ids.reshape(-1)
    if numerics.row_block is None:
        order = flat_ids.argsort(stable=True)
        ends = torch.bincount(flat_ids, minlength=num_experts).cumsum(0).to(torch.int32)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(order.shape[0], device=order.device)
        sorted_hidden = hidden.index_select(0, order // top_k)
        outputs = _grouped(swiglu(_grouped(sorted_hidden, gate_up, ends), numerics), down, ends)
    else:
        rows, ends = _sorted_rows(flat_ids, num_experts, numerics.row_block)
        sorted_hidden = hidden.new_zeros(int(ends[-1]), hidden.shape[1])
        sorted_hidden[rows] = hidden.repeat_interleave(top_k, dim=0)
        outputs = _in_blocks(sorted_hidden, ends, gate_up, down, numerics)
    by_choice = outputs.index_select(0, rows).view(num_tokens, top_k, -1)
    return moe_combine(by_choice, topk_weights, numerics)


def _in_blocks(
    x: torch.Tensor, ends: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, numerics: Numerics
) -> torch.Tensor:
    """Each expert's rows in products of exactly `row_block` rows: one shape, one kernel (see `workers.numerics`)."""
    outputs = torch.empty(x.shape[0], down.shape[1], dtype=x.dtype, device=x.device)
    rows = numerics.row_block
    assert rows is not None
    start = 0
    for expert, end in enumerate(ends.tolist()):
        for at in range(start, end, rows):
            inner = swiglu(F.linear(x[at : at + rows], gate_up[expert]), numerics)
            outputs[at : at + rows] = F.linear(inner, down[expert])
        start = end
    return outputs
