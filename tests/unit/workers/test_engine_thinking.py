"""The engine ends thoughts at their budget, and another engine goes on with them exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs
from tokenizers import AddedToken

from cluster.errors import InvalidValueError
from cluster.protocol import Grammar, Sampling, Stopping, Submit, Thinking
from tests.support.grammars import compiled
from tests.support.models import TINY, make_decoder, random_weights
from tests.support.numerics import numerics
from tests.support.tokenizers_ import build, library
from workers.engine import Engine, EngineOptions
from workers.models.tokenizer import Tokenizer
from workers.sampling.guided import CompiledGrammar, GrammarCompiler

EOS = 3
BUDGET = 4
SPEC = replace(TINY, vocab_size=512)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = build("byte_level", tmp_path_factory.mktemp("tokenizer"))
    added = library(folder)
    added.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=True)])
    added.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    decoder = make_decoder(SPEC, random_weights(SPEC), numerics("blocks"))
    return Engine(decoder, tokenizer, [EOS], EngineOptions(max_model_len=256, num_pages=64, page_size=16))


def ask(name: str, seed: int = 1, budget: int | None = BUDGET, **sampling: object) -> Submit:
    thinking = Thinking(start="<think>", end="</think>", is_open=True, budget=budget)
    return Submit(
        request_id=name,
        prompt_ids=(10, 11, 12),
        sampling=Sampling(seed=seed, thinking=thinking, **sampling),  # type: ignore[arg-type]
        stopping=Stopping(max_tokens=24, ignore_eos=True),
    )


def run(
    engine: Engine, submits: list[Submit], grammar: CompiledGrammar | None = None
) -> dict[str, tuple[list[int], str]]:
    """What each of them gets, together in one batch."""
    found: dict[str, tuple[list[int], str]] = {submit.request_id: ([], "") for submit in submits}
    for submit in submits:
        engine.submit(engine.request_from(submit, None if grammar is None else grammar.matcher()))
    while engine.has_work:
        for output in engine.step().outputs:
            ids, text = found[output.request_id]
            found[output.request_id] = (ids + output.token_ids, text + output.text)
    engine.pool.check()
    assert engine.pool.num_used == 0
    return found


def test_thoughts_end_at_their_budget_and_nothing_else_changes(engine: Engine, tokenizer: Tokenizer) -> None:
    end = tokenizer.encode("</think>")
    submits = [ask(f"budget-{seed}", seed, logprobs=1) for seed in range(4)]
    free = [structs.replace(ask(f"free-{seed}", seed, None), request_id=f"free-{seed}") for seed in range(4)]
    together = run(engine, submits + free)
    for seed in range(4):
        ids, _ = together[f"budget-{seed}"]
        assert ids[BUDGET : BUDGET + len(end)] == end
        assert ids[:BUDGET] == together[f"free-{seed}"][0][:BUDGET], "what comes before is the same"
        assert len(ids) == 24
        alone = run(engine, [structs.replace(submits[seed], request_id="alone")])
        assert alone["alone"][0] == ids, "whatever runs beside it"


def test_another_engine_goes_on_exactly(engine: Engine) -> None:
    submit = ask("whole", 7)
    ids, _ = run(engine, [submit])["whole"]
    for known in range(len(ids)):
        resumed = structs.replace(submit, request_id="again", output_ids=tuple(ids[:known]))
        assert run(engine, [resumed])["again"][0] == ids[known:]


def test_a_fork_and_a_rewind_keep_the_budget(engine: Engine, tokenizer: Tokenizer) -> None:
    end = tokenizer.encode("</think>")
    submit = ask("source", 9)
    ids, _ = run(engine, [submit])["source"]
    engine.submit(engine.request_from(submit))
    for _ in range(BUDGET):
        engine.step()
    engine.fork("source", "fork", at=len(submit.prompt_ids) + BUDGET - 2)
    engine.rewind("source", len(submit.prompt_ids) + 1)
    found: dict[str, list[int]] = {"source": [], "fork": []}
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.request_id] += output.token_ids
    assert found["source"] == ids[1:]
    assert found["fork"] == ids[BUDGET - 2 :]
    assert ids[BUDGET : BUDGET + len(end)] == end


def test_a_grammar_holds_for_the_answer_only(engine: Engine, tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, (EOS,))
    try:
        grammar = Grammar(kind="choice", source='["yes","no"]')
        compiled_grammar = compiled(compiler, grammar)
        submit = ask("answer", 3, grammar=grammar)
        submit = structs.replace(submit, stopping=Stopping(max_tokens=64))
        ids, text = run(engine, [submit], compiled_grammar)["answer"]
        assert text in ("yes", "no") or text.endswith(("yes", "no"))
        answer = ids[ids.index(tokenizer.encode("</think>")[0]) + 1 :]
        assert tokenizer.decode(answer) in ("yes", "no")
        for known in range(1, len(ids)):
            resumed = structs.replace(submit, request_id="again", output_ids=tuple(ids[:known]))
            assert run(engine, [resumed], compiled_grammar)["again"][0] == ids[known:]
    finally:
        compiler.close()


def test_special_tokens_that_mark_a_reply_are_shown(engine: Engine, tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("</think>")
    hidden = ask("hidden", 5)
    shown = structs.replace(
        hidden, request_id="shown", stopping=structs.replace(hidden.stopping, shown_special_ids=(end,))
    )
    found = run(engine, [hidden, shown])
    assert found["hidden"][0] == found["shown"][0]
    assert "</think>" not in found["hidden"][1]
    assert found["shown"][1].replace("</think>", "") == found["hidden"][1]
    assert "</think>" in found["shown"][1]


def test_thinking_needs_its_marks_and_a_count(engine: Engine) -> None:
    for thinking in (
        Thinking(start="", end="</think>", is_open=True),
        Thinking(start="<think>", end="", is_open=True),
        Thinking(start="<think>", end="</think>", is_open=True, budget=-1),
    ):
        with pytest.raises(InvalidValueError):
            engine.request_from(structs.replace(ask("x"), sampling=Sampling(seed=0, thinking=thinking)))
