"""Counter-based Gumbel noise: a pure function of (seed, choice, position, token id).

argmax(logit / T + Gumbel) draws from softmax(logit / T) (Gumbel 1954; Maddison et al. 2014, "A* Sampling"). Each value
comes from its own 64-bit hash (the mixer of splitmix64: Steele, Lea, Flood 2014), never from a generator's state, so a
token is the same in any batch, after any preemption or migration, and a draft that shares the noise is accepted exactly
where it is the target's own draw.

int64 tensors wrap like unsigned ones under multiplication and XOR; a logical right shift is an arithmetic one with the
copies of the sign masked off.
"""

from __future__ import annotations

import torch

_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2^64 / golden ratio, odd
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_TOKEN_STREAM = 0x5851F42D4C957F2D  # keeps token salts apart from position keys
_LARGEST = 1 - 2.0**-24  # of a float32 below 1
_SMALLEST = 2.0**-64
_CHUNK_ELEMENTS = 2**17  # of one pass: its scratch stays in the cache


def _signed(value: int) -> int:
    """A 64-bit word as the int64 of the same bits."""
    value &= _MASK_64
    return value - 2**64 if value >= 2**63 else value


_SIGNED_MULTIPLIERS = tuple(_signed(multiplier) for multiplier in _MULTIPLIERS)
_SHIFT_MASKS = tuple((1 << (64 - shift)) - 1 for shift in _SHIFTS)


def mix(value: int) -> int:
    """splitmix64's finaliser on an unsigned 64-bit integer."""
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        value = ((value ^ (value >> shift)) * multiplier) & _MASK_64
    return value ^ (value >> _SHIFTS[2])


def stream_key(seed: int, choice: int) -> int:
    """The key of one sequence's noise, as an int64: `seed` is any 64-bit integer, `choice` is i of n."""
    return _signed(mix(mix((seed + _GOLDEN) & _MASK_64) + choice * _GOLDEN & _MASK_64))


def _shift_xor_(words: torch.Tensor, scratch: torch.Tensor, step: int) -> None:
    """words ^= words >>> shift, in place."""
    torch.bitwise_right_shift(words, _SHIFTS[step], out=scratch)
    words.bitwise_xor_(scratch.bitwise_and_(_SHIFT_MASKS[step]))


def _mix_high_(words: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The mixer up to its last multiplication: the high bits, which the noise is made of, are already final."""
    for step, multiplier in enumerate(_SIGNED_MULTIPLIERS):
        _shift_xor_(words, scratch, step)
        words.mul_(multiplier)
    return words


def _mix_(words: torch.Tensor) -> torch.Tensor:
    scratch = torch.empty_like(words)
    _shift_xor_(_mix_high_(words, scratch), scratch, 2)
    return words


def position_keys(streams: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys [n] int64 of the tokens at absolute `positions` [n] of the sequences with `stream_key`s `streams` [n]."""
    return _mix_(positions * _signed(_GOLDEN) + streams)


def _gumbel_(words: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Gumbel values of 64-bit hashes, into `out` float32 of the same shape.

    v = 63 bits / 2^63 as a float keeps its relative precision however small it is; E = -log1p(-v) is exponential, and
    so are its smallest values, the ones that win, as exact as float32 allows. -log(-log(u)) would round them to
    multiples of 2^-24.
    """
    out.copy_(words.bitwise_and_(2**63 - 1))
    out.mul_(-(2.0**-63)).clamp_(-_LARGEST, -_SMALLEST)
    return out.log1p_().neg_().log_().neg_()


class GumbelNoise:
    """The noise over a vocabulary: `rows` gives all of it, `at` the values of some token ids, bit for bit the same."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        ids = torch.arange(vocab_size, dtype=torch.int64, device=device)
        self._salts = _mix_(ids * _signed(_GOLDEN) + _signed(_TOKEN_STREAM))  # [V]

    def rows(self, keys: torch.Tensor) -> torch.Tensor:
        """Noise [n, V] float32 for `position_keys` [n]."""
        num_rows, vocab_size = keys.shape[0], self._salts.shape[0]
        out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=keys.device)
        chunk = max(1, min(num_rows, _CHUNK_ELEMENTS // vocab_size))
        words = torch.empty(2, chunk, vocab_size, dtype=torch.int64, device=keys.device)
        for start in range(0, num_rows, chunk):
            part = keys[start : start + chunk, None]
            mixed, scratch = words[0, : part.shape[0]], words[1, : part.shape[0]]
            torch.bitwise_xor(part, self._salts, out=mixed)
            _gumbel_(_mix_high_(mixed, scratch), out[start : start + chunk])
        return out

    def at(self, keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Noise [n, k] float32 for keys [n] at `token_ids` [n, k]."""
        mixed = self._salts[token_ids].bitwise_xor_(keys[:, None])
        return _gumbel_(_mix_high_(mixed, torch.empty_like(mixed)), torch.empty(mixed.shape, device=keys.device))
