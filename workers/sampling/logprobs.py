"""Log probabilities of given tokens: of the model itself, before any bias, penalty, mask, temperature or filter."""

from __future__ import annotations

import torch

from workers.step import SampledRow

NO_TOKEN = -1  # `SampledRow.token_id` where the request's constraints leave no token
NOT_FINITE = -2  # `SampledRow.token_id` where the model's logits are NaN or infinite
_MAX_TOP = 20  # alternatives that a request may ask for
_CHUNK_ELEMENTS = 2**24  # of one pass over many rows


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> torch.Tensor:
    """Statistics [n, 2 + 2k] float64 of `token_ids` [n] under `logits` [n, V], k = the alternatives looked up.

    Columns: log probability, rank (1: the most likely), k ids, k log probabilities in falling order. Where any are
    asked for, k is at least 20 (or V), so that ties fall the same way whatever the other rows want.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    rank = (logprobs > chosen).sum(-1, keepdim=True) + 1
    columns = [chosen.double(), rank.double()]
    if num_top:
        values, ids = logprobs.topk(min(max(num_top, _MAX_TOP), logits.shape[-1]))
        columns += [ids.double(), values.double()]
    return torch.cat(columns, -1)


def sampled_row(token_id: int, statistics: list[float], num_top: int) -> SampledRow:
    """One row of `token_logprobs` as a value with its best `num_top` alternatives."""
    if statistics[0] != statistics[0]:
        return SampledRow(NOT_FINITE)
    k = (len(statistics) - 2) // 2
    return SampledRow(
        token_id,
        logprob=statistics[0],
        rank=int(statistics[1]),
        top_ids=tuple(map(int, statistics[2 : 2 + min(num_top, k)])),
        top_logprobs=tuple(statistics[2 + k : 2 + k + min(num_top, k)]),
    )


def score(logits: torch.Tensor, target_ids: torch.Tensor, num_top: int) -> list[SampledRow]:
    """Log probability, rank and best alternatives of `target_ids` [N] under `logits` [N, V], some rows at a time."""
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    rows = [
        row
        for start in range(0, logits.shape[0], chunk)
        for row in token_logprobs(logits[start : start + chunk], target_ids[start : start + chunk], num_top).tolist()
    ]
    return [sampled_row(token_id, row, num_top) for token_id, row in zip(target_ids.tolist(), rows, strict=True)]
