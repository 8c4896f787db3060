"""The next token of every row of a batch at once.

Order: logit_bias, repetition penalty (prompt and output), presence and frequency penalty (output), bad_words,
min_tokens, grammar; then, where temperature > 0, temperature, top_k, typical_p, top_p, min_p, and the draw: the largest
of logit / T + Gumbel(seed, choice, position, token id). temperature 0 takes the largest logit (the lowest id among
equals). Log probabilities are the model's own, before all of this.

A token depends on its prefix, its seed and its parameters: rows are only ever worked on row by row, so neither the
other rows nor the order of them changes a bit of it. Each feature runs on the rows that use it and on no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import EngineError, ForetokenError, GrammarError, InvalidValueError
from workers.kernels.gumbel_argmax import gumbel_argmax
from workers.kernels.native import HostKernels
from workers.request import Request
from workers.sampling import filters, logprobs
from workers.sampling.constraints import Constraints, is_constrained
from workers.sampling.filters import Filters
from workers.sampling.gumbel import GumbelNoise, position_keys, stream_key
from workers.sampling.logprobs import NO_TOKEN, NOT_FINITE
from workers.sampling.penalties import TokenCounts
from workers.step import SampledRow


def failure(request: Request, row: SampledRow) -> ForetokenError | None:
    """Why `row` is no token (its id is negative), as the error that ends `request`; None where it is one."""
    if row.token_id >= 0:
        return None
    if row.token_id == NOT_FINITE:
        return EngineError("the model's logits are not finite (NaN or infinity) for this sequence")
    if request.matcher is not None and request.matcher.error:
        return GrammarError(f"the grammar cannot be followed further: {request.matcher.error}")
    return InvalidValueError(
        "no token is allowed next: response_format, bad_words, logit_bias and min_tokens exclude each other"
    )


@dataclass(frozen=True, slots=True)
class _Draw:
    """Rows drawn in one way: `rows` of their part (None: all of it), `keys` their places among the drawn rows."""

    kind: str  # greedy | plain | filtered
    rows: torch.Tensor | None
    keys: slice
    temperature: torch.Tensor  # [n, 1] float32
    filters: Filters | None


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of the batch that are worked on together: with constraints or without."""

    rows: torch.Tensor | None  # None: all of the batch
    constraints: Constraints | None
    draws: list[_Draw]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A batch's composition, prepared once and used while it lasts."""

    requests: list[Request]
    guided: list[bool]
    min_length: list[tuple[int, int]]  # rows with min_tokens, and the length at which they reach it
    below_min: set[int]
    parts: list[_Part]
    order: list[int]  # the row of each result, draws behind each other
    keyed: list[int]  # the rows that need noise
    streams: NDArray[np.uint64] | None  # their stream keys
    logprob_rows: list[int]
    logprob_places: torch.Tensor | None  # their places in `order`
    num_top: int


