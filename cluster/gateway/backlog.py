"""What one worker has before it, as far as a gateway knows, and so how long a further request would wait there.

The worker tells its numbers now and then (`EngineState`); what the gateway has there itself it knows to the sequence at
any moment. What the worker had beyond that when it told them is other gateways', and is taken to stay until it tells
again.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.gateway.route import group_of
from cluster.gateway.ttft import RequestSize, StepCostFit, WorkerSnapshot, predict_ttft
from cluster.protocol import EngineState, Hello, Submit

FIRST_MEAN_TOKENS = 64.0  # of a sequence, before one has ended
LEARNING = 0.05  # weight of what is new in the means here: some twenty observations are remembered
MAX_CORRECTION = 16.0  # of a prediction, either way
MAX_LOG_SURPRISE = 0.5  # how far off a prediction may be, as a logarithm, to count in full: outliers count no more
MAX_HASHED_PAGES = 512  # of one prompt


@dataclass(frozen=True, slots=True)
class OwnLoad:
    """A gateway's own sequences on one worker: those that run there and those that wait."""

    num_decoding: int  # that have their first token
    num_without_token: int  # that wait for a place, or for their prompt
    prompt_tokens: int  # of the latter, likely to be computed


@dataclass(frozen=True, slots=True)
class Prefix:
    """The full pages of a prompt, by hashes that are chained, and how many of its tokens a worker is likely to have."""

    pages: tuple[bytes, ...]
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds from sequences' being sent to workers until each of them has its first token."""

    ttft_s: float
    alone_s: float  # if the worker had nothing else to do
    uncorrected_s: float


def page_hashes(submit: Submit, page_size: int) -> tuple[bytes, ...]:
    """What the full pages of a prompt are told apart by; equal ones begin alike from the prompt's first token on."""
    ids, found = submit.prompt_ids, []
    chain = submit.cache_salt.encode()
    for end in range(page_size, min(len(ids), MAX_HASHED_PAGES * page_size) + 1, page_size):
        chain = hashlib.blake2b(array("Q", ids[end - page_size : end]).tobytes() + chain, digest_size=16).digest()
        found.append(chain)
    return tuple(found)


class SeenPages:
    """The pages that a worker has computed of late, the least recently used forgotten, as it does itself."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pages: OrderedDict[bytes, None] = OrderedDict()

    def num_found(self, pages: Sequence[bytes]) -> int:
        """How many of a prompt's first pages are among them."""
        return next((place for place, page in enumerate(pages) if page not in self._pages), len(pages))

    def add(self, pages: Sequence[bytes]) -> None:
        for page in reversed(pages):  # a prompt's end is forgotten before its beginning
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > self._capacity:
            self._pages.popitem(last=False)


