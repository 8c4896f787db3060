from __future__ import annotations

import math

import numpy as np
import torch

from tests.support.sampling import correlation, uniform_p
from workers.sampling.gumbel import GumbelNoise, mix, position_keys, stream_key

CPU = torch.device("cpu")
VOCAB = 4096


def noise_of(streams: list[int], positions: list[int]) -> torch.Tensor:
    return GumbelNoise(VOCAB, CPU).rows(position_keys(np.array(streams, dtype=np.uint64), positions))


def uniform_of(noise: torch.Tensor) -> torch.Tensor:
    """Gumbel(0, 1) through its own distribution function."""
    return torch.exp(-torch.exp(-noise.double()))


def test_the_mixer_is_splitmix64() -> None:
    # the first outputs of splitmix64 seeded with 1234567 (Vigna's reference implementation)
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_seeds_beyond_64_bits_wrap_and_all_others_differ() -> None:
    assert stream_key(2**64 + 9, 0) == stream_key(9, 0)
    keys = {stream_key(seed, choice) for seed in range(-200, 200) for choice in range(20)}
    assert len(keys) == 400 * 20


def test_values_at_ids_are_those_of_whole_rows() -> None:
    noise = GumbelNoise(VOCAB, CPU)
    keys = position_keys(np.arange(40, dtype=np.uint64), range(0, 120, 3))
    ids = torch.randint(0, VOCAB, (40, 33), generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise.at(keys, ids), noise.rows(keys).gather(1, ids))


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    noise = GumbelNoise(1001, CPU)
    keys = position_keys(np.arange(200, dtype=np.uint64), range(200))
    whole = noise.rows(keys)
    for row in (0, 1, 57, 130, 199):
        assert torch.equal(noise.rows(keys[row : row + 1])[0], whole[row])


def test_it_is_a_gumbel_distribution() -> None:
    noise = noise_of([stream_key(seed, 0) for seed in range(64)], [5] * 64)
    assert uniform_p(uniform_of(noise).flatten()) > 1e-3
    assert abs(float(noise.mean()) - 0.577216) < 5 * math.pi / math.sqrt(6 * noise.numel())
    # the fraction beyond x is 1 - exp(-exp(-x)), in both tails
    for x in (-2.0, 5.0, 8.0):
        expected = (1 - math.exp(-math.exp(-x))) * noise.numel()
        tail = int((noise > x).sum())
        assert abs(tail - expected) < 5 * math.sqrt(min(expected, noise.numel() - expected))


def test_seeds_positions_choices_and_tokens_are_independent() -> None:
    n = 128
    seeds = uniform_of(noise_of([stream_key(seed, 0) for seed in range(n)], [0] * n))
    positions = uniform_of(noise_of([stream_key(0, 0)] * n, list(range(n))))
    choices = uniform_of(noise_of([stream_key(0, choice) for choice in range(n)], [0] * n))
    for rows in (seeds, positions, choices):
        assert all(uniform_p(rows[:, token], num_bins=16) > 1e-4 for token in (0, 17, 4095))
        assert abs(correlation(rows[:-1], rows[1:])) < 5  # neighbouring rows
        assert abs(correlation(rows[:, :-1], rows[:, 1:])) < 5  # neighbouring tokens
        assert abs(correlation(rows[1:, :-1], rows[:-1, 1:])) < 5
    assert abs(correlation(seeds[1:], positions[1:])) < 5
    assert abs(correlation(positions[1:], choices[1:])) < 5
    assert torch.equal(seeds[0], positions[0])


def test_a_seed_does_not_repeat_another_one_shifted_in_position() -> None:
    left = noise_of([stream_key(1, 0)] * 100, list(range(100)))
    right = noise_of([stream_key(2, 0)] * 100, list(range(100)))
    assert not torch.isin(left[:, 0], right[:, 0]).any()


def test_the_largest_values_are_not_quantised() -> None:
    noise = noise_of([stream_key(seed, 7) for seed in range(400)], [9] * 400)
    largest = noise.flatten().sort(descending=True).values[:2000]
    assert len(largest.unique()) > 1990  # -log(-log(u)) with a 24-bit u has 105 values up here
    assert torch.isfinite(noise).all()
