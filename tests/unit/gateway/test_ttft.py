"""The predicted time to first token: a pure function, and the fit of what a step costs."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.ttft import (
    PRIOR,
    RequestSize,
    StepCost,
    StepCostFit,
    WorkerSnapshot,
    non_negative_solution,
    predict_ttft,
)
from cluster.protocol import EngineState

COST = StepCost(base_s=0.010, prompt_token_s=0.001, sequence_s=0.002)
IDLE = WorkerSnapshot(
    cost=COST,
    token_budget=256,
    max_num_seqs=8,
    num_running=0,
    num_waiting=0,
    prompt_tokens_ahead=0,
    pages_total=100,
    pages_free=100,
    page_size=16,
    mean_output_tokens=50.0,
)


def snapshot(**changes: Any) -> WorkerSnapshot:
    return replace(IDLE, **changes)


def test_an_idle_worker_computes_the_prompt_and_nothing_else() -> None:
    assert predict_ttft(IDLE, RequestSize(100)) == pytest.approx(0.010 + 100 * 0.001)
    assert predict_ttft(IDLE, RequestSize(600)) == pytest.approx(3 * 0.010 + 600 * 0.001)  # three steps of 256


def test_a_cached_prefix_is_not_computed_but_its_last_token_is() -> None:
    assert predict_ttft(IDLE, RequestSize(100, cached_tokens=64)) == pytest.approx(0.010 + 36 * 0.001)
    assert predict_ttft(IDLE, RequestSize(100, cached_tokens=100)) == pytest.approx(0.010 + 0.001)


def test_running_sequences_slow_each_step_and_take_of_its_budget() -> None:
    busy, step_s = snapshot(num_running=4), 0.010 + 4 * 0.002  # half of one is still to be done
    assert predict_ttft(busy, RequestSize(252)) == pytest.approx(1.5 * step_s + 252 * 0.001)
    assert predict_ttft(busy, RequestSize(253)) == pytest.approx(2.5 * step_s + 253 * 0.001)


def test_what_waits_goes_first() -> None:
    waits = predict_ttft(snapshot(prompt_tokens_ahead=150), RequestSize(50))
    assert waits == pytest.approx(predict_ttft(IDLE, RequestSize(200)))


def test_a_full_batch_waits_for_a_sequence_to_end() -> None:
    full = snapshot(num_running=8, pages_free=50)
    one_step = 0.010 + 8 * 0.002
    prompt = one_step / 2 + one_step + 10 * 0.001
    assert predict_ttft(full, RequestSize(10)) == pytest.approx(50 / 8 * one_step + prompt)
    behind_two = snapshot(num_running=8, num_waiting=2, pages_free=50)
    assert predict_ttft(behind_two, RequestSize(10)) == pytest.approx(3 * 50 / 8 * one_step + prompt)


def test_the_last_of_many_samples_is_what_counts() -> None:
    within = predict_ttft(IDLE, RequestSize(100, num_samples=8))
    assert within == pytest.approx(0.010 + (100 + 7) * 0.001)  # each takes the prompt's pages, and computes its end
    full_step = 0.010 + 8 * 0.002  # ten in a batch of eight: two wait for an end
    beyond = predict_ttft(IDLE, RequestSize(100, num_samples=10))
    assert beyond == pytest.approx(2 * 50 / 8 * full_step + 0.010 + (100 + 9) * 0.001)
    prompts = predict_ttft(IDLE, RequestSize(200, cached_tokens=198, num_prompts=2, num_samples=6))
    assert prompts == pytest.approx(0.010 + (2 + 4) * 0.001)


def test_missing_pages_are_waited_for() -> None:
    tight = snapshot(num_running=2, pages_free=0)
    roomy = snapshot(num_running=2, pages_free=50)
    assert predict_ttft(tight, RequestSize(160)) > predict_ttft(roomy, RequestSize(160)) + 0.05


@given(
    st.integers(0, 64), st.integers(0, 1000), st.integers(0, 10**6), st.integers(0, 100), st.integers(1, 10**6),
    st.integers(0, 10**6), st.integers(1, 128),
)  # fmt: skip
def test_it_is_finite_and_grows_with_what_is_before_it(
    running: int, waiting: int, ahead: int, free: int, prompt: int, cached: int, samples: int
) -> None:
    here = snapshot(num_running=running, num_waiting=waiting, prompt_tokens_ahead=ahead, pages_free=free)
    size = RequestSize(prompt, cached_tokens=cached, num_samples=samples)
    found = predict_ttft(here, size)
    assert math.isfinite(found)
    assert found > 0
    more = snapshot(num_running=running, num_waiting=waiting + 1, prompt_tokens_ahead=ahead + 512, pages_free=free)
    assert predict_ttft(more, size) >= found


def states(cost: StepCost, count: int, seed: int, *, noise: float = 0.0) -> list[EngineState]:
    """A worker's counters, one state after each of `count` intervals of steps that cost `cost`."""
    draw = random.Random(seed)
    found = [EngineState(worker_id="w")]
    for _ in range(count):
        steps, prompt, decoded = draw.randint(1, 50), draw.choice([0, 0, 30, 200]), draw.randint(0, 8)
        seconds = steps * cost.step_s(prompt_tokens=prompt, sequences=decoded) * (1 + noise * draw.uniform(-1, 1))
        last = found[-1]
        found.append(
            EngineState(
                worker_id="w",
                steps=last.steps + steps,
                prompt_tokens=last.prompt_tokens + steps * prompt,
                step_tokens=last.step_tokens + steps * (prompt + decoded),
                step_s=last.step_s + seconds,
            )
        )
    return found


