"""The engine through its interface: submit, abort, fork, rewind, score, step, snapshot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cluster.errors import ContextLengthError, InvalidValueError
from cluster.protocol import RequestOutput, Sampling, Stopping, Submit
from tests.support.models import TINY, Driver, make_decoder, random_weights
from tests.support.numerics import numerics
from tests.support.tokenizers_ import build
from workers.engine import Engine, EngineOptions
from workers.models.decoder import Decoder
from workers.models.tokenizer import Tokenizer
from workers.scheduler import SchedulerOptions

SPEC = replace(TINY, vocab_size=500)
EOS = 3


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return make_decoder(SPEC, random_weights(SPEC), numerics("blocks"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(build("byte_level", tmp_path_factory.mktemp("tokenizer")))


class Run:
    """An engine and everything that it said."""

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, num_pages: int = 64, page_size: int = 16, **options: object
    ) -> None:
        self.engine = Engine(
            decoder,
            tokenizer,
            [EOS],
            EngineOptions(
                max_model_len=256,
                num_pages=num_pages,
                page_size=page_size,
                prefix_cache=bool(options.pop("prefix_cache", True)),
                scheduler=SchedulerOptions(**options),  # type: ignore[arg-type]
            ),
        )
        self.outputs: dict[str, list[RequestOutput]] = {}

    def submit(self, name: str, prompt: list[int], max_tokens: int = 8, **fields: object) -> None:
        self.engine.submit(self.engine.request_from(make_submit(name, prompt, max_tokens, **fields)))

    def step(self) -> None:
        for output in self.engine.step().outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        self.engine.pool.check()

    def finish(self, max_steps: int = 400) -> None:
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work
        assert self.engine.pool.num_used == 0, "pages are lost"

    def tokens(self, name: str) -> list[int]:
        """Each index once and in order, then the tokens."""
        found: list[int] = []
        for output in self.outputs[name]:
            if output.token_ids:
                assert output.index == len(found)
            found += output.token_ids
        return found

    def reason(self, name: str) -> str:
        ends = [output.finish for output in self.outputs[name] if output.finish is not None]
        assert len(ends) == 1, "exactly one terminal event"
        assert self.outputs[name][-1].finish is ends[0], "and nothing behind it"
        return ends[0].reason


def make_submit(name: str, prompt: list[int], max_tokens: int = 8, **fields: object) -> Submit:
    stopping = {"ignore_eos": True} | {
        key: fields.pop(key) for key in list(fields) if key in Stopping.__struct_fields__
    }
    outer = {key: fields.pop(key) for key in list(fields) if key in Submit.__struct_fields__}
    sampling = {"seed": 1, "temperature": 0.0} | fields
    return Submit(
        request_id=name,
        prompt_ids=tuple(prompt),
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
        stopping=Stopping(max_tokens=max_tokens, **stopping),  # type: ignore[arg-type]
        **outer,  # type: ignore[arg-type]
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 500, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(decoder: Decoder, tokens: list[int], count: int) -> list[int]:
    """The oracle: the whole sequence again for each token."""
    tokens = list(tokens)
    for _ in range(count):
        logits = Driver(decoder, [tokens]).run([[(0, len(tokens))]])[0]
        tokens.append(int(logits[-1].argmax()))
    return tokens[-count:]


def test_greedy_tokens_equal_recomputation_from_scratch(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer, token_budget=20)
    for i in range(5):
        run.submit(str(i), prompt(3 + 11 * i, seed=i), 6)
    run.finish()
    for i in range(5):
        assert run.tokens(str(i)) == greedy(decoder, prompt(3 + 11 * i, seed=i), 6)
        assert run.reason(str(i)) == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_do_not_depend_on_the_load(decoder: Decoder, tokenizer: Tokenizer, temperature: float) -> None:
    alone = Run(decoder, tokenizer)
    alone.submit("x", prompt(30), 20, temperature=temperature)
    alone.finish()
    crowded = Run(decoder, tokenizer, num_pages=9, token_budget=7, max_num_seqs=5)  # chunks and preemptions
    crowded.submit("x", prompt(30), 20, temperature=temperature)
    for i in range(8):
        crowded.submit(f"other{i}", prompt(9 + 3 * i, seed=i + 1), 25, temperature=temperature)
        crowded.step()
    crowded.finish()
    assert crowded.engine.snapshot().preemptions > 0
    assert crowded.tokens("x") == alone.tokens("x")


def test_resumption_gives_the_same_tokens(decoder: Decoder, tokenizer: Tokenizer) -> None:
    whole = Run(decoder, tokenizer)
    whole.submit("x", prompt(20), 30, temperature=1.0)
    whole.finish()
    tokens = whole.tokens("x")
    rest = Run(decoder, tokenizer)
    rest.submit("x", prompt(20), 30, temperature=1.0, output_ids=tuple(tokens[:13]))
    rest.finish()
    assert rest.outputs["x"][0].index == 13
    assert [token for output in rest.outputs["x"] for token in output.token_ids] == tokens[13:]
    text = "".join(output.text for output in whole.outputs["x"])
    assert (
        "".join(output.text for output in rest.outputs["x"])
        == text[len(text) - len("".join(o.text for o in rest.outputs["x"])) :]
    )


def test_resuming_what_had_ended_gives_its_end_alone(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(20), 3, output_ids=(7, 8, 9))
    run.finish()
    assert run.tokens("x") == []
    assert run.reason("x") == "length"


def test_abort_frees_pages_in_every_state(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer, token_budget=8, max_num_seqs=2)
    run.submit("decode", prompt(4), 50)
    run.step()
    run.submit("prefill", prompt(60), 50)
    run.submit("queued", prompt(4), 50)
    run.step()
    for name in ("queued", "prefill", "decode"):
        run.engine.abort(name)
    assert run.engine.pool.num_used == 0
    run.engine.abort("unknown")
    run.step()
    assert all(run.reason(name) == "abort" for name in ("queued", "prefill", "decode"))
    assert not run.engine.has_work


def test_the_prefix_cache_serves_the_second_request(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("first", prompt(50), 4)
    run.finish()
    run.submit("second", prompt(50), 4)
    run.finish()
    assert run.outputs["first"][0].cached_tokens == 0
    assert run.outputs["second"][0].cached_tokens == 48
    assert run.tokens("first") == run.tokens("second")
    run.submit("other tenant", prompt(50), 4, cache_salt="x")
    run.finish()
    assert run.outputs["other tenant"][0].cached_tokens == 0


def test_fork_shares_pages_and_both_go_on(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer, prefix_cache=False)
    run.submit("x", prompt(40), 10)
    run.step()
    run.step()
    used = run.engine.pool.num_used
    run.engine.fork("x", "y")
    assert run.engine.pool.num_used == used, "a fork costs no page until it writes"
    run.engine.fork("x", "z", at=40)
    run.finish()
    expected = greedy(decoder, prompt(40), 10)
    assert run.tokens("x") == expected
    assert [t for output in run.outputs["y"] for t in output.token_ids] == expected[2:]
    assert run.tokens("z") == expected


def test_rewind_takes_tokens_back(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(30), 12)
    for _ in range(6):
        run.step()
    run.engine.rewind("x", 33)
    again = len(run.outputs["x"])
    run.finish()
    expected = greedy(decoder, prompt(30), 12)
    assert [t for output in run.outputs["x"][:again] for t in output.token_ids] == expected[:6]
    assert run.outputs["x"][again].index == 3
    assert [t for output in run.outputs["x"][again:] for t in output.token_ids] == expected[3:]


@pytest.mark.parametrize("at", [29, 99])
def test_fork_and_rewind_outside_the_sequence_are_refused(decoder: Decoder, tokenizer: Tokenizer, at: int) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(30), 4)
    run.step()
    for action in (lambda: run.engine.fork("x", "y", at), lambda: run.engine.rewind("x", at)):
        with pytest.raises(InvalidValueError, match=r"at must be in \[30, 31\]"):
            action()
    with pytest.raises(InvalidValueError, match="no request 'nobody'"):
        run.engine.fork("nobody", "y")
    with pytest.raises(InvalidValueError, match="already running"):
        run.engine.fork("x", "x")
    run.finish()


def test_score_equals_the_models_own_probabilities(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer, token_budget=4)
    run.submit("x", prompt(21), 5)
    for _ in range(7):
        run.step()
    tokens = prompt(21) + run.tokens("x")
    ids = prompt(9, seed=4)
    used = run.engine.pool.num_used
    scores = run.engine.score("x", ids)
    assert run.engine.pool.num_used == used
    logits = Driver(decoder, [tokens + ids]).run([[(0, len(tokens) + len(ids))]])[0]
    expected = torch.log_softmax(logits, -1)[len(tokens) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=1e-4)
    run.finish()
    assert run.tokens("x") == greedy(decoder, prompt(21), 5), "scoring disturbed the request"


def test_scoring_in_bounded_parts_and_within_the_context(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(8), 4)
    run.step()
    ids = prompt(200, seed=6)
    tokens = prompt(8) + run.tokens("x")
    logits = Driver(decoder, [tokens + ids]).run([[(0, len(tokens) + len(ids))]])[0]
    expected = torch.log_softmax(logits, -1)[len(tokens) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(run.engine.score("x", ids)), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InvalidValueError, match="over the context length of 256"):
        run.engine.score("x", prompt(300))
    run.finish()
    assert run.tokens("x") == greedy(decoder, prompt(8), 4)


def test_position_offsets_shift_the_rotary_positions(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """Rotary scores depend on differences alone, so an offset changes no token, but never shares a page."""
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(40), 6)
    run.finish()
    request = run.engine.request_from(make_submit("y", prompt(40), 6))
    request.position_offset = 100
    run.engine.submit(request)
    run.finish()
    assert run.tokens("x") == run.tokens("y")
    assert run.outputs["y"][0].cached_tokens == 0


@pytest.mark.parametrize("budget", [2048, 7])
def test_prompt_logprobs(decoder: Decoder, tokenizer: Tokenizer, budget: int) -> None:
    run = Run(decoder, tokenizer, token_budget=budget)
    run.submit("x", prompt(20), 2, prompt_logprobs=3, logprobs=2)
    run.finish()
    first = run.outputs["x"][0]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    logits = Driver(decoder, [prompt(20)]).run([[(0, 20)]])[0]
    expected = torch.log_softmax(logits, -1)
    for i, entry in enumerate(first.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.token_id == prompt(20)[i + 1]
        assert entry.logprob == pytest.approx(float(expected[i, entry.token_id]), abs=1e-4)
        assert [top.token_id for top in entry.top] == expected[i].topk(3).indices.tolist()
        assert entry.token == tokenizer.token_bytes(entry.token_id)
    (logprobs,) = first.logprobs
    assert (logprobs.rank, len(logprobs.top)) == (1, 2)


def test_nothing_is_generated_where_nothing_was_asked_for(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(20), 0, prompt_logprobs=0)
    run.finish()
    assert run.reason("x") == "length"
    assert run.tokens("x") == []
    assert run.outputs["x"][0].prompt_logprobs is not None
    assert len(run.outputs["x"][0].prompt_logprobs) == 20


def test_stop_strings_and_stop_tokens(decoder: Decoder, tokenizer: Tokenizer) -> None:
    expected = greedy(decoder, prompt(20), 8)
    run = Run(decoder, tokenizer)
    run.submit("token", prompt(20), 8, stop_token_ids=(expected[3],))
    run.finish()
    assert run.tokens("token") == expected[: expected.index(expected[3]) + 1]
    assert run.reason("token") == "stop"


def test_a_deadline_ends_a_request(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(20), 8, deadline_s=0.0)
    run.submit("y", prompt(20), 8)
    run.finish()
    assert run.reason("x") == "error"
    assert run.outputs["x"][-1].finish.error_code == "deadline_exceeded"  # type: ignore[union-attr]
    assert run.reason("y") == "length"


def test_a_step_that_fails_ends_its_requests_alone(
    decoder: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(decoder, tokenizer, max_num_seqs=1)
    run.submit("x", prompt(20), 8)
    run.submit("waits", prompt(20, seed=2), 4)
    run.step()
    with monkeypatch.context() as patch:
        patch.setattr(run.engine.decoder, "last_hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        run.step()
    assert run.reason("x") == "error"
    run.finish()
    assert run.tokens("waits") == greedy(decoder, prompt(20, seed=2), 4)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {500: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"stop": ("",)}, "stop"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_values_name_the_field(
    decoder: Decoder, tokenizer: Tokenizer, fields: dict[str, object], param: str
) -> None:
    run = Run(decoder, tokenizer)
    with pytest.raises(InvalidValueError) as raised:
        run.submit("x", prompt(4), 8, **fields)
    assert raised.value.param == param
    assert param in raised.value.message
    assert not run.engine.has_work


def test_bad_prompts(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer, num_pages=4)
    with pytest.raises(InvalidValueError, match="empty"):
        run.submit("x", [])
    with pytest.raises(InvalidValueError, match="token id 500"):
        run.submit("x", [4, 500])
    with pytest.raises(ContextLengthError, match=r"256 tokens, but 308.*300 in the prompt and 8 in max_tokens"):
        run.submit("x", prompt(300))
    with pytest.raises(InvalidValueError, match="KV pages"):
        run.submit("x", prompt(60), 60)


def test_a_snapshot_counts(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(20), 5)
    run.step()
    assert run.engine.snapshot().num_running == 1
    run.finish()
    state = run.engine.snapshot()
    assert (state.generated_tokens, state.prompt_tokens, state.queried_tokens) == (5, 20, 20)
    assert state.step_tokens == 24
    assert state.sequence_steps == state.steps == 5
    assert 0 < state.forward_s < state.step_s
    assert state.pages_free == state.pages_total == 64


def test_a_fork_at_a_page_border_waits_for_the_page_that_it_must_copy(decoder: Decoder, tokenizer: Tokenizer) -> None:
    """A page that the prefix cache has named is copied before the fork writes into it: room for that is room needed."""
    run = Run(decoder, tokenizer, num_pages=4)
    run.submit("x", prompt(47), 12)
    run.step()
    run.step()
    run.engine.fork("x", "y", at=48)
    run.engine.abort("x")
    run.submit("z", prompt(20, seed=3), 4)
    run.finish()
    assert run.reason("y") == run.reason("z") == "length"
    assert [t for output in run.outputs["y"] for t in output.token_ids] == greedy(decoder, prompt(47), 12)[1:]


def test_a_prompt_with_logprobs_is_computed_in_bounded_parts(decoder: Decoder, tokenizer: Tokenizer) -> None:
    run = Run(decoder, tokenizer)
    run.submit("x", prompt(200), 1, prompt_logprobs=1)
    rows = []
    last_hidden = run.engine.decoder.last_hidden
    run.engine.decoder.last_hidden = lambda batch, kv: rows.append(len(batch.rows)) or last_hidden(batch, kv)  # type: ignore[method-assign,func-returns-value,assignment]
    try:
        run.finish()
    finally:
        del run.engine.decoder.last_hidden
    assert rows == [128, 72]
    assert run.outputs["x"][0].prompt_logprobs is not None
    assert len(run.outputs["x"][0].prompt_logprobs) == 200
