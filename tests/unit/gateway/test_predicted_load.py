"""Predictions under load, against a simulated worker that schedules as the engine does and whose steps have a cost."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from dataclasses import dataclass, field

import pytest

from cluster.gateway.backlog import Backlog, OwnLoad, Prediction
from cluster.gateway.ttft import RequestSize, StepCost
from cluster.protocol import EngineState
from tests.support.scripted_worker import hello

NOISE = 0.1  # of a step's time, either way
STATE_S = 0.1  # between two states that are told
CPU = StepCost(base_s=0.003, prompt_token_s=0.0001, sequence_s=0.0005)
GPU = StepCost(base_s=0.008, prompt_token_s=0.00002, sequence_s=0.00002)


@dataclass(eq=False)
class Sequence:
    came_s: float
    num_prompt: int
    num_output: int
    prediction: Prediction
    left: int = 0  # of the prompt
    made: int = 0


@dataclass
class Simulation:
    """So many users, each of whom asks again soon after a reply; time is the simulation's own."""

    cost: StepCost
    num_users: int
    max_num_seqs: int
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    now: float = 0.0
    told_s: float = -math.inf
    state: EngineState = field(default_factory=EngineState)
    ratios: list[float] = field(default_factory=list)  # predicted / real

    def __post_init__(self) -> None:
        self.state = EngineState(worker_id="worker-1", pages_total=4096, pages_free=4096)
        self.backlog = Backlog()
        self.backlog.connected(hello(num_pages=4096, max_num_seqs=self.max_num_seqs, prefix_cache=False))
        self.asks = [self.draw.uniform(0, 0.01) for _ in range(self.num_users)]
        heapq.heapify(self.asks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def own(self) -> OwnLoad:
        before = [sequence for sequence in [*self.waiting, *self.running] if not sequence.made]
        return OwnLoad(
            num_decoding=sum(1 for sequence in self.running if sequence.made),
            num_without_token=len(before),
            prompt_tokens=sum(sequence.num_prompt for sequence in before),
        )

    def take(self, until: float) -> None:
        while self.asks and self.asks[0] <= until:
            num_prompt = self.draw.choice([20, 60, 120, 400, 1000])
            prediction = self.backlog.predict_size(RequestSize(num_prompt), self.own())
            assert prediction is not None
            num_output = self.draw.choice([8, 32, 64])
            self.waiting.append(Sequence(heapq.heappop(self.asks), num_prompt, num_output, prediction, left=num_prompt))

    def step(self) -> None:
        if not self.waiting and not self.running:
            self.now = max(self.now, self.asks[0])
        self.take(self.now)
        while self.waiting and len(self.running) < self.max_num_seqs:
            self.running.append(self.waiting.pop(0))
        budget, part = 2048, {}
        for sequence in sorted(self.running, key=lambda sequence: sequence.left > 0):
            part[sequence] = min(budget, sequence.left or 1)
            budget -= part[sequence]
        prompt = sum(num for sequence, num in part.items() if sequence.left)
        decoding = sum(1 for sequence in part if not sequence.left)
        seconds = self.cost.step_s(prompt_tokens=prompt, sequences=decoding) * self.draw.uniform(1 - NOISE, 1 + NOISE)
        self.take(self.now + seconds)  # they know nothing of this step's end
        self.now += seconds
        for sequence, num in part.items():
            self.advance(sequence, num)
        self.tell(prompt, decoding, seconds)

    def advance(self, sequence: Sequence, num: int) -> None:
        if sequence.left:
            sequence.left -= num
            if sequence.left:
                return
            real_s = self.now - sequence.came_s
            self.ratios.append(sequence.prediction.ttft_s / real_s)
            self.backlog.came(sequence.prediction, real_s)
        sequence.made += 1
        if sequence.made == sequence.num_output:
            self.running.remove(sequence)
            self.backlog.ended(sequence.made)
            heapq.heappush(self.asks, self.now + self.draw.uniform(0.001, 0.006))

    def tell(self, prompt: int, decoding: int, seconds: float) -> None:
        last = self.state
        self.state = EngineState(
            worker_id="worker-1",
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            prompt_tokens_ahead=sum(sequence.left for sequence in [*self.waiting, *self.running]),
            pages_total=4096,
            pages_free=4096,
            steps=last.steps + 1,
            prompt_tokens=last.prompt_tokens + prompt,
            step_tokens=last.step_tokens + prompt + decoding,
            step_s=last.step_s + seconds,
        )
        if self.now - self.told_s >= STATE_S:
            self.told_s = self.now
            self.backlog.told(self.state, self.own())


@pytest.mark.parametrize("cost", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("num_users", "max_num_seqs"), [(1, 64), (8, 64), (32, 64), (32, 8)])
def test_the_median_error_is_small_whatever_the_load(cost: StepCost, num_users: int, max_num_seqs: int) -> None:
    simulation = Simulation(cost, num_users, max_num_seqs)
    while len(simulation.ratios) < 60 + 10 * num_users:
        simulation.step()
    learned = simulation.ratios[len(simulation.ratios) // 4 :]
    assert statistics.median(abs(ratio - 1) for ratio in learned) < 0.25
    assert 0.8 < statistics.median(learned) < 1.25
