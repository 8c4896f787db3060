"""Counter-based Gumbel noise: a pure function of (seed, choice, position, token id).

argmax(logit / T + Gumbel) draws from softmax(logit / T) (Gumbel 1954; Maddison et al. 2014, "A* Sampling"). Each value
comes from its own 64-bit hash (the mixer of splitmix64: Steele, Lea, Flood 2014), never from a generator's state, so a
token is the same in any batch, after any preemption or migration, and a draft that shares the noise is accepted exactly
where it is the target's own draw.

Keys, one a row, are mixed on the host; the values, one a row and token, on the device. int64 tensors wrap like unsigned
ones under multiplication and XOR; a logical right shift is an arithmetic one with the copies of the sign masked off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MASK_64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: 2^64 / golden ratio, odd
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shift, multiplier
_LAST_SHIFT = np.uint64(31)
_TOKEN_STREAM = np.uint64(0x5851F42D4C957F2D)  # keeps token salts apart from position keys
# the same for int64 tensors: shift, what a logical shift leaves, multiplier of the same bits
_SIGNED_ROUNDS = tuple((shift, (1 << (64 - shift)) - 1, multiplier - 2**64) for shift, multiplier in _ROUNDS)
_LARGEST = 1 - 2.0**-24  # of a float32 below 1
_SMALLEST = 2.0**-64
_CHUNK_ELEMENTS = 2**17  # of one pass: its scratch stays in the cache


def mix(words: Words) -> Words:
    """splitmix64's finaliser: a bijection of the 64-bit words whose every output bit depends on every input bit."""
    for shift, multiplier in _ROUNDS:
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(multiplier)
    return words ^ (words >> _LAST_SHIFT)


@functools.lru_cache(maxsize=4096)
def stream_key(seed: int, choice: int) -> int:
    """The key of one sequence's noise, below 2^64: `seed` is any 64-bit integer, `choice` is i of n."""
    words = mix(np.array([seed & _MASK_64], dtype=np.uint64) + _GOLDEN)
    return int(mix(words + np.array([choice], dtype=np.uint64) * _GOLDEN)[0])


def position_keys(streams: Words, positions: Sequence[int]) -> torch.Tensor:
    """Keys [n] int64 of the tokens at absolute `positions` [n] of the sequences with `stream_key`s `streams` [n]."""
    return torch.from_numpy(mix(np.array(positions, dtype=np.uint64) * _GOLDEN + streams).view(np.int64))


def _mix_high_(words: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """`mix` up to its last multiplication, in place: the high bits, which the noise is made of, are already final."""
    for shift, mask, multiplier in _SIGNED_ROUNDS:
        torch.bitwise_right_shift(words, shift, out=scratch)
        words.bitwise_xor_(scratch.bitwise_and_(mask)).mul_(multiplier)
    return words


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
        salts = mix(np.arange(vocab_size, dtype=np.uint64) * _GOLDEN + _TOKEN_STREAM)
        self.salts = torch.from_numpy(salts.view(np.int64)).to(device)  # [V]

    def rows(self, keys: torch.Tensor) -> torch.Tensor:
        """Noise [n, V] float32 for `position_keys` [n]."""
        num_rows, vocab_size = keys.shape[0], self.salts.shape[0]
        out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=keys.device)
        chunk = max(1, min(num_rows, _CHUNK_ELEMENTS // vocab_size))
        words = torch.empty(2, chunk, vocab_size, dtype=torch.int64, device=keys.device)
        for start in range(0, num_rows, chunk):
            part = keys[start : start + chunk, None]
            mixed, scratch = words[0, : part.shape[0]], words[1, : part.shape[0]]
            torch.bitwise_xor(part, self.salts, out=mixed)
            _gumbel_(_mix_high_(mixed, scratch), out[start : start + chunk])
        return out

    def at(self, keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Noise [n, k] float32 for keys [n] at `token_ids` [n, k]."""
        mixed = self.salts[token_ids].bitwise_xor_(keys[:, None])
        return _gumbel_(_mix_high_(mixed, torch.empty_like(mixed)), torch.empty(mixed.shape, device=keys.device))
