"""The values passed between the stages of one step. No logic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from workers.attention.paged import AttentionPlan
    from workers.request import Request


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`num_tokens` of a request's uncomputed tokens run in this step."""

    request: Request
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler decided: which tokens run."""

    scheduled: list[Scheduled] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class Batch:
    """A `StepPlan` as tensors. T tokens of all sequences behind each other, R rows whose results are needed."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64: rotary position = index in the sequence + the request's offset
    kv_slots: torch.Tensor  # [T] int64: page * page_size + offset, where each token's K and V go
    attention: AttentionPlan
    rows: torch.Tensor  # [R] int64, of the T


@dataclass(frozen=True, slots=True)
class SampledRow:
    """One sampled token."""

    token_id: int
    logprob: float = 0.0  # filled where the request asked for logprobs
    rank: int = 0
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
