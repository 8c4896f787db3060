"""The bench of an engine by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import ForetokenError
from cluster.protocol import Launch
from loadtests.processes import BenchError, LineProcess
from tests.support.models import TINY, make_decoder, random_weights
from tests.support.numerics import numerics
from tests.support.tokenizers_ import build
from workers.bench import Batch, run_batch
from workers.engine import Engine, EngineOptions
from workers.models.tokenizer import Tokenizer
from workers.scheduler import SchedulerOptions

SPEC = replace(TINY, vocab_size=500)
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    tokenizer = Tokenizer(build("byte_level", tmp_path_factory.mktemp("tokenizer")))
    options = EngineOptions(
        max_model_len=256, num_pages=64, page_size=16, scheduler=SchedulerOptions(max_num_seqs=8, token_budget=24)
    )
    return Engine(make_decoder(SPEC, random_weights(SPEC), numerics("blocks")), tokenizer, [3], options)


def test_a_batch_is_timed_step_by_step(engine: Engine) -> None:
    times = run_batch(engine, Batch(prompts=[[10 + i] * 12 for i in range(4)], num_tokens=6))
    assert times.output_tokens == 24
    # 48 prompt tokens in steps of 24, 22 (two sequences decode besides) and 2: the last sequence's prompt takes two.
    assert times.num_decode_steps == 5
    assert times.num_sequence_steps == 4 * 6 + 1
    assert 0 < times.forward_s < times.step_s <= times.prefill_s + times.decode_s
    assert not engine.has_work


def test_one_token_needs_no_decoding(engine: Engine) -> None:
    times = run_batch(engine, Batch(prompts=[[20] * 12], num_tokens=1))
    assert (times.decode_s, times.num_decode_steps, times.output_tokens) == (0.0, 0, 1)
    assert times.prefill_s > 0


def test_a_batch_that_cannot_run_is_an_error(engine: Engine) -> None:
    with pytest.raises(ForetokenError, match="context length is 256"):
        run_batch(engine, Batch(prompts=[[20] * 200], num_tokens=100))


def test_the_process_says_what_is_wrong_with_its_launch() -> None:
    with LineProcess("workers.bench") as process, pytest.raises(BenchError, match="/nowhere"):
        process.ask(Launch(address="", model_path="/nowhere", served_name="x"), DEADLINE_S)
