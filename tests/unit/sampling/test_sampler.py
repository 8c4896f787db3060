from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from cluster.protocol import Sampling
from tests.support.sampling import chi_square_p, make_request
from workers.request import Request
from workers.sampling.logprobs import NO_TOKEN, NOT_FINITE
from workers.sampling.sampler import Sampler, failure

CPU = torch.device("cpu")
EOS = (0,)


def logits_of(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def ids_of(logits: torch.Tensor, requests: list[Request]) -> list[int]:
    return [row.token_id for row in Sampler(logits.shape[-1], CPU, EOS).sample(logits, requests)]


class FakeMatcher:
    """A grammar that allows fixed tokens."""

    error = ""
    is_active = True

    def __init__(self, *allowed: int) -> None:
        self._allowed = allowed

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        bits[list(self._allowed)] = 1
        row[:] = np.packbits(bits, bitorder="little").view(np.int32)


# ------------------------------------------------------------------------------------------------ the distribution

PROBABILITIES = torch.tensor([0.26, 0.2, 0.16, 0.12, 0.09, 0.07, 0.05, 0.03, 0.02], dtype=torch.float64)
NUM_DRAWS = 20_000


def only(ids: set[int], probabilities: torch.Tensor = PROBABILITIES) -> torch.Tensor:
    """The exact distribution over some tokens."""
    kept = torch.tensor([p if i in ids else 0.0 for i, p in enumerate(probabilities.tolist())], dtype=torch.float64)
    return kept / kept.sum()


def tempered(temperature: float) -> torch.Tensor:
    powers = PROBABILITIES ** (1 / temperature)
    return powers / powers.sum()


# the entropy is 1.95 nats: the surprises are 1.35 1.61 1.83 2.12 2.41 2.66 3.0 3.51 3.91, the nearest those of 2, 3, 1
CASES: dict[str, tuple[dict[str, float], torch.Tensor, torch.Tensor]] = {
    # parameters, the exact distribution, that of a filter with one fault
    "temperature": ({"temperature": 0.7}, tempered(0.7), tempered(0.8)),
    "hot": ({"temperature": 1.8}, tempered(1.8), tempered(1.4)),
    "top_k": ({"top_k": 4}, only({0, 1, 2, 3}), only({0, 1, 2, 3, 4})),
    "top_p": ({"top_p": 0.7}, only({0, 1, 2, 3}), only({0, 1, 2})),  # 0.62 before token 3, 0.74 with it
    "min_p": ({"min_p": 0.25}, only({0, 1, 2, 3, 4, 5}), only({0, 1, 2, 3, 4})),  # 0.065
    "typical_p": ({"typical_p": 0.4}, only({1, 2, 3}), only({0, 1, 2})),
    "top_k_top_p": ({"top_k": 5, "top_p": 0.6}, only({0, 1, 2}), only({0, 1, 2, 3})),  # 0.6 of 0.83 = 0.498
    "logit_bias": ({}, only(set(range(9)), PROBABILITIES * torch.tensor([1.0] + [2.0] * 8)), PROBABILITIES),
}


def draw(parameters: dict[str, float], seeds: bool = True) -> torch.Tensor:
    """Counts of draws with different seeds, or of one seed at different positions."""
    fields: dict[str, object] = dict(parameters)
    if not parameters:
        fields["logit_bias"] = {token: math.log(2.0) for token in range(1, 9)}
    requests = [
        make_request(
            str(i), seed=i if seeds else 0, prompt=[1] * (3 if seeds else i % 200 + 1), choice=i // 200, **fields
        )
        for i in range(NUM_DRAWS)
    ]
    logits = (PROBABILITIES.log().float() + 1.5).expand(NUM_DRAWS, -1)
    return torch.bincount(torch.tensor(ids_of(logits, requests)), minlength=len(PROBABILITIES))


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_exact_distribution_and_a_wrong_filters_would_be_seen(case: str) -> None:
    parameters, exact, wrong = CASES[case]
    counts = draw(parameters)
    assert chi_square_p(counts, exact) > 1e-4
    assert chi_square_p(counts, wrong) < 1e-6


def test_positions_and_choices_of_one_seed_draw_independently() -> None:
    assert chi_square_p(draw({"temperature": 1.0}, seeds=False), PROBABILITIES) > 1e-4


# ------------------------------------------------------------------------------------------------- no dependence


def mixed_requests(num: int, vocab_size: int) -> list[Request]:
    """Every feature, alone and together, at different places of a batch."""
    random.seed(1)
    variants: list[dict[str, object]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7},
        {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
        {"top_p": 0.9},
        {"min_p": 0.05, "temperature": 1.5},
        {"typical_p": 0.9, "top_k": 50},
        {"typical_p": 0.5},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5, "frequency_penalty": 0.7, "temperature": 0.0},
        {"logit_bias": {3: 5.0, 7: -100.0}},
        {"bad_words": ((4,), (5, 6), (1, 2, 3))},
        {"min_tokens": 30, "stop_token_ids": (9,)},
        {"logprobs": 3, "temperature": 0.0},
        {"logprobs": 0},
        {"logprobs": 20, "top_k": 3},
    ]
    requests = []
    for i in range(num):
        fields = dict(variants[i % len(variants)])
        if i >= len(variants):
            fields |= random.choice(variants)
        prompt = [random.randrange(vocab_size) for _ in range(random.randrange(1, 30))]
        output = [random.randrange(vocab_size) for _ in range(random.randrange(0, 30))]
        requests.append(make_request(str(i), prompt=prompt, output=output, seed=random.getrandbits(64), **fields))
        if i % 9 == 5:
            requests[-1].matcher = FakeMatcher(*random.sample(range(vocab_size), 40))  # type: ignore[assignment]
    return requests


