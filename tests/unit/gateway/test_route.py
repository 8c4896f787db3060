"""Which worker takes a request."""

from __future__ import annotations

import random

import pytest

from cluster.gateway.route import EXPECTED_TOKENS, SLACK_TOKENS, WorkerLoad, choose, generated_load, prefix_key
from cluster.protocol import Sampling, Stopping, Submit

NAMES = [f"attention-{i}" for i in range(5)]


def submit(prompt: list[int], max_tokens: int = 4, salt: str = "", output: tuple[int, ...] = ()) -> Submit:
    return Submit(
        request_id="x", prompt_ids=tuple(prompt), sampling=Sampling(seed=1), stopping=Stopping(max_tokens=max_tokens),
        cache_salt=salt, output_ids=output,
    )  # fmt: skip


def idle(names: list[str]) -> list[WorkerLoad]:
    return [WorkerLoad(name, 0, 0) for name in names]


def keys(number: int) -> list[bytes]:
    source = random.Random(7)
    return [source.randbytes(16) for _ in range(number)]


def test_there_is_nobody() -> None:
    assert choose([], b"x") is None
    assert choose([], None) is None


def test_without_a_prefix_the_least_loaded_is_taken() -> None:
    workers = [WorkerLoad("a", 9, 90), WorkerLoad("b", 3, 100)]
    assert choose(workers, None) == "a"
    assert choose([WorkerLoad("a", 2, 5), WorkerLoad("b", 1, 5)], None) == "b"


def test_a_prefix_has_its_worker_whatever_the_order() -> None:
    chosen = {key: choose(idle(NAMES), key) for key in keys(500)}
    for key, name in chosen.items():
        assert choose(idle(NAMES[::-1]), key) == name
    shares = [list(chosen.values()).count(name) for name in NAMES]
    assert min(shares) > 50
    assert max(shares) < 200


def test_a_worker_that_goes_moves_its_own_prefixes_alone() -> None:
    for key in keys(200):
        before, after = choose(idle(NAMES), key), choose(idle(NAMES[1:]), key)
        assert before in (after, NAMES[0])


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_on_imbalance_holds_for_one_prefix(seed: int) -> None:
    (key,) = keys(1)
    source = random.Random(seed)
    tokens = dict.fromkeys(NAMES, 0)
    for _ in range(500):
        name = choose([WorkerLoad(worker, 0, load) for worker, load in tokens.items()], key)
        assert name is not None
        mean = sum(tokens.values()) / len(NAMES)
        assert tokens[name] <= 1.25 * mean + SLACK_TOKENS
        tokens[name] += source.randint(1, 600)
    assert min(tokens.values()) > 0.5 * max(tokens.values())


def test_a_light_load_stays_together() -> None:
    (key,) = keys(1)
    first = choose(idle(NAMES), key)
    loads = [WorkerLoad(name, 1, SLACK_TOKENS if name == first else 0) for name in NAMES]
    assert choose(loads, key) == first


def test_prompts_share_a_key_by_their_first_page_and_salt() -> None:
    page = list(range(64))
    key = prefix_key(submit([*page, 7]), 64)
    assert key is not None
    assert key == prefix_key(submit([*page, 8, 9], max_tokens=99), 64)
    assert key != prefix_key(submit([*page[1:], 7, 8]), 64)
    assert key != prefix_key(submit([*page, 7], salt="a"), 64)
    assert prefix_key(submit([*page, 7], salt="x" * 500), 64) is not None
    assert prefix_key(submit(page), 64) is None


def test_the_tokens_to_come_are_reckoned() -> None:
    assert generated_load(submit([1], max_tokens=10)) == 10
    assert generated_load(submit([1], max_tokens=10, output=(1, 2, 3))) == 7
    assert generated_load(submit([1], max_tokens=10**6)) == EXPECTED_TOKENS
