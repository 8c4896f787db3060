"""How long until a request's first token: a pure function of what a worker has to do and of what its steps cost.

A step costs a fixed part, a part for each prompt token in it and a part for each sequence that decodes in it; the three
are fitted to what the worker counts. A new request waits until a place in the batch and pages are free, then until the
prompt tokens before its own, and its own, were computed, as many a step as the budget leaves beside the decodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from cluster.protocol import EngineState

FORGETTING = 0.98  # weight of an interval after the next: some fifty intervals are remembered
PRIOR_WEIGHT = 0.1  # of what was assumed before anything was seen, in intervals
NUM_FIRST = 20  # intervals until what is expected is worth something
MAX_SURPRISE = 2.0  # an interval counts as no more than so many times what was expected, and no less than its inverse
MIN_COST_S = 1e-9  # no part of a step is free: a fit to noise must not predict that waiting shortens the wait


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step."""

    base_s: float  # of any step
    prompt_token_s: float  # for each prompt token in it
    sequence_s: float  # for each sequence that decodes in it

    def step_s(self, *, prompt_tokens: float, sequences: float) -> float:
        return self.base_s + self.prompt_token_s * prompt_tokens + self.sequence_s * sequences


PRIOR = StepCost(base_s=0.005, prompt_token_s=0.0005, sequence_s=0.001)  # a small model on a CPU


class StepCostFit:
    """`StepCost` by least squares with exponential forgetting over a worker's counters.

    An interval between two states is one observation: its step seconds, by its steps, its prompt tokens and its decoded
    sequences, weighted so that long intervals count no more than short ones.
    """

    def __init__(self, prior: StepCost = PRIOR) -> None:
        # What was assumed stays a fraction of an observation for good: what is never seen (no prompt for an hour) is
        # then as it was, not undetermined. An interval has some tens of prompt tokens and a few sequences a step.
        scales = (1.0, 32.0, 4.0)
        parts = (prior.base_s, prior.prompt_token_s, prior.sequence_s)
        self._prior = [(PRIOR_WEIGHT * scale**2, part) for scale, part in zip(scales, parts, strict=True)]
        self._matrix = [[0.0] * 3 for _ in range(3)]  # weighted sums of x xᵀ
        self._vector = [0.0] * 3  # of x y
        self._num_observed = 0
        self._cost: StepCost | None = prior  # None: to be solved for when it is asked for

    def observe(self, before: EngineState, after: EngineState) -> None:
        """Learn from what one process did between two of its states; without effect for two processes' states."""
        steps = after.steps - before.steps
        if after.worker_id != before.worker_id or steps <= 0:
            return
        prompt = (after.prompt_tokens - before.prompt_tokens) / steps
        # a sequence in its prompt counts as one of the step's too, but for a chunk's tokens, not for a decode
        decoded = max(0.0, (after.step_tokens - before.step_tokens) / steps - prompt)
        row = (1.0, prompt, decoded)
        expected = self.cost.step_s(prompt_tokens=prompt, sequences=decoded)
        # a machine that was away for a moment says nothing of the next; one that became slower says it again
        seconds = (after.step_s - before.step_s) / steps
        if self._num_observed >= NUM_FIRST:
            seconds = min(max(seconds, expected / MAX_SURPRISE), expected * MAX_SURPRISE)
        self._num_observed += 1
        for i in range(3):
            for j in range(3):
                self._matrix[i][j] = FORGETTING * self._matrix[i][j] + row[i] * row[j]
            self._vector[i] = FORGETTING * self._vector[i] + row[i] * seconds
        self._cost = None

    @property
    def cost(self) -> StepCost:
        if self._cost is None:
            matrix, vector = [[*line] for line in self._matrix], [*self._vector]
            for i, (weight, part) in enumerate(self._prior):
                matrix[i][i] += weight
                vector[i] += weight * part
            self._cost = StepCost(*non_negative_solution(matrix, vector))
        return self._cost


def non_negative_solution(matrix: list[list[float]], vector: list[float]) -> tuple[float, float, float]:
    """argmin xᵀAx / 2 - bᵀx over x >= MIN_COST_S, for a positive definite A [3, 3].

    Of the eight sets of parts that may lie above the bound it is the one whose solution has none below it, and whose
    gradient leads no other part up from it (Karush-Kuhn-Tucker).
    """
    found = [MIN_COST_S] * 3
    for size in (3, 2, 1, 0):
        for free in combinations(range(3), size):
            found = _solution_of(matrix, vector, free)
            slopes = [sum(matrix[i][j] * found[j] for j in range(3)) - vector[i] for i in range(3)]
            if all(found[i] >= MIN_COST_S if i in free else slopes[i] >= 0.0 for i in range(3)):
                return found[0], found[1], found[2]
    return tuple(max(MIN_COST_S, part) for part in found)  # type: ignore[return-value]  # rounding alone leads here