@pytest.mark.parametrize("vocab_size", [1000, 4099])
def test_a_row_is_bitwise_the_same_in_any_batch(vocab_size: int) -> None:
    requests = mixed_requests(64, vocab_size)
    logits = logits_of(64, vocab_size)
    whole = Sampler(vocab_size, CPU, EOS).sample(logits, requests)
    alone = [Sampler(vocab_size, CPU, EOS).sample(logits[i : i + 1], [requests[i]])[0] for i in range(64)]
    assert alone == whole
    sampler = Sampler(vocab_size, CPU, EOS)
    generator = random.Random(2)
    for num in (2, 3, 7, 16, 33, 63):
        order = generator.sample(range(64), num)
        rows = sampler.sample(logits[order], [requests[i] for i in order])
        assert rows == [whole[i] for i in order]


def test_a_prepared_batch_gives_what_a_fresh_one_gives() -> None:
    requests = mixed_requests(20, 500)
    sampler = Sampler(500, CPU, EOS)
    for step in range(14):  # min_tokens end on the way
        logits = logits_of(20, 500, seed=step)
        found = sampler.sample(logits, requests)
        assert found == Sampler(500, CPU, EOS).sample(logits, requests)
        for request, row in zip(requests, found, strict=True):
            request.tokens.append(row.token_id)


def test_the_given_logits_are_left_alone() -> None:
    logits = logits_of(64, 1000)
    before = logits.clone()
    Sampler(1000, CPU, EOS).sample(logits, mixed_requests(64, 1000))
    assert torch.equal(logits, before)


def test_seed_choice_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1, 50_000)
    base: dict[str, object] = {"seed": 1, "choice": 0, "prompt": [1, 2]}
    variants: list[dict[str, object]] = [{}, {"seed": 2}, {"choice": 1}, {"prompt": [1, 2, 3]}, {"prompt": [5, 6]}]
    drawn = [ids_of(logits, [make_request(**(base | change))])[0] for change in variants]  # type: ignore[arg-type]
    assert len(set(drawn[:4])) == 4
    assert drawn[4] == drawn[0]  # the same seed at the same position: only the logits could tell them apart