@dataclass(slots=True)
class Sampler:
    """Draws tokens from a model's logits on `device`.

    The only state is what is prepared for the last batch and the token counts of requests with penalties, which
    `forget` frees.
    """

    vocab_size: int
    device: torch.device
    eos_token_ids: tuple[int, ...] = ()
    native: HostKernels | None = None  # draws without filters run there
    _noise: GumbelNoise = field(init=False, repr=False)
    _counts: TokenCounts = field(init=False, repr=False)
    _layout: _Layout | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self._noise = GumbelNoise(self.vocab_size, self.device)
        self._counts = TokenCounts(self.vocab_size, self.device)

    def sample(self, logits: torch.Tensor, requests: list[Request]) -> list[SampledRow]:
        """Row r of `logits` [R, V] float32 gives the token at position len(tokens) of `requests[r]`.

        A row that has no valid token gets the id `NO_TOKEN` or `NOT_FINITE`, both negative: see `failure`. The other
        rows are not touched by it.
        """
        if not requests:
            return []
        lengths = [len(request.tokens) for request in requests]
        layout = self._prepare(requests, lengths)
        keys = None
        if layout.streams is not None:
            keys = position_keys(layout.streams, [lengths[row] for row in layout.keyed]).to(self.device)
        drawn = [result for part in layout.parts for result in self._draw_part(logits, part, keys)]
        values, ids = drawn[0] if len(drawn) == 1 else map(torch.cat, zip(*drawn, strict=True))
        if layout.logprob_places is None:
            return _in_order(list(map(_sampled, values.tolist(), ids.tolist())), layout.order)
        ids = torch.where(values.abs() < math.inf, ids, torch.where(values == -math.inf, NO_TOKEN, NOT_FINITE))
        return self._with_logprobs(logits, ids, layout)

    def score(self, logits: torch.Tensor, target_ids: torch.Tensor, num_top: int) -> list[SampledRow]:
        """Log probability, rank and `num_top` alternatives of `target_ids` [N] under `logits` [N, V] float32."""
        return logprobs.score(logits, torch.as_tensor(target_ids, device=logits.device), num_top)

    def forget(self, request_id: str) -> None:
        """Free what is kept for a request that has ended."""
        self._counts.forget(request_id)
        if self._layout and any(request.request_id == request_id for request in self._layout.requests):
            self._layout = None

    def _draw_part(
        self, logits: torch.Tensor, part: _Part, keys: torch.Tensor | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(largest scores, ids) of each of a part's draws."""
        if part.rows is not None:
            logits = logits[part.rows]
        if part.constraints:
            logits = part.constraints.apply_(logits if part.rows is not None else logits.clone(), self._counts)
        return [self._draw(logits if draw.rows is None else logits[draw.rows], draw, keys) for draw in part.draws]

    def _draw(self, logits: torch.Tensor, draw: _Draw, keys: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if draw.kind == "greedy":
            return gumbel_argmax(logits, self._noise, None, None, self.native)
        assert keys is not None
        keys = keys[draw.keys]
        if draw.filters is None:
            return gumbel_argmax(logits, self._noise, keys, draw.temperature, self.native)
        token_ids, kept = filters.candidates(logits, draw.filters)
        values, places = kept.add_(self._noise.at(keys, token_ids)).max(-1)
        return values, token_ids.gather(-1, places[:, None])[:, 0]

    def _with_logprobs(self, logits: torch.Tensor, ids: torch.Tensor, layout: _Layout) -> list[SampledRow]:
        rows = layout.logprob_rows
        wanted = logits if len(rows) == len(layout.order) else logits[rows]
        chosen = ids[layout.logprob_places].clamp(min=0)
        statistics = logprobs.token_logprobs(wanted, chosen, layout.num_top)
        flat = torch.cat([ids.double(), statistics.flatten()]).tolist()  # one transfer
        num_rows, width = len(layout.order), statistics.shape[1]
        result = _in_order([SampledRow(int(token_id)) for token_id in flat[:num_rows]], layout.order)
        for i, row in enumerate(rows):
            start = num_rows + i * width
            if result[row].token_id >= 0:
                num_top = layout.requests[row].sampling.logprobs or 0
                result[row] = logprobs.sampled_row(result[row].token_id, flat[start : start + width], num_top)
        return result

    def _prepare(self, requests: list[Request], lengths: list[int]) -> _Layout:
        """The layout of this batch: the last one, where nothing that it rests on has changed."""
        layout = self._layout
        guided = [request.is_guided for request in requests]
        if layout is not None and layout.requests == requests and layout.guided == guided:
            below_min = {row for row, length in layout.min_length if lengths[row] < length}
            if below_min == layout.below_min:
                return layout
        self._layout = self._lay_out(requests, lengths, guided)
        return self._layout

    def _lay_out(self, requests: list[Request], lengths: list[int], guided: list[bool]) -> _Layout:
        min_length = [
            (row, request.num_prompt + request.stopping.min_tokens)
            for row, request in enumerate(requests)
            if request.stopping.min_tokens
        ]
        below_min = {row for row, length in min_length if lengths[row] < length}
        constrained = [
            is_constrained(request, below_min_tokens=row in below_min) for row, request in enumerate(requests)
        ]
        parts: list[_Part] = []
        order: list[int] = []
        keyed: list[int] = []
        for with_constraints in (False, True):
            rows = [row for row, flag in enumerate(constrained) if flag == with_constraints]
            if not rows:
                continue
            chosen = [requests[row] for row in rows]
            constraints = None
            if with_constraints:
                below = {place for place, row in enumerate(rows) if row in below_min}
                constraints = Constraints.of(chosen, below, self.eos_token_ids, self.device)
            draws = []
            for kind in ("greedy", "plain", "filtered"):
                places = [place for place, request in enumerate(chosen) if _kind(request, self.vocab_size) == kind]
                if places:
                    keys = slice(len(keyed), len(keyed) + len(places))
                    draws.append(self._draw_of(kind, places, chosen, keys))
                    order += [rows[place] for place in places]
                    keyed += [rows[place] for place in places] if kind != "greedy" else []
            parts.append(_Part(self._index(rows, len(requests)), constraints, draws))
        logprob_rows = [row for row, request in enumerate(requests) if request.sampling.logprobs is not None]
        streams = [stream_key(requests[row].sampling.seed, requests[row].sampling.choice) for row in keyed]
        return _Layout(
            requests=list(requests),
            guided=guided,
            min_length=min_length,
            below_min=below_min,
            parts=parts,
            order=order,
            keyed=keyed,
            streams=np.array(streams, dtype=np.uint64) if streams else None,
            logprob_rows=logprob_rows,
            logprob_places=torch.tensor([order.index(row) for row in logprob_rows], device=self.device)
            if logprob_rows
            else None,
            num_top=max((requests[row].sampling.logprobs or 0 for row in logprob_rows), default=0),
        )

    def _draw_of(self, kind: str, places: list[int], requests: list[Request], keys: slice) -> _Draw:
        samplings = [requests[place].sampling for place in places]

        def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)[:, None]

        temperature = column([sampling.temperature for sampling in samplings], torch.float32)
        chosen = None
        if kind == "filtered":
            size = self.vocab_size
            chosen = Filters(
                temperature=temperature,
                top_k=column([min(s.top_k or size, size) for s in samplings], torch.int64),
                typical_p=column([s.typical_p if s.typical_p < 1 else filters.OFF for s in samplings], torch.float64),
                top_p=column([s.top_p if s.top_p < 1 else filters.OFF for s in samplings], torch.float64),
                log_min_p=column([math.log(s.min_p) if s.min_p else -math.inf for s in samplings], torch.float32),
                any_typical=any(s.typical_p < 1 for s in samplings),
            )
        return _Draw(kind, self._index(places, len(requests)), keys, temperature, chosen)

    def _index(self, rows: list[int], num_rows: int) -> torch.Tensor | None:
        return None if len(rows) == num_rows else torch.tensor(rows, device=self.device)


def _kind(request: Request, vocab_size: int) -> str:
    sampling = request.sampling
    if sampling.temperature < torch.finfo(torch.float32).tiny:
        return "greedy"
    unfiltered = (
        not 0 < sampling.top_k < vocab_size and sampling.top_p >= 1 and sampling.typical_p >= 1 and sampling.min_p <= 0
    )
    return "plain" if unfiltered else "filtered"


def _sampled(value: float, token_id: int) -> SampledRow:
    if -math.inf < value < math.inf:
        return SampledRow(token_id)
    return SampledRow(NO_TOKEN if value == -math.inf else NOT_FINITE)


def _in_order(results: list[SampledRow], order: list[int]) -> list[SampledRow]:
    """Results, which lie in the order of the draws, by row."""
    placed = results.copy()
    for result, row in zip(results, order, strict=True):
        placed[row] = result
    return placed
