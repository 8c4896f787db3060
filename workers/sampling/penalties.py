"""Repetition, presence and frequency penalties over counted tokens.

Counts live on the device, one slot a request that uses a penalty, and grow with the request's tokens: a step adds one
token a row, whatever the sequence's length. A request that was rewound is counted anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.protocol import Sampling
from workers.request import Request

_CHUNK_ELEMENTS = 2**15  # of one pass: its intermediates stay in the cache


def is_penalised(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Penalties:
    """Parameters of n rows, each [n, 1] float32."""

    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> Penalties:
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        return cls(
            column([sampling.repetition_penalty for sampling in samplings]),
            column([sampling.presence_penalty for sampling in samplings]),
            column([sampling.frequency_penalty for sampling in samplings]),
        )


@dataclass(slots=True)
class _Slot:
    """What one row of the counts stands for: the first `num_counted` tokens of `request`, `last` the last of them."""

    index: int
    request: Request
    num_counted: int = 0
    last: int = -1


def _tensors(index: tuple[list[int], list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    slots, ids = (torch.tensor(values, dtype=torch.int64, device=device) for values in index)
    return slots, ids


class TokenCounts:
    """How often each token stands in a request's output, and which stand in its prompt or output."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        # float32, because arithmetic on floats is vectorised where selections by a mask are not
        self._output = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)  # [slots, V] counts
        self._seen = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)  # [slots, V] 0 or 1
        self._slots: dict[str, _Slot] = {}
        self._free: list[int] = []

    def forget(self, request_id: str) -> None:
        """Free a request's slot; unknown ids are fine."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._free.append(slot.index)

    def penalise(self, logits: torch.Tensor, requests: Sequence[Request], penalties: Penalties) -> torch.Tensor:
        """`logits` [n, V] of `requests` under their penalties, in a new tensor.

        Repetition as in CTRL (Keskar et al. 2019): a seen token's positive logit is divided by the penalty, a negative
        one multiplied. Then logit - frequency * count - presence * (count > 0), as in OpenAI's API.
        """
        slots = torch.tensor(self._count(requests), device=logits.device)
        chunk = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
        result = torch.empty_like(logits)
        for start in range(0, len(requests), chunk):
            part = slice(start, start + chunk)
            seen = self._seen[slots[part]]
            factor = seen.mul(penalties.repetition[part]).sub_(seen.sub_(1))  # the penalty where seen, 1 elsewhere
            counts = self._output[slots[part]]
            out = torch.div(logits[part].clamp(min=0), factor, out=result[part])
            out.add_(factor.mul_(logits[part].clamp(max=0)))
            out.sub_(counts.clamp(max=1).mul_(penalties.presence[part])).sub_(counts.mul_(penalties.frequency[part]))
        return result

    def _count(self, requests: Sequence[Request]) -> list[int]:
        """Bring the requests' slots up to their tokens; returns the slots' indices."""
        slots = [self._slot(request) for request in requests]
        seen: tuple[list[int], list[int]] = ([], [])
        output: tuple[list[int], list[int]] = ([], [])
        for slot, request in zip(slots, requests, strict=True):
            new = request.tokens[slot.num_counted :]
            if not new:
                continue
            seen[0].extend([slot.index] * len(new))
            seen[1].extend(new)
            generated = request.tokens[max(slot.num_counted, request.num_prompt) :]
            output[0].extend([slot.index] * len(generated))
            output[1].extend(generated)
            slot.num_counted, slot.last = len(request.tokens), new[-1]
        if seen[0]:
            self._seen[_tensors(seen, self._seen.device)] = 1.0
            one = torch.ones((), device=self._output.device)
            self._output.index_put_(_tensors(output, self._output.device), one, accumulate=True)
        return [slot.index for slot in slots]

    def _slot(self, request: Request) -> _Slot:
        slot = self._slots.get(request.request_id)
        if slot is not None:
            counted = slot.num_counted
            if (
                slot.request is request
                and counted <= len(request.tokens)
                and (counted == 0 or request.tokens[counted - 1] == slot.last)
            ):
                return slot
            self.forget(request.request_id)
        if not self._free:
            self._grow()
        slot = _Slot(self._free.pop(), request)
        self._output[slot.index] = 0
        self._seen[slot.index] = False
        self._slots[request.request_id] = slot
        return slot

    def _grow(self) -> None:
        """Double the slots."""
        old = self._seen.shape[0]
        more = max(4, old)
        self._seen = torch.cat([self._seen, self._seen.new_zeros(more, self._seen.shape[1])])
        self._output = torch.cat([self._output, self._output.new_zeros(more, self._output.shape[1])])
        self._free.extend(reversed(range(old, old + more)))