# ------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_temperature_zero_is_argmax(num_rows: int) -> None:
    logits = logits_of(num_rows, 4096)
    requests = [make_request(str(i), seed=i, temperature=0.0, top_k=3, top_p=0.1) for i in range(num_rows)]
    assert ids_of(logits, requests) == logits.argmax(-1).tolist()


def test_among_equals_greedy_takes_the_lowest_id() -> None:
    logits = torch.zeros(2, 3000)
    logits[1, [700, 2900]] = 1.0
    requests = [make_request(str(i), temperature=0.0) for i in range(2)]
    assert ids_of(logits, requests) == [0, 700]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = logits_of(3, 4096)
    requests = [
        make_request("a", temperature=temperature),
        make_request("b", temperature=temperature, top_k=5),
        make_request("c", temperature=temperature, top_p=0.5),
    ]
    assert ids_of(logits, requests) == logits.argmax(-1).tolist()


def test_no_requests_no_rows() -> None:
    assert Sampler(10, CPU).sample(torch.empty(0, 10), []) == []


# ---------------------------------------------------------------------------------------------------- constraints


def greedy_after(
    logits: torch.Tensor, oracle: Callable[[torch.LongTensor, torch.Tensor], torch.Tensor], ids: list[int]
) -> int:
    return int(oracle(torch.tensor([ids]), logits[None].clone()).argmax())  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [0.1, 0.8, 1.3, 5.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    oracle = RepetitionPenaltyLogitsProcessor(penalty)
    logits = logits_of(30, 60, scale=1.0)
    generator = random.Random(3)
    for row in logits:
        prompt, output = generator.choices(range(60), k=20), generator.choices(range(60), k=20)
        request = make_request(prompt=prompt, output=output, temperature=0.0, repetition_penalty=penalty)
        assert ids_of(row[None], [request]) == [greedy_after(row, oracle, prompt + output)]


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([[2.0, 1.9, 1.5, 1.0, 0.0, -9.0]])

    def drawn(**fields: object) -> int:
        return ids_of(logits, [make_request(prompt=[0, 0, 0], temperature=0.0, **fields)])[0]  # type: ignore[arg-type]

    assert drawn(presence_penalty=1.0) == 0  # the prompt does not count
    assert drawn(presence_penalty=1.0, output=[0]) == 1
    assert drawn(presence_penalty=1.0, output=[0, 0, 1]) == 2
    assert drawn(frequency_penalty=0.3, output=[0, 1]) == 0  # 1.7, 1.6, 1.5
    assert drawn(frequency_penalty=0.3, output=[0, 0, 1]) == 1  # 1.4, 1.6, 1.5
    assert drawn(frequency_penalty=0.3, output=[0, 0, 1, 1]) == 2  # 1.4, 1.3, 1.5
    assert drawn(frequency_penalty=0.3, presence_penalty=0.25, output=[0, 0, 1, 1, 2, 2]) == 0
    assert drawn(presence_penalty=-2.0, output=[4]) == 0
    assert drawn(frequency_penalty=-0.6, output=[3, 3]) == 3  # 2.2


def test_counts_follow_a_request_that_grows_and_is_rewound() -> None:
    logits = logits_of(1, 40, scale=1.0)
    fields = {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.2}
    request = make_request("grows", prompt=[1, 2], **fields)
    sampler = Sampler(40, CPU, EOS)
    generator = random.Random(0)
    for _ in range(60):
        if len(request.tokens) > 8 and generator.random() < 0.3:
            keep = generator.randrange(2, len(request.tokens))
            request.tokens = request.tokens[:keep] + generator.choices(range(40), k=generator.randrange(4))
        fresh = make_request("fresh", prompt=[1, 2], output=request.tokens[2:], **fields)
        assert sampler.sample(logits, [request])[0].token_id == ids_of(logits, [fresh])[0]
        request.tokens.append(generator.randrange(40))


def test_an_id_used_again_starts_with_new_counts() -> None:
    logits = torch.tensor([[1.0, 0.9]])
    sampler = Sampler(2, CPU)
    first = make_request("same", prompt=[1], output=[0, 0], temperature=0.0, presence_penalty=0.5)
    assert sampler.sample(logits, [first])[0].token_id == 1
    second = make_request("same", prompt=[1], output=[1, 1], temperature=0.0, presence_penalty=0.5)
    assert sampler.sample(logits, [second])[0].token_id == 0
    sampler.forget("same")
    sampler.forget("never seen")
    assert sampler.sample(logits, [first])[0].token_id == 1


def test_many_penalised_requests_come_and_go() -> None:
    sampler = Sampler(30, CPU)
    for wave in range(6):
        requests = [
            make_request(f"{wave}-{i}", prompt=[1], output=[i], temperature=0.0, presence_penalty=2.0) for i in range(9)
        ]
        logits = torch.zeros(9, 30)
        logits[:, 29] = 0.5
        for i in range(9):
            logits[i, i] = 1.0
        assert [row.token_id for row in sampler.sample(logits, requests)] == [29] * 9
        for request in requests[wave % 2 :]:
            sampler.forget(request.request_id)


def test_bad_words_are_transformers() -> None:
    generator = random.Random(5)
    words = [[3], [4, 5], [4, 5, 6], [7, 7], [1, 2, 3, 4]]
    oracle = NoBadWordsLogitsProcessor(words)
    for seed in range(40):
        logits = logits_of(1, 9, seed=seed)[0]
        ids = generator.choices(range(1, 8), k=6)
        request = make_request(prompt=ids[:3], output=ids[3:], temperature=0.0, bad_words=tuple(map(tuple, words)))
        assert ids_of(logits[None], [request]) == [greedy_after(logits, oracle, ids)]


def test_logit_bias_forces_and_forbids() -> None:
    logits = logits_of(2, 50)
    best = int(logits[1].argmax())
    requests = [
        make_request("a", logit_bias={17: 100.0}),
        make_request("b", temperature=0.0, logit_bias={best: -100.0}),
    ]
    found = ids_of(logits, requests)
    assert found[0] == 17
    assert found[1] == int(logits[1].topk(2).indices[1])


def test_min_tokens_keep_eos_and_stop_ids_out_until_they_are_reached() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0]])
    fields = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (1,)}
    request = make_request(prompt=[2], **fields)
    sampler = Sampler(3, CPU, EOS)
    found = []
    for _ in range(3):
        found.append(sampler.sample(logits, [request])[0].token_id)
        request.tokens.append(found[-1])
    assert found == [2, 2, 0]
    # an EOS that ends nothing is an ordinary token
    assert ids_of(logits, [make_request(prompt=[2], ignore_eos=True, **fields)]) == [0]


