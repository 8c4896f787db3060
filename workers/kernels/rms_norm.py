"""`rms_norm`: x / rms(x) * weight (arXiv:1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workers.numerics import Numerics


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, numerics: Numerics) -> torch.Tensor:
    """x [T, H], weight [H] -> [T, H]."""
    if numerics.native is not None:
        return numerics.native.rms_norm(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
