"""Which tokens run in the next step. Knows no phases: a request has tokens that are not computed yet, or none."""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass

from workers.cache.page_table import PageTable
from workers.cache.pages import OutOfPagesError
from workers.request import Request, Status
from workers.step import Scheduled, StepPlan


@dataclass(frozen=True)
class SchedulerOptions:
    max_num_seqs: int = 64
    token_budget: int = 2048  # tokens a step
    static_batching: bool = False  # admit only when nothing runs: the baseline that continuous batching is held against


def _age(request: Request) -> tuple[int, float]:
    """Sort key: more urgent first, then older first."""
    return request.priority, request.arrival


# Logits of every row are as wide as the vocabulary: so many rows of a sequence at a time, whatever the budget.
MAX_LOGIT_ROWS = 128


def _chunk(request: Request, num_uncomputed: int, budget: int) -> int:
    """How many of a request's tokens run in this step."""
    if request.sampling.prompt_logprobs is not None and request.num_computed < request.num_prompt:
        budget = min(budget, MAX_LOGIT_ROWS)
    return min(num_uncomputed, budget)


class Scheduler:
    """Temporal fusion (Flover; Orca's iteration-level scheduling): requests join and leave at any step.

    Requests that run come first, those with one token to compute before prompt chunks, so that a long prompt never
    stops the others; then the waiting ones, most urgent and oldest first, up to the token budget. When pages run out
    the youngest gives its pages up and waits to be computed again: nothing of it is lost.
    """

    def __init__(self, options: SchedulerOptions, pages: PageTable) -> None:
        self.options = options
        self.running: list[Request] = []  # by age
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_cached_tokens = 0
        self._pages = pages

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take a request out, whatever its state, and free its pages."""
        (self.running if request.status is Status.RUNNING else self.waiting).remove(request)
        self._pages.release(request)
        request.status = Status.FINISHED

    def schedule(self) -> StepPlan:
        scheduled: list[Scheduled] = []
        num_preemptions = self.num_preemptions
        budget = self.options.token_budget
        counts = [(request, len(request.tokens) - request.num_computed) for request in self.running]
        order = [item for item in counts if item[1] <= 1] + [item for item in counts if item[1] > 1]
        for request, num_uncomputed in order:
            if budget == 0:
                break
            if request.status is not Status.RUNNING:  # preempted in this very loop
                continue
            num_tokens = _chunk(request, num_uncomputed, budget)
            if self._reserve(request, num_tokens, scheduled):
                scheduled.append(Scheduled(request, num_tokens))
                budget -= num_tokens
        # After a preemption nobody is admitted: the newcomer would take the pages that were just given up.
        if self.num_preemptions == num_preemptions and not (self.options.static_batching and self.running):
            self._admit(scheduled, budget)
        return StepPlan(scheduled)

    def _reserve(self, request: Request, num_tokens: int, scheduled: list[Scheduled]) -> bool:
        """Pages for `request`, taken from the youngest where none are free; False where it was itself the youngest."""
        while True:
            try:
                self._pages.reserve(request, num_tokens)
                return True
            except OutOfPagesError:
                chosen = {id(item.request) for item in scheduled}
                # Whoever is in the step already keeps its place: undoing it would undo its reservation too.
                victim = max((r for r in self.running if id(r) not in chosen), key=_age)
                self._preempt(victim)
                if victim is request:
                    return False

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._pages.release(request)
        request.status = Status.WAITING
        self.waiting.append(request)
        self.num_preemptions += 1

    def _admit(self, scheduled: list[Scheduled], budget: int) -> None:
        self.waiting.sort(key=_age)
        admitted: set[int] = set()
        for request in self.waiting:
            if budget == 0 or len(self.running) >= self.options.max_num_seqs:
                break
            if self._waits_for_its_group(request):
                continue
            if not request.page_ids:  # a fork waits with the pages that it shares
                self._find_prefix(request)
            if not self._has_room(request):
                # Nobody who waits may hold pages that whoever is first in line needs.
                for other in self.waiting:
                    if id(other) not in admitted:
                        self._pages.release(other)
                break
            num_tokens = _chunk(request, request.num_uncomputed, budget)
            self._pages.reserve(request, num_tokens)
            request.status = Status.RUNNING
            if request.scheduled is None:
                request.scheduled = time.monotonic()
            insort(self.running, request, key=_age)
            admitted.add(id(request))
            scheduled.append(Scheduled(request, num_tokens))
            budget -= num_tokens
        self.waiting = [request for request in self.waiting if id(request) not in admitted]

    def _find_prefix(self, request: Request) -> None:
        num_found = min(self._pages.match_prefix(request), request.num_prompt)
        if request.num_cached is None:  # counted once, whatever preemptions follow
            request.num_cached = num_found
            self.num_queried_tokens += request.num_prompt
            self.num_cached_tokens += num_found

    def _has_room(self, request: Request) -> bool:
        """Room for all its tokens, and a page for each that runs: admitting to preempt at once helps nobody."""
        needed = self._pages.num_missing(request, request.num_uncomputed)
        return needed + len(self.running) <= self._pages.pool.num_free or (
            not self.running and needed <= self._pages.pool.num_free
        )

    def _waits_for_its_group(self, request: Request) -> bool:
        """A prompt that another of the group computes right now is taken from the prefix cache when it is there."""
        return (
            bool(request.group)
            and request.num_prompt > self._pages.page_size
            and self._pages.uses_prefixes(request)
            and any(
                other.group == request.group and other.num_computed < request.num_prompt - 1 for other in self.running
            )
        )
