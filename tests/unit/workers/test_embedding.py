"""What is embedded, in the engine: a prompt's pooled state in any schedule, beside what is generated."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ContextLengthError, InvalidValueError
from cluster.protocol import Pooling
from tests.support.checkpoints import RECIPES, make_model, save
from tests.support.models import TINY, make_decoder, random_weights
from tests.support.numerics import numerics
from tests.support.tokenizers_ import build
from tests.unit.workers import test_engine_experts as remote
from tests.unit.workers.test_engine import Run, greedy, prompt
from workers.models.decoder import Decoder
from workers.models.loader import load_model
from workers.models.tokenizer import Tokenizer

POOLINGS: tuple[Pooling, ...] = ("last", "mean")
SPEC = TINY


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only lose by being shared out."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder(SPEC, random_weights(SPEC), numerics("blocks"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(build("byte_level", tmp_path_factory.mktemp("tokenizer")))


def words(length: int, seed: int = 0) -> list[int]:
    return [token % SPEC.vocab_size for token in prompt(length, seed)]


def vector(run: Run, name: str) -> torch.Tensor:
    """[hidden] float32 of a request that has ended well."""
    assert run.reason(name) == "stop"
    (output,) = run.outputs[name]
    assert (output.index, output.token_ids, output.text) == (0, [], "")
    found = struct.unpack(f"<{len(output.embedding) // 4}f", output.embedding)
    return torch.tensor(found)


def embed(run: Run, name: str, tokens: list[int], pooling: Pooling, **fields: object) -> None:
    run.submit(name, tokens, 0, pooling=pooling, **fields)


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral-window"])
def test_embeddings_are_those_of_transformers(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model(RECIPES[name])
    spec, weights = load_model(save(model, tmp_path), device=torch.device("cpu"), laid_out=True)
    run = Run(make_decoder(spec, weights, numerics("blocks")), tokenizer, token_budget=17)
    prompts = [[token % spec.vocab_size for token in prompt(length, seed=length)] for length in (1, 23, 60)]
    for index, tokens in enumerate(prompts):
        for pooling in POOLINGS:
            embed(run, f"{pooling} {index}", tokens, pooling)
    run.finish()
    for index, tokens in enumerate(prompts):
        with torch.inference_mode():
            hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
        for pooling, state in (("last", hidden[-1]), ("mean", hidden.mean(0))):
            expected = torch.nn.functional.normalize(state, dim=0)
            torch.testing.assert_close(vector(run, f"{pooling} {index}"), expected, rtol=0, atol=1e-4)


LENGTHS = (1, 17, 48, 61)


@pytest.fixture(scope="module")
def alone(decoder: Decoder, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Of each length and pooling, with nobody beside it and in one step."""
    run = Run(decoder, tokenizer, prefix_cache=False)
    for length in LENGTHS:
        for pooling in POOLINGS:
            embed(run, f"{pooling} {length}", words(length, length), pooling)
            run.finish()
    return {name: vector(run, name) for name in run.outputs}


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_no_bit_depends_on_the_schedule(
    decoder: Decoder, tokenizer: Tokenizer, alone: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    run = Run(
        decoder,
        tokenizer,
        num_pages=data.draw(st.integers(6, 20), label="pages"),
        token_budget=data.draw(st.integers(3, 40), label="budget"),
        max_num_seqs=data.draw(st.integers(1, 6), label="sequences"),
    )
    run.submit("beside", words(9, seed=90), 12)
    names = data.draw(st.lists(st.sampled_from(sorted(alone)), min_size=1, max_size=5, unique=True), label="names")
    for name in names:
        pooling, length = name.split()
        embed(run, name, words(int(length), int(length)), "last" if pooling == "last" else "mean")
        if data.draw(st.booleans(), label="steps"):
            run.step()
    run.finish()
    for name in names:
        assert torch.equal(vector(run, name), alone[name])


def test_a_found_prefix_serves_the_last_token_and_never_the_mean(decoder: Decoder, tokenizer: Tokenizer) -> None:
    cold = Run(decoder, tokenizer, prefix_cache=False)
    run = Run(decoder, tokenizer)
    run.submit("reads", words(60), 1)
    run.finish()
    for engine in (cold, run):
        for pooling in POOLINGS:
            embed(engine, pooling, words(60), pooling)
        engine.finish()
    for pooling, num_cached in (("last", 48), ("mean", 0)):
        assert run.outputs[pooling][0].cached_tokens == num_cached
        assert torch.equal(vector(run, pooling), vector(cold, pooling))
    run.submit("goes on", words(60), 4)  # with the pages of what was embedded
    run.finish()
    assert run.tokens("goes on") == greedy(decoder, words(60), 4)


def test_what_gave_its_pages_up_begins_its_mean_again(decoder: Decoder, tokenizer: Tokenizer) -> None:
    alone = Run(decoder, tokenizer)
    embed(alone, "x", words(60), "mean")
    alone.finish()
    run = Run(decoder, tokenizer, num_pages=6, token_budget=2, prefix_cache=False)
    run.submit("older", words(2, seed=1), 60)
    run.step()
    embed(run, "x", words(60), "mean")
    run.finish()
    assert run.engine.snapshot().preemptions > 0
    assert torch.equal(vector(run, "x"), vector(alone, "x"))


def test_experts_of_other_workers_give_the_same_bits_wherever_a_step_breaks(tokenizer: Tokenizer) -> None:
    local = Run(make_decoder(remote.SPEC, remote.WEIGHTS, remote.BLOCKS), tokenizer, page_size=8)  # as theirs
    for pooling in POOLINGS:
        embed(local, pooling, list(remote.PROMPT), pooling)
    local.finish()
    for faults in (frozenset[int](), frozenset({5, 26}), frozenset({14, 40})):
        run = remote.Run(tokenizer, faults)
        run.connect()
        for pooling in POOLINGS:
            run.submit(pooling, max_tokens=0, pooling=pooling)
        run.finish()
        assert (run.num_stalls > 0) == bool(faults)
        for pooling in POOLINGS:
            assert run.outputs[pooling][0].embedding == local.outputs[pooling][0].embedding


def test_it_ends_like_any_other(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer, token_budget=10)
    embed(run, "aborted", words(50), "mean")
    embed(run, "late", words(50, seed=1), "last", deadline_s=0.0)
    run.step()
    run.engine.abort("aborted")
    run.finish()
    assert run.reason("aborted") == "abort"
    assert run.reason("late") == "error"
    embed(run, "whole", words(256), "last")  # as long as the context
    with pytest.raises(ContextLengthError):
        embed(run, "long", words(257), "last")
    for wrong in ({"max_tokens": 1}, {"prompt_logprobs": 1}):
        with pytest.raises(InvalidValueError, match="embedded"):
            run.submit("wrong", words(5), **({"max_tokens": 0} | wrong), pooling="last")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="generating"):
        run.engine.fork("whole", "other")
    run.finish()
    assert vector(run, "whole").norm() == pytest.approx(1.0, abs=1e-6)


def test_a_state_without_direction_is_an_error(decoder: Decoder, tokenizer: Tokenizer) -> None:
    weights = random_weights(SPEC)
    weights.norm.fill_(float("nan"))
    run = Run(make_decoder(SPEC, weights, numerics("blocks")), tokenizer)
    embed(run, "x", words(5), "last")
    run.finish()
    (output,) = run.outputs["x"]
    assert output.finish is not None
    assert (output.finish.reason, output.finish.error_code) == ("error", "engine_error")
    assert output.embedding == b""
