"""Requests and statistics for the tests of sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cluster.protocol import Sampling, Stopping
from workers.request import Request

STOPPING_FIELDS = {"max_tokens", "min_tokens", "stop_token_ids", "ignore_eos"}


def make_request(
    request_id: str = "r", *, prompt: Sequence[int] = (1, 2, 3), output: Sequence[int] = (), **fields: object
) -> Request:
    """A request in the middle of its life; `fields` are of `Sampling` and `Stopping`."""
    stopping = {name: fields.pop(name) for name in list(fields) if name in STOPPING_FIELDS}
    return Request(
        request_id=request_id,
        tokens=[*prompt, *output],
        num_prompt=len(prompt),
        sampling=Sampling(**{"seed": 0, **fields}),  # type: ignore[arg-type]
        stopping=Stopping(**{"max_tokens": 100, **stopping}),  # type: ignore[arg-type]
    )


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The chance of counts this far from `probabilities` [V] or farther; 0 where an impossible one came up."""
    possible = probabilities > 0
    if counts[~possible].sum() > 0:
        return 0.0
    expected = probabilities[possible].double() * counts.sum()
    assert expected.min() >= 5, "too few draws for the smallest probability"
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = int(possible.sum()) - 1
    if freedom == 0:
        return 1.0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2))


def uniform_p(values: torch.Tensor, num_bins: int = 64) -> float:
    """The chance of values [n] in [0, 1) filling equal bins this unevenly or more so."""
    bins = (values.double() * num_bins).long().clamp(0, num_bins - 1)
    return chi_square_p(torch.bincount(bins, minlength=num_bins), torch.full((num_bins,), 1 / num_bins))


def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    """Pearson's coefficient of two samples, times sqrt(n): a standard normal where they are independent."""
    stacked = torch.stack([left.flatten().double(), right.flatten().double()])
    return float(torch.corrcoef(stacked)[0, 1]) * math.sqrt(left.numel())
