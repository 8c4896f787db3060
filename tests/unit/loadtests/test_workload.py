"""Prompts, lengths and arrival times."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest

from cluster.errors import CheckpointError, InvalidValueError
from loadtests.workload import (
    Arrivals,
    Burst,
    Constant,
    Listed,
    LoadRequest,
    Poisson,
    arrivals_of,
    check_arrivals,
    continuous_steps,
    mixed_lengths,
    random_prompts,
    static_steps,
    word_ids,
)


def first(arrivals: Arrivals, num: int, seed: int = 0) -> list[float]:
    return list(itertools.islice(arrivals.times_s(seed), num))


def test_poisson_arrivals_are_seeded() -> None:
    assert first(Poisson(10.0), 50, seed=3) == first(Poisson(10.0), 50, seed=3)
    assert first(Poisson(10.0), 50, seed=3) != first(Poisson(10.0), 50, seed=4)


def test_poisson_gaps_are_exponential_with_the_rate() -> None:
    gaps = [b - a for a, b in itertools.pairwise(first(Poisson(20.0), 20_001, seed=1))]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(1 / 20, rel=0.03)  # of an exponential: its mean
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)


def test_constant_burst_and_listed_arrivals() -> None:
    assert first(Constant(4.0), 4) == [0.0, 0.25, 0.5, 0.75]
    assert first(Burst(), 3) == [0.0, 0.0, 0.0]
    assert first(Burst(size=2, interval_s=0.5), 5) == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert first(Listed([0.0, 0.1, 0.7]), 3) == [0.0, 0.1, 0.7]


def test_a_source_ends_with_its_requests() -> None:
    requests = [LoadRequest(prompt="a", max_tokens=1), LoadRequest(prompt="b", max_tokens=1)]
    assert [(t, r.prompt) for t, r in arrivals_of(requests, Constant(2.0), 0)] == [(0.0, "a"), (0.5, "b")]


@pytest.mark.parametrize(
    ("arrivals", "field"),
    [
        (Poisson(0.0), "rate"),
        (Constant(float("nan")), "rate"),
        (Burst(size=0), "size"),
        (Burst(size=1, interval_s=-1.0), "interval_s"),
        (Listed([0.0]), "at_s"),
        (Listed([1.0, 0.5]), "at_s"),
    ],
)
def test_arrivals_that_cannot_be_name_their_field(arrivals: Arrivals, field: str) -> None:
    with pytest.raises(InvalidValueError, match=field) as caught:
        check_arrivals(arrivals, num_requests=2)
    assert caught.value.param == field


def write_vocabulary(folder: Path, vocabulary: object) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}), encoding="utf-8")


def test_words_are_whole_words_behind_a_space(tmp_path: Path) -> None:
    words = {
        f"Ġ{a}{b}": 10 + 26 * i + j for i, a in enumerate("abcd") for j, b in enumerate("abcdefghijklmnopqrstuvwxyz")
    }
    write_vocabulary(tmp_path, {"<|im_end|>": 0, "ing": 1, "Ġ12": 2, "Ġ": 3, "Ġcafé": 4, **words})
    assert word_ids(tmp_path) == sorted(words.values())


def test_a_sentencepiece_vocabulary_is_a_list_of_pieces(tmp_path: Path) -> None:
    pieces = [["<s>", 0.0], *([f"▁{a}{b}", -1.0] for a in "abcd" for b in "abcdefghijklmnopqrstuvwxyz")]
    write_vocabulary(tmp_path, pieces)
    assert word_ids(tmp_path) == list(range(1, 105))


def test_a_folder_without_a_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        word_ids(tmp_path)
    write_vocabulary(tmp_path, {"Ġa": 0})
    with pytest.raises(CheckpointError, match="only 1 words"):
        word_ids(tmp_path)


def test_prompts_have_their_lengths_and_differ_by_seed() -> None:
    ids = list(range(100, 300))
    prompts = random_prompts(ids, [3, 64, 64], seed=1)
    assert [len(prompt) for prompt in prompts] == [3, 64, 64]
    assert set().union(*prompts) <= set(ids)
    assert prompts[1] != prompts[2]
    assert prompts == random_prompts(ids, [3, 64, 64], seed=1)
    assert prompts != random_prompts(ids, [3, 64, 64], seed=2)


def test_mixed_lengths_are_skewed_to_the_short() -> None:
    lengths = mixed_lengths(2_000, 8, 256, seed=1)
    assert min(lengths) >= 8
    assert max(lengths) <= 256
    assert statistics.median(lengths) == pytest.approx(45, abs=4)  # the geometric middle of 8 and 256
    assert statistics.fmean(lengths) > 1.3 * statistics.median(lengths)


def test_steps_by_hand() -> None:
    lengths = [4, 1, 1, 4, 2, 2]
    # Static, two at a time: max(4, 1) + max(1, 4) + max(2, 2) = 10 steps.
    assert static_steps(lengths, 2) == 10
    # Continuous: slot A 4 (0-4), slot B 1 (0-1), 1 (1-2), 4 (2-6), then A 2 (4-6), then either 2 (6-8).
    assert continuous_steps(lengths, 2) == 8


def test_equal_lengths_leave_nothing_to_gain() -> None:
    assert static_steps([5] * 12, 4) == continuous_steps([5] * 12, 4) == 15
    assert continuous_steps([7, 3], 4) == 7  # slots that nobody takes
