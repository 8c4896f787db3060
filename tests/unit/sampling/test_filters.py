"""The filters' sets against transformers' chain of logits warpers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from workers.sampling.filters import OFF, Filters, candidates

Row = tuple[float, int, float, float, float]  # temperature, top_k, typical_p, top_p, min_p; as a request has them


def filters_of(rows: list[Row], vocab_size: int) -> Filters:
    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)[:, None]

    return Filters(
        temperature=column([row[0] for row in rows], torch.float32),
        top_k=column([min(row[1] or vocab_size, vocab_size) for row in rows], torch.int64),
        typical_p=column([row[2] if row[2] < 1 else OFF for row in rows], torch.float64),
        top_p=column([row[3] if row[3] < 1 else OFF for row in rows], torch.float64),
        log_min_p=column([math.log(row[4]) if row[4] else -math.inf for row in rows], torch.float32),
        any_typical=any(row[2] < 1 for row in rows),
    )


def kept_ids(logits: torch.Tensor, rows: list[Row]) -> list[set[int]]:
    ids, kept = candidates(logits, filters_of(rows, logits.shape[-1]))
    return [set(ids[i][kept[i] > -math.inf].tolist()) for i in range(len(rows))]


def oracle_ids(logits: torch.Tensor, row: Row) -> set[int]:
    temperature, top_k, typical_p, top_p, min_p = row
    scores = TemperatureLogitsWarper(float(temperature))(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if typical_p < 1:
        scores = TypicalLogitsWarper(typical_p)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return set((scores[0] > -math.inf).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("vocab_size", [5, 300, 2000, 6000])
@pytest.mark.parametrize("scale", [0.3, 2.0, 5.0])
def test_the_kept_sets_are_transformers(vocab_size: int, scale: float) -> None:
    random.seed(vocab_size)
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale
    rows = [
        (
            random.choice([0.3, 1.0, 2.0]),
            random.choice([0, 0, 1, 5, 40, 200, 3000]),
            1.0,
            random.choice([1.0, 0.1, 0.5, 0.9, 0.99]),
            random.choice([0.0, 0.0, 0.01, 0.2, 1.0]),
        )
        for _ in range(24)
    ]
    assert kept_ids(logits, rows) == [oracle_ids(logits[i], row) for i, row in enumerate(rows)]


@pytest.mark.parametrize("vocab_size", [5, 300, 1500])
def test_typical_sets_are_transformers_up_to_rounding_at_the_cut(vocab_size: int) -> None:
    random.seed(vocab_size)
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    rows = [
        (random.choice([0.5, 1.0]), random.choice([0, 5, 40]), random.choice([0.2, 0.6, 0.9]), top_p, min_p)
        for top_p, min_p in [(1.0, 0.0), (0.8, 0.0), (1.0, 0.1), (0.9, 0.05)] * 6
    ]
    for i, (found, row) in enumerate(zip(kept_ids(logits, rows), rows, strict=True)):
        # float64 sums here, float32 there: one token at each of two cuts may fall on the other side
        assert len(found ^ oracle_ids(logits[i], row)) <= 2 * (vocab_size > 5), row


def test_equals_of_the_last_kept_token_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    assert kept_ids(logits, [(1.0, 2, 1.0, 1.0, 0.0)]) == [{0, 1, 2, 3}]
    assert kept_ids(torch.zeros(1, 5000), [(1.0, 0, 1.0, 0.5, 0.0)]) == [set(range(5000))]


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert kept_ids(logits, [(1.0, 0, 1.0, 0.6, 0.0)]) == [{0, 1}]
    assert kept_ids(logits, [(1.0, 0, 1.0, 1e-9, 0.0)]) == [{0}]


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    logits = torch.linspace(1, 0, 4000)[None]  # nearly flat: the first 300 hold 9 % of the mass
    assert kept_ids(logits, [(1.0, 300, 1.0, 0.5, 0.0)]) == [oracle_ids(logits[0], (1.0, 300, 1.0, 0.5, 0.0))]


def test_a_rows_result_does_not_depend_on_the_other_rows() -> None:
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 4096, generator=generator) * torch.rand(40, 1, generator=generator) * 5
    rows = [
        (
            random.choice([0.5, 1.0]),
            random.choice([0, 1, 50, 1000]),
            random.choice([1.0, 1.0, 0.5]),
            random.choice([1.0, 0.5, 0.95]),
            random.choice([0.0, 0.05]),
        )
        for _ in range(40)
    ]
    ids, kept = candidates(logits, filters_of(rows, 4096))
    for i, row in enumerate(rows):
        alone_ids, alone = candidates(logits[i : i + 1], filters_of([row], 4096))
        here = kept[i] > -math.inf
        there = alone[0] > -math.inf
        assert torch.equal(ids[i][here], alone_ids[0][there])
        assert torch.equal(kept[i][here], alone[0][there])


def test_tokens_masked_before_never_come_back() -> None:
    logits = torch.full((2, 3000), -math.inf)
    logits[0, 7] = 1.0
    ids, kept = candidates(logits, filters_of([(1.0, 50, 1.0, 0.9, 0.0), (1.0, 50, 1.0, 0.9, 0.1)], 3000))
    assert set(ids[0][kept[0] > -math.inf].tolist()) == {7}
    assert (kept[1] == -math.inf).all()