class Backlog:
    """One worker's. Kept while the worker is away: another process of its name has the same steps to do."""

    def __init__(self) -> None:
        self._hello: Hello | None = None
        self._state = EngineState()
        self._others = OwnLoad(0, 0, 0)  # as of the last state
        self._fit = StepCostFit()
        self._seen = SeenPages(0)
        self._found = 1.0  # of the tokens that were expected in its prefix cache
        self._mean_output_tokens = FIRST_MEAN_TOKENS
        self._log_correction = 0.0
        self._last: Submit | None = None
        self._last_pages: tuple[bytes, ...] = ()

    # -------------------------------------------------------------------------------------------- what is heard of it

    def connected(self, hello: Hello) -> None:
        if self._hello is None or hello.worker_id != self._hello.worker_id:
            self._seen = SeenPages(hello.num_pages if hello.prefix_cache else 0)
            self._last = None  # hashed for another page size, maybe
            self._state = EngineState(
                worker_id=hello.worker_id, pages_total=hello.num_pages, pages_free=hello.num_pages
            )
        self._others = OwnLoad(0, 0, 0)
        self._hello = hello

    def told(self, state: EngineState, own: OwnLoad) -> None:
        """Its numbers as of now, when this gateway has `own` there."""
        self._fit.observe(self._state, state)
        self._state = state
        num_all = state.num_running + state.num_waiting + state.num_compiling
        num_others = max(0, num_all - own.num_decoding - own.num_without_token)
        num_decoding = min(num_others, max(0, state.num_running - own.num_decoding))
        self._others = OwnLoad(
            num_decoding=num_decoding,
            num_without_token=num_others - num_decoding,
            prompt_tokens=max(0, state.prompt_tokens_ahead - own.prompt_tokens),
        )

    def began(self, prefix: Prefix, num_cached: int) -> None:
        """A sequence's first output came; `num_cached`: the prompt tokens that the worker had."""
        self._seen.add(prefix.pages)
        if prefix.num_cached:
            self._found += LEARNING * (min(1.0, num_cached / prefix.num_cached) - self._found)

    def came(self, prediction: Prediction, ttft_s: float) -> None:
        """What was predicted took `ttft_s`."""
        surprise = math.log(max(ttft_s, 1e-6) / prediction.uncorrected_s) - self._log_correction
        bound = math.log(MAX_CORRECTION)
        step = 2 * LEARNING * max(-MAX_LOG_SURPRISE, min(MAX_LOG_SURPRISE, surprise))
        self._log_correction = max(-bound, min(bound, self._log_correction + step))

    def ended(self, num_tokens: int) -> None:
        """A sequence has ended with so many tokens."""
        self._mean_output_tokens += LEARNING * (num_tokens - self._mean_output_tokens)

    # -------------------------------------------------------------------------------------------- what follows from it

    def prefix(self, submit: Submit) -> Prefix:
        """Of a sequence's prompt, with what the worker is likely to find of it."""
        if self._hello is None or not self._hello.prefix_cache:
            return Prefix(())
        pages = self._pages(submit, self._hello.page_size)
        return Prefix(pages, round(self._seen.num_found(pages) * self._hello.page_size * self._found))

    def shared_prefix(self, submit: Submit) -> Prefix:
        """Of a sequence whose prompt another one there has that computes it first."""
        if self._hello is None or not self._hello.prefix_cache:
            return Prefix(())
        pages = self._pages(submit, self._hello.page_size)
        return Prefix(pages, len(pages) * self._hello.page_size)

    def _pages(self, submit: Submit, page_size: int) -> tuple[bytes, ...]:
        """Hashed once for all that is asked of one prompt in a row."""
        last = self._last
        if last is None or last.prompt_ids is not submit.prompt_ids or last.cache_salt != submit.cache_salt:
            self._last, self._last_pages = submit, page_hashes(submit, page_size)
        return self._last_pages

    def snapshot(self, own: OwnLoad) -> WorkerSnapshot | None:
        """What there is to do, with `own` there; None before it was connected."""
        hello, state, others = self._hello, self._state, self._others
        if hello is None:
            return None
        return WorkerSnapshot(
            cost=self._fit.cost,
            token_budget=hello.token_budget,
            max_num_seqs=hello.max_num_seqs,
            num_running=own.num_decoding + others.num_decoding,
            num_waiting=own.num_without_token + others.num_without_token,
            prompt_tokens_ahead=own.prompt_tokens + others.prompt_tokens,
            pages_total=hello.num_pages,
            pages_free=state.pages_free,
            page_size=hello.page_size,
            mean_output_tokens=self._mean_output_tokens,
        )

    def size(self, submits: Sequence[Submit]) -> RequestSize:
        """Of sequences that are sent there together; those of a group share its prompt's pages, where pages are kept.

        What one prompt has in common with another of them is not looked for.
        """
        keeps_pages = self._hello is not None and self._hello.prefix_cache
        prompts = list({group_of(submit): submit for submit in submits}.values())
        computed = prompts if keeps_pages else submits
        lengths = [len(submit.prompt_ids) for submit in computed]
        cached = [self.prefix(submit).num_cached for submit in computed]
        return RequestSize(
            prompt_tokens=sum(lengths),
            # a prompt's last token is computed, whatever is cached
            cached_tokens=sum(min(found, length - 1) for found, length in zip(cached, lengths, strict=True)),
            num_prompts=len(computed),
            num_samples=len(submits),
        )

    def predict(self, submits: Sequence[Submit], own: OwnLoad) -> Prediction | None:
        """When all first tokens of sequences would be there that are sent now; None before it was connected."""
        return self.predict_size(self.size(submits), own)

    def predict_size(self, size: RequestSize, own: OwnLoad) -> Prediction | None:
        snapshot = self.snapshot(own)
        if snapshot is None:
            return None
        correction = math.exp(self._log_correction)
        uncorrected_s = predict_ttft(snapshot, size)
        return Prediction(
            ttft_s=uncorrected_s * correction,
            alone_s=predict_ttft(snapshot.idle(), size) * correction,
            uncorrected_s=uncorrected_s,
        )
