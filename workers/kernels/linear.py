"""`linear`: x W^T + b, in the numerics class asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workers.numerics import Numerics, linear_in_blocks


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, numerics: Numerics) -> torch.Tensor:
    """x [T, in], weight [out, in] (its transpose contiguous, see `laid_out`), bias [out] or None -> [T, out]."""
    if numerics.native is not None:
        return numerics.native.linear(x, weight, bias)
    if numerics.row_block is None:
        return F.linear(x, weight, bias)
    return linear_in_blocks(x, weight, bias, numerics.row_block)