def fitted(seen: list[EngineState]) -> StepCost:
    fit = StepCostFit()
    for before, after in itertools.pairwise(seen):
        fit.observe(before, after)
    return fit.cost


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_finds_what_steps_cost(seed: int) -> None:
    true = StepCost(base_s=0.0012, prompt_token_s=0.00004, sequence_s=0.0002)
    found = fitted(states(true, 100, seed, noise=0.2))
    for prompt, sequences in ((0, 1), (0, 8), (200, 4)):
        predicted = found.step_s(prompt_tokens=prompt, sequences=sequences)
        assert predicted == pytest.approx(true.step_s(prompt_tokens=prompt, sequences=sequences), rel=0.25)


def test_the_fit_follows_a_worker_that_became_slower() -> None:
    fast = StepCost(base_s=0.001, prompt_token_s=0.00004, sequence_s=0.0002)
    slow = StepCost(base_s=0.004, prompt_token_s=0.00016, sequence_s=0.0008)
    fit = StepCostFit()
    for cost, seed in ((fast, 1), (slow, 2)):
        seen = states(cost, 300, seed)
        for before, after in itertools.pairwise(seen):
            fit.observe(before, after)
    predicted = fit.cost.step_s(prompt_tokens=0, sequences=4)
    assert predicted == pytest.approx(slow.step_s(prompt_tokens=0, sequences=4), rel=0.2)


def test_what_was_never_seen_stays_as_assumed() -> None:
    fit = StepCostFit()
    state = EngineState(worker_id="w")
    for _ in range(2000):  # decodes alone, until nothing else is remembered
        after = msgspec.structs.replace(
            state, steps=state.steps + 1, step_tokens=state.step_tokens + 1, step_s=state.step_s + 0.002
        )
        fit.observe(state, after)
        state = after
    assert fit.cost.prompt_token_s == pytest.approx(PRIOR.prompt_token_s, rel=0.2)
    assert fit.cost.step_s(prompt_tokens=0, sequences=1) == pytest.approx(0.002, rel=0.1)


def test_two_processes_states_are_not_compared() -> None:
    fit = StepCostFit()
    fit.observe(EngineState(worker_id="a", steps=10, step_s=1.0), EngineState(worker_id="b", steps=20, step_s=9.0))
    fit.observe(EngineState(worker_id="a", steps=10, step_s=1.0), EngineState(worker_id="a", steps=10, step_s=1.0))
    assert fit.cost == PRIOR


@pytest.mark.needs("scipy")
def test_the_least_squares_are_scipys() -> None:
    import numpy
    from scipy.optimize import nnls

    draw = numpy.random.default_rng(1)
    for _ in range(200):
        rows = numpy.abs(draw.normal(size=(20, 3))) * (1.0, 32.0, 4.0)
        parts = numpy.abs(draw.normal(size=3)) * draw.integers(0, 2, 3)
        seconds = rows @ parts + 0.5 * draw.normal(size=20)
        matrix, vector = rows.T @ rows + 0.1 * numpy.eye(3), rows.T @ seconds
        factor = numpy.linalg.cholesky(matrix)
        expected, _ = nnls(factor.T, numpy.linalg.solve(factor, vector))
        assert non_negative_solution(matrix.tolist(), vector.tolist()) == pytest.approx(expected, abs=1e-6)
