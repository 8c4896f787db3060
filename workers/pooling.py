"""A prompt's embedding: its last hidden states pooled into one vector of length 1.

The last token's state, which has seen all the others, is what decoder-only embedding models are trained for
(E5-Mistral, arXiv 2401.00368; Qwen3 Embedding, arXiv 2506.05176); the mean of all is there for those trained so.
"""

from __future__ import annotations

import struct

import torch

from cluster.errors import EngineError
from cluster.protocol import Finish
from workers.request import Request
from workers.step import StepPlan


def take_pooled(plan: StepPlan, rows_from: list[int], hidden: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Take the states of what is embedded out of a step's: `hidden` [R, H] of each item's tokens from `rows_from` on.

    -> the same of what is generated: those whose logits are needed.
    """
    if all(item.request.pooling is None for item in plan.scheduled):
        return rows_from, hidden
    left, kept, next_row = [], [hidden[:0]], 0
    for item, first in zip(plan.scheduled, rows_from, strict=True):
        states = hidden[next_row : next_row + item.num_tokens - first]
        next_row += len(states)
        if item.request.pooling is None:
            left.append(first)
            kept.append(states)
        else:
            left.append(item.num_tokens)
            if len(states):
                _add(item.request, states)
    return left, torch.cat(kept)


def _add(request: Request, hidden: torch.Tensor) -> None:
    """Take in the last hidden states [R, H] of a request's next tokens: for the mean of each, else of its last alone.

    The sum is made state by state in their order, so it does not depend on the chunks that they come in.
    """
    if request.pooling == "last":
        request.pooled = hidden[-1].double()
        return
    if request.pooled is None or not request.num_computed:  # the latter also when it begins again, preempted
        request.pooled = torch.zeros(hidden.shape[1], dtype=torch.float64, device=hidden.device)
    for state in hidden.double():
        request.pooled += state


def embedding(request: Request) -> tuple[bytes, Finish]:
    """`RequestOutput.embedding` of a request whose prompt is computed, and its end.

    That is an error where the pooled state has no direction: it is not finite, or zero.
    """
    assert request.pooled is not None, "its last token has been computed"
    norm = float(request.pooled.norm())  # of the sum: it has the direction of the mean
    if not 0.0 < norm < float("inf"):
        message = "the model's last hidden state is no finite vector: the checkpoint may be damaged"
        return b"", Finish(reason="error", error_code=EngineError.code, error_message=message)
    values = (request.pooled / norm).tolist()
    return struct.pack(f"<{len(values)}f", *values), Finish(reason="stop")
