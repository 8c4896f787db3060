"""Every family against transformers: logits in any schedule, and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import MOE_RECIPES, PLAIN, RECIPES, make_model, save
from tests.support.models import Driver, make_decoder
from tests.support.numerics import numerics
from workers.models.loader import load_model
from workers.models.spec import ModelSpec
from workers.models.weights import ExpertWeights, ModelWeights, MoEWeights
from workers.numerics import FAST, Numerics

pytestmark = pytest.mark.needs("transformers")

TOLERANCE = 1e-4
LENGTHS = (45, 23)
NUM_GREEDY = 16

Schedule = list[list[tuple[int, int]]]

SCHEDULES: dict[str, Schedule] = {  # steps of (sequence, tokens)
    "whole_prefill": [[(0, 45)], [(1, 23)]],
    "batched_prefill": [[(0, 45), (1, 23)]],
    "chunked_prefill": [[(0, 7)], [(0, 16), (1, 5)], [(1, 18), (0, 3)], [(0, 19)]],
    "decode": [[(0, 21)], [(1, 5)], *([(0, 1), (1, 1)] for _ in range(18)), *([(0, 1)] for _ in range(6))],
    "mixed": [[(0, 20)], *([(0, 1), (1, count)] for count in (5, 1, 8, 1, 7)), [(1, 1), (0, 19)], [(0, 1)]],
}


@dataclass(frozen=True)
class Case:
    model: Any  # of transformers
    spec: ModelSpec
    weights: ModelWeights
    sequences: list[list[int]]
    logits: list[torch.Tensor]  # [length, V] of each sequence, by transformers


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only lose by being shared out."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def case_of(name: str) -> Case:
        if name not in cases:
            cases[name] = make_case(tmp_path_factory.mktemp("checkpoint"), name)
        return cases[name]

    return case_of


def make_case(folder: Path, name: str) -> Case:
    model = make_model(RECIPES[name], seed=list(RECIPES).index(name))
    spec, weights = load_model(save(model, folder), device=torch.device("cpu"), laid_out=True)
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(spec.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    with torch.inference_mode():
        logits = [model(torch.tensor([tokens])).logits[0] for tokens in sequences]
    return Case(model, spec, weights, sequences, logits)


def greedy(spec: ModelSpec, weights: ModelWeights, prompt: list[int], num_tokens: int) -> list[int]:
    driver = Driver(make_decoder(spec, weights, FAST), [prompt + [0] * num_tokens])
    (logits,) = driver.step([(0, len(prompt))])
    tokens = driver.requests[0].tokens
    for at in range(len(prompt), len(tokens)):
        tokens[at] = int(logits[-1].argmax())
        (logits,) = driver.step([(0, 1)])
    return tokens[len(prompt) :]


def check(case: Case, numerics: Numerics, schedule: Schedule) -> None:
    driver = Driver(make_decoder(case.spec, case.weights, numerics), case.sequences)
    for ours, theirs in zip(driver.run(schedule), case.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_transformers(case_of: Callable[[str], Case], name: str, schedule: str) -> None:
    check(case_of(name), FAST, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_the_host_kernels_are_as_well(case_of: Callable[[str], Case], name: str, schedule: str) -> None:
    check(case_of(name), numerics("native"), SCHEDULES[schedule])


@pytest.mark.parametrize("name", PLAIN)
def test_logits_of_products_in_blocks_are_as_well(case_of: Callable[[str], Case], name: str) -> None:
    check(case_of(name), numerics("blocks"), SCHEDULES["mixed"])


@pytest.mark.parametrize("name", RECIPES)
def test_greedy_tokens_are_those_of_transformers(case_of: Callable[[str], Case], name: str) -> None:
    case = case_of(name)
    prompt = case.sequences[1]
    theirs = case.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NUM_GREEDY,
        pad_token_id=0,
    )
    assert greedy(case.spec, case.weights, prompt, NUM_GREEDY) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MOE_RECIPES)
def test_experts_decide_the_greedy_tokens(case_of: Callable[[str], Case], name: str) -> None:
    """What the parity above is worth: a checkpoint whose experts did not matter would prove nothing of them."""
    case = case_of(name)
    prompt = case.sequences[1]
    right = greedy(case.spec, case.weights, prompt, NUM_GREEDY)
    assert case.spec.moe is not None
    top_1 = replace(case.spec, moe=replace(case.spec.moe, top_k=1))
    assert greedy(top_1, case.weights, prompt, NUM_GREEDY) != right
    assert greedy(case.spec, without_experts(case.weights), prompt, NUM_GREEDY) != right


def without_experts(weights: ModelWeights) -> ModelWeights:
    layers = [
        replace(layer, mlp=replace(layer.mlp, experts=zeros_like(layer.mlp.experts)))
        if isinstance(layer.mlp, MoEWeights)
        else layer
        for layer in weights.layers
    ]
    return replace(weights, layers=tuple(layers))


def zeros_like(experts: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(torch.zeros_like(experts.gate_up), torch.zeros_like(experts.down))