def _solution_of(matrix: list[list[float]], vector: list[float], free: Sequence[int]) -> list[float]:
    """The minimum where only `free` parts are not at the bound: Gaussian elimination, which needs no pivots here."""
    rows = [
        [matrix[i][j] for j in free] + [vector[i] - sum(matrix[i][j] * MIN_COST_S for j in range(3) if j not in free)]
        for i in free
    ]
    for k, pivot in enumerate(rows):
        for row in rows[k + 1 :]:
            factor = row[k] / pivot[k]
            for j in range(k, len(row)):
                row[j] -= factor * pivot[j]
    found = [MIN_COST_S] * 3
    for k in reversed(range(len(rows))):
        known = sum(rows[k][j] * found[free[j]] for j in range(k + 1, len(rows)))
        found[free[k]] = (rows[k][-1] - known) / rows[k][k]
    return found


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """What a worker has to do when a request comes."""

    cost: StepCost
    token_budget: int  # tokens of a step at most
    max_num_seqs: int  # sequences of a step at most
    num_running: int
    num_waiting: int
    prompt_tokens_ahead: int  # of sequences that are there already, not computed yet
    pages_total: int
    pages_free: int
    page_size: int  # positions
    mean_output_tokens: float  # of a sequence, as seen lately

    def idle(self) -> WorkerSnapshot:
        """The same worker with nothing to do."""
        return replace(self, num_running=0, num_waiting=0, prompt_tokens_ahead=0, pages_free=self.pages_total)


@dataclass(frozen=True, slots=True)
class RequestSize:
    """What a request brings to one worker: the first token of its last sample is what counts."""

    prompt_tokens: int  # of all its prompts
    cached_tokens: int = 0  # of these, likely to be found in the prefix cache
    num_prompts: int = 1
    num_samples: int = 1  # of all prompts together


def predict_ttft(snapshot: WorkerSnapshot, request: RequestSize) -> float:
    """Seconds from the worker's taking the request to its first token. Never negative, always finite."""
    prompt_s = _prompt_s(snapshot, snapshot.prompt_tokens_ahead + _to_compute(request))
    return _running_step_s(snapshot) + _place_s(snapshot, request) + prompt_s


def _running_step_s(snapshot: WorkerSnapshot) -> float:
    """The step that runs when it comes is half done, on average."""
    running = min(snapshot.num_running, snapshot.max_num_seqs)
    return snapshot.cost.step_s(prompt_tokens=0, sequences=running) / 2 if running else 0.0


def _to_compute(request: RequestSize) -> int:
    """At least the last token of a prompt is computed, whatever is cached, and once more for each further sample."""
    fresh = max(request.num_prompts, request.prompt_tokens - request.cached_tokens)
    return fresh + max(0, request.num_samples - request.num_prompts)


def _prompt_s(snapshot: WorkerSnapshot, num_tokens: int) -> float:
    decoding = min(snapshot.num_running, snapshot.max_num_seqs)
    chunk = max(1, snapshot.token_budget - decoding)
    steps = math.ceil(num_tokens / chunk)
    cost = snapshot.cost
    return steps * cost.step_s(prompt_tokens=0, sequences=decoding) + cost.prompt_token_s * num_tokens


def _place_s(snapshot: WorkerSnapshot, request: RequestSize) -> float:
    """Until a place in the batch and the pages are free."""
    num_present = snapshot.num_running + snapshot.num_waiting
    for_places = max(0, num_present + request.num_samples - snapshot.max_num_seqs)
    places_s = _endings_s(snapshot, for_places, snapshot.max_num_seqs)  # who waits for a place sees a full batch
    running = min(snapshot.num_running, snapshot.max_num_seqs)
    if running == 0:
        return places_s
    held = (snapshot.pages_total - snapshot.pages_free) / running  # pages that an ending gives back
    wanted = (snapshot.prompt_tokens_ahead + request.prompt_tokens) / max(1, snapshot.page_size) + request.num_samples
    lacking = max(0.0, wanted - snapshot.pages_free)
    return max(places_s, _endings_s(snapshot, lacking / held if held > 0 else 0.0, running))


def _endings_s(snapshot: WorkerSnapshot, num_endings: float, running: int) -> float:
    """Until so many of the sequences that run have ended, while as many others begin.

    They end independently, after `mean_output_tokens` on average: of n that run, one ends every mean / n steps.
    """
    step_s = snapshot.cost.step_s(prompt_tokens=0, sequences=running)
    return num_endings * snapshot.mean_output_tokens / running * step_s
