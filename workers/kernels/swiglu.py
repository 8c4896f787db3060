"""`swiglu`: silu(gate) * up, the activation inside every feed-forward block."""

from __future__ import annotations

import torch

from workers.numerics import Numerics


def swiglu(gate_up: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """gate_up [T, 2I], gate and up behind each other -> silu(gate) * up [T, I].

    silu is written out: torch's own takes a scalar path for what is left over of a vector, and where that falls
    depends on the batch and on the number of threads; `exp` and the exact operations do not.
    """
    if numerics.native is not None:
        return numerics.native.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.neg().exp_().add_(1.0).reciprocal_().mul_(gate).mul_(up)
