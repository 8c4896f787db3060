"""What a request forbids or favours before the draw: logit_bias, penalties, bad_words, min_tokens, the grammar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workers.request import Request
from workers.sampling.penalties import Penalties, TokenCounts, is_penalised

Entries = tuple[torch.Tensor, torch.Tensor]  # rows [m] and token ids [m] of a [n, V] tensor
Prefixes = dict[int, list[tuple[list[int], int]]]  # a prefix's last token: (the prefix, the token that it forbids)


def is_constrained(request: Request, *, below_min_tokens: bool) -> bool:
    sampling = request.sampling
    return bool(
        below_min_tokens or request.is_guided or sampling.logit_bias or sampling.bad_words or is_penalised(sampling)
    )


def _prefixes(words: Sequence[Sequence[int]]) -> Prefixes:
    """The words of several tokens by the last token before their end."""
    found: Prefixes = {}
    for word in words:
        if len(word) > 1:
            found.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))
    return found


def _entries(pairs: list[tuple[int, int]], device: torch.device) -> Entries | None:
    if not pairs:
        return None
    rows, ids = torch.tensor(pairs, device=device).unbind(-1)
    return rows, ids


@dataclass(frozen=True, slots=True)
class Constraints:
    """The constraints of n requests, prepared for as long as these n run together."""

    requests: list[Request]
    bias: tuple[Entries, torch.Tensor] | None
    penalised: list[int]  # rows
    penalties: Penalties | None
    banned: Entries | None  # one-token bad words and, below min_tokens, the ids that would end the request
    prefixes: list[tuple[int, Prefixes]]  # longer bad words, by row
    guided: list[int]  # rows with a grammar, or where thoughts must end

    @classmethod
    def of(
        cls, requests: list[Request], below_min: set[int], eos_token_ids: tuple[int, ...], device: torch.device
    ) -> Constraints:
        """`below_min`: the rows that have fewer than min_tokens."""
        bias: list[tuple[int, int]] = []
        weights: list[float] = []
        banned: list[tuple[int, int]] = []
        for row, request in enumerate(requests):
            for token_id, weight in request.sampling.logit_bias.items():
                bias.append((row, token_id))
                weights.append(weight)
            banned += [(row, word[0]) for word in request.sampling.bad_words if len(word) == 1]
            if row in below_min:
                stopping = request.stopping
                ends = stopping.stop_token_ids if stopping.ignore_eos else stopping.stop_token_ids + eos_token_ids
                banned += [(row, token_id) for token_id in ends]
        penalised = [row for row, request in enumerate(requests) if is_penalised(request.sampling)]
        biased = _entries(bias, device)
        return cls(
            requests=requests,
            bias=biased and (biased, torch.tensor(weights, dtype=torch.float32, device=device)),
            penalised=penalised,
            penalties=Penalties.of([requests[row].sampling for row in penalised], device) if penalised else None,
            banned=_entries(banned, device),
            prefixes=[
                (row, prefixes)
                for row, request in enumerate(requests)
                if (prefixes := _prefixes(request.sampling.bad_words))
            ],
            guided=[row for row, request in enumerate(requests) if request.is_guided],
        )

    def apply_(self, logits: torch.Tensor, counts: TokenCounts) -> torch.Tensor:
        """Apply all in their order to `logits` [n, V], in place; forbidden tokens become -inf."""
        if self.bias:
            at, weights = self.bias
            logits.index_put_(at, weights, accumulate=True)
        if self.penalties:
            requests = [self.requests[row] for row in self.penalised]
            logits[self.penalised] = counts.penalise(logits[self.penalised], requests, self.penalties)
        never = logits.new_tensor(-math.inf)
        for entries in (self.banned, self._completed_words(logits.device)):
            if entries:
                logits.index_put_(entries, never)
        if self.guided:
            logits[self.guided] = logits[self.guided].masked_fill_(self._outside_grammar(logits), -math.inf)
        return logits

    def _completed_words(self, device: torch.device) -> Entries | None:
        """The tokens that would complete a bad word now."""
        pairs = []
        for row, prefixes in self.prefixes:
            tokens = self.requests[row].tokens
            for prefix, last in prefixes.get(tokens[-1], ()):
                if tokens[-len(prefix) :] == prefix:
                    pairs.append((row, last))
        return _entries(pairs, device)

    def _outside_grammar(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows with a grammar, V] bool: the tokens that their grammars refuse next."""
        vocab_size = logits.shape[-1]
        bits = np.zeros((len(self.guided), (vocab_size + 31) // 32), dtype=np.int32)
        for packed, row in zip(bits, self.guided, strict=True):
            matcher = self.requests[row].matcher
            assert matcher is not None
            matcher.fill_mask(packed)
        allowed = np.unpackbits(bits.view(np.uint8), axis=-1, count=vocab_size, bitorder="little")
        return torch.from_numpy(allowed == 0).to(logits.device)
