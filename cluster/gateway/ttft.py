"""How long until a request's first token: a pure function of what a worker has to do and of what its steps cost.

A step costs a fixed part, a part for each prompt token in it and a part for each sequence that decodes in it; the three
are fitted to what the worker counts. A new request waits until a place in the batch and pages are free, then until the
prompt tokens before its own, and its own, were computed, as many a step as the budget leaves beside the decodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
            self._cost = StepCost(*_non_negative_solution(matrix, vector))
        return self._cost


def _non_negative_solution(matrix: list[list[float]], vector: list[float]) -> tuple[float, float, float]:
    """argmin |A x - b| over x >= MIN_COST_S, by coordinate descent on the normal equations (three unknowns)."""
    found = [MIN_COST_S] * 3
    for _ in range(200):
        before = (*found,)
        for i in range(3):
            rest = vector[i] - sum(matrix[i][j] * found[j] for j in range(3) if j != i)
            found[i] = max(MIN_COST_S, rest / matrix[i][i])
        if all(abs(now - then) <= 1e-4 * now for now, then in zip(found, before, strict=True)):
            break
    return found[0], found[1], found[2]


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
    prompt_tokens: int
    cached_tokens: int = 0  # of these, likely to be found in the prefix cache
    num_samples: int = 1  # the first token of the last of them is what counts


def predict_ttft(snapshot: WorkerSnapshot, request: RequestSize) -> float:
    """Seconds from the worker's taking the request to its first token. Never negative, always finite."""
    prompt_s = _prompt_s(snapshot, snapshot.prompt_tokens_ahead + _to_compute(request))
    return _running_step_s(snapshot) + _place_s(snapshot, request) + prompt_s


def _running_step_s(snapshot: WorkerSnapshot) -> float:
    """The step that runs when it comes is half done, on average."""
    running = min(snapshot.num_running, snapshot.max_num_seqs)
    return snapshot.cost.step_s(prompt_tokens=0, sequences=running) / 2 if running else 0.0


def _to_compute(request: RequestSize) -> int:
    """At least the last token of a prompt is computed, whatever is cached."""
    return max(1, request.prompt_tokens - request.cached_tokens) + request.num_samples - 1


def _prompt_s(snapshot: WorkerSnapshot, num_tokens: int) -> float:
    decoding = min(snapshot.num_running, snapshot.max_num_seqs)
    chunk = max(1, snapshot.token_budget - decoding)
    steps = math.ceil(num_tokens / chunk)
    cost = snapshot.cost
    return steps * cost.step_s(prompt_tokens=0, sequences=decoding) + cost.prompt_token_s * num_tokens


def _place_s(snapshot: WorkerSnapshot, request: RequestSize) -> float:
    """Until a place in the batch and the pages are free.

    Sequences end independently, after `mean_output_tokens` on average: of n that run, one ends every mean / n steps.
    """
    running = min(snapshot.num_running, snapshot.max_num_seqs)
    if running == 0:
        return 0.0
    num_before = snapshot.num_running + snapshot.num_waiting
    for_places = max(0, num_before + request.num_samples - snapshot.max_num_seqs)
    held = (snapshot.pages_total - snapshot.pages_free) / running  # pages that an ending gives back
    wanted = (snapshot.prompt_tokens_ahead + request.prompt_tokens) / max(1, snapshot.page_size) + request.num_samples
    lacking = max(0.0, wanted - snapshot.pages_free)
    for_pages = lacking / held if held > 0 else 0.0
    num_endings = max(for_places, for_pages)
    step_s = snapshot.cost.step_s(prompt_tokens=0, sequences=running)
    return num_endings * snapshot.mean_output_tokens / running * step_s
