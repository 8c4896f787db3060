"""transformers as a peer, in its own process, on a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.processes import BenchError, LineProcess
from tests.support.checkpoints import RECIPES, make_model, save

pytestmark = pytest.mark.needs("transformers")
DEADLINE_S = 120.0
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(RECIPES["qwen3_moe"]), tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def peer(moe: Path) -> Iterator[LineProcess]:
    """Loaded, and its implementations chosen."""
    with LineProcess("loadtests.peers.transformers") as process:
        with pytest.raises(BenchError, match="before 'load'"):
            process.ask({"op": "batch", "prompts": PROMPTS, "num_tokens": 2}, DEADLINE_S)
        loaded = process.ask({"op": "load", "model": str(moe), "num_threads": 1}, DEADLINE_S)
        assert loaded["version"].startswith("5.")
        process.ask({"op": "trial", "prompts": PROMPTS, "prompt": [5] * 20, "num_tokens": 2}, DEADLINE_S)
        yield process


def test_the_trial_names_an_implementation_of_each_kind(peer: LineProcess) -> None:
    chosen = peer.ask({"op": "trial", "prompts": PROMPTS, "prompt": [5] * 20, "num_tokens": 2}, DEADLINE_S)
    # Here, not above: the module needs transformers, and without it these tests are skipped.
    from loadtests.peers.transformers import ATTENTION, CONTINUOUS_ATTENTION, EXPERTS

    assert set(chosen) == {"batch", "single", "prefill", "continuous"}
    for kind, implementation in chosen.items():
        assert implementation["attention"] in (CONTINUOUS_ATTENTION if kind == "continuous" else ATTENTION)
        assert implementation["experts"] in EXPERTS


def test_each_kind_generates_what_was_asked_for(peer: LineProcess) -> None:
    batch = peer.ask({"op": "batch", "prompts": PROMPTS, "num_tokens": 7}, DEADLINE_S)
    assert batch["output_tokens"] == 3 * 7
    at = {"prompts": PROMPTS, "num_tokens": [3, 9, 5], "times_s": [0.0, 0.01, 0.3]}
    for op in ("sequential", "continuous"):
        answer = peer.ask({"op": op, **at}, DEADLINE_S)
        assert answer["output_tokens"] == 17
        assert answer["duration_s"] > 0.3  # nothing starts before it has come


def test_a_single_request_is_timed_token_by_token(peer: LineProcess) -> None:
    answer = peer.ask({"op": "single", "prompt": PROMPTS[0], "num_tokens": 20}, DEADLINE_S)
    assert 0 < answer["ttft_s"] < 20
    assert 0 < answer["tpot_s"] < 5
    assert peer.ask({"op": "single", "prompt": PROMPTS[0], "num_tokens": 1}, DEADLINE_S)["tpot_s"] is None


def test_an_op_that_fails_says_so_and_the_next_one_runs(peer: LineProcess) -> None:
    with pytest.raises(BenchError, match="unknown op 'dance'"):
        peer.ask({"op": "dance"}, DEADLINE_S)
    with pytest.raises(BenchError, match="Error"):
        peer.ask({"op": "batch", "prompts": [[1], [2, 3]], "num_tokens": 2}, DEADLINE_S)
    assert peer.ask({"op": "batch", "prompts": PROMPTS, "num_tokens": 1}, DEADLINE_S)["output_tokens"] == 3