def test_only_the_guided_row_follows_its_grammar() -> None:
    logits = logits_of(4, 100)
    requests = [make_request(str(i), temperature=float(i % 2), seed=i) for i in range(4)]
    free = ids_of(logits, requests)
    requests[1].matcher = FakeMatcher(5, 99)  # type: ignore[assignment]
    requests[2].matcher = FakeMatcher(64)  # type: ignore[assignment]
    found = ids_of(logits, requests)
    assert found[1] in (5, 99)
    assert found[2] == 64
    assert [found[0], found[3]] == [free[0], free[3]]


# -------------------------------------------------------------------------------------------------------- failures


def test_a_row_without_any_allowed_token_fails_alone() -> None:
    logits = logits_of(5, 20)
    requests = [make_request(str(i), seed=i, temperature=0.5 * (i % 3), top_p=0.9 if i == 2 else 1.0) for i in range(5)]
    free = ids_of(logits, requests)
    for i in (0, 1, 2):  # greedy, plain, filtered
        requests[i].matcher = FakeMatcher()  # type: ignore[assignment]
    rows = Sampler(20, CPU, EOS).sample(logits, requests)
    assert [row.token_id for row in rows] == [NO_TOKEN] * 3 + free[3:]
    for request, row in zip(requests, rows, strict=True):
        error = failure(request, row)
        assert (error is None) == (row.token_id >= 0)
    forbidden = make_request("f", bad_words=tuple((token,) for token in range(20)))
    assert ids_of(logits[:1], [forbidden]) == [NO_TOKEN]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_row_alone(bad: float) -> None:
    requests = [
        make_request("greedy", temperature=0.0, logprobs=2),
        make_request("plain", logprobs=2),
        make_request("filtered", top_k=3),
        make_request("typical", typical_p=0.4),
        make_request("penalised", repetition_penalty=1.2),
        make_request("fine", seed=4),
    ]
    logits = logits_of(6, 2000)
    wanted = ids_of(logits[5:], requests[5:])
    logits[:5, 123] = bad
    rows = Sampler(2000, CPU, EOS).sample(logits, requests)
    assert [row.token_id for row in rows] == [NOT_FINITE] * 5 + wanted
    error = failure(requests[0], rows[0])
    assert error is not None
    assert "not finite" in error.message


