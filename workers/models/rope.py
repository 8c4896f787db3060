"""Rotary tables for each kind of `RopeSpec`, as transformers' `modeling_rope_utils` defines them."""

from __future__ import annotations

import math

import torch

from workers.models.spec import RopeSpec


def _llama3(rope: RopeSpec, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    low = rope.original_max_position / rope.low_freq_factor
    high = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > low, inv_freq / rope.factor, inv_freq)
    return torch.where((wavelength <= low) & (wavelength >= high), between, scaled)


def _yarn_mscale(scale: float, mscale: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _yarn(rope: RopeSpec, inv_freq: torch.Tensor, dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv:2309.00071), NTK-by-parts; also gives the factor on cos and sin."""

    def dimension_of(num_rotations: float) -> float:
        return dim * math.log(rope.original_max_position / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by zero, as in the source
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    scaled = inv_freq / rope.factor * (1 - keep) + inv_freq * keep
    if rope.attention_factor is not None:
        factor = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        factor = _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    else:
        factor = _yarn_mscale(rope.factor)
    return scaled, factor


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """-> (inv_freq [head_dim / 2] float32, the factor on cos and sin)."""
    inv_freq = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inv_freq, head_dim)
    return inv_freq, 1.0


def rope_tables(
    rope: RopeSpec, head_dim: int, num_positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (cos, sin), each [num_positions, 1, head_dim]; sin is negated in its first half (see `norm_rope_append`)."""
    inv_freq, factor = inverse_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    cos = torch.cat((cos, cos), dim=-1).unsqueeze(1)
    sin = torch.cat((-sin, sin), dim=-1).unsqueeze(1)
    return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)
