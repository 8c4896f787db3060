"""`gumbel_argmax`: an unfiltered draw of a token for each row, or its most likely one."""

from __future__ import annotations

from typing import Protocol

import torch

from workers.kernels.native import HostKernels


class Noise(Protocol):
    """Counter-based noise: `salts` [V] int64, and `rows(keys [R])` -> [R, V] float32."""

    salts: torch.Tensor

    def rows(self, keys: torch.Tensor) -> torch.Tensor: ...


def gumbel_argmax(
    logits: torch.Tensor,
    noise: Noise,
    keys: torch.Tensor | None,
    temperature: torch.Tensor | None,
    native: HostKernels | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit + temperature * noise (keys None: no noise), and where it is; NaN where any is.

    logits [R, V] float32, keys [R] int64, temperature [R, 1] -> (values [R], ids [R] int64). That has its maximum where
    logit / temperature + noise has, and cannot overflow at a tiny temperature.
    """
    if native is not None:
        return native.gumbel_argmax(logits, noise.salts, keys, temperature)
    if keys is not None:
        assert temperature is not None
        logits = noise.rows(keys).mul_(temperature).add_(logits)
    values, ids = logits.max(-1)
    return values, ids