# ----------------------------------------------------------------------------------------------- log probabilities


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(4, 300)
    requests = [
        make_request("a", seed=1, logprobs=4, temperature=2.0, top_k=50, logit_bias={7: 30.0}),
        make_request("b", seed=2),
        make_request("c", seed=3, logprobs=0),
        make_request("d", seed=4, logprobs=20, temperature=0.0, repetition_penalty=1.5),
    ]
    rows = Sampler(300, CPU, EOS).sample(logits, requests)
    assert rows[0].token_id == 7
    assert (rows[1].logprob, rows[1].top_ids) == (0.0, ())
    for i, num_top in ((0, 4), (2, 0), (3, 20)):
        exact = logits[i].double().log_softmax(-1)
        order = exact.sort(descending=True)
        row = rows[i]
        assert row.logprob == pytest.approx(float(exact[row.token_id]), abs=1e-5)
        assert row.rank == order.indices.tolist().index(row.token_id) + 1
        assert list(row.top_ids) == order.indices[:num_top].tolist()
        assert list(row.top_logprobs) == pytest.approx(order.values[:num_top].tolist(), abs=1e-5)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    row = Sampler(5, CPU).sample(logits_of(1, 5), [make_request(prompt=[1], logprobs=20)])[0]
    assert sorted(row.top_ids) == [0, 1, 2, 3, 4]


def test_score_gives_what_sampling_would_have_told() -> None:
    logits = logits_of(7, 300)
    sampler = Sampler(300, CPU, EOS)
    requests = [make_request(str(i), seed=i, logprobs=5) for i in range(7)]
    sampled = sampler.sample(logits, requests)
    targets = torch.tensor([row.token_id for row in sampled])
    assert sampler.score(logits, targets, 5) == sampled
    bare = sampler.score(logits, targets, 0)
    assert [(row.logprob, row.rank, row.top_ids) for row in bare] == [(row.logprob, row.rank, ()) for row in sampled]


def test_score_flags_rows_that_are_not_finite() -> None:
    logits = logits_of(2, 30)
    logits[0, 3] = math.nan
    rows = Sampler(30, CPU).score(logits, torch.tensor([1, 2]), 2)
    assert rows[0].token_id == NOT_FINITE
    assert rows[1].token_id == 2


def test_sampling_defaults_are_a_plain_draw() -> None:
    assert Sampling(seed=0).temperature == 1.0
    logits = torch.full((1, 100), -30.0)
    logits[0, 42] = 0.0
    assert ids_of(logits, [make_request()]) == [42]
