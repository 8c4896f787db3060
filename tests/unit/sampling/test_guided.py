from __future__ import annotations

import json
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import DrainingError, GrammarError, OverloadedError, UnsupportedFieldError
from cluster.protocol import Grammar
from tests.support.grammars import allowed_tokens, compiled
from tests.support.sampling import make_request
from tests.support.tokenizers_ import build
from workers.models.tokenizer import Tokenizer
from workers.sampling import guided
from workers.sampling.guided import GrammarCompiler, Matcher
from workers.sampling.sampler import Sampler, failure

EOS = (2, 3)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "é🙂"]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
# hours of compilation: a state for every remainder
EXPLODES = {"type": "integer", "multipleOf": 99_999_989}


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", source=value if isinstance(value, str) else json.dumps(value))


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(build(request.param, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, EOS)
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One tokenizer, where it does not matter which."""
    return Tokenizer(build("byte_level", tmp_path_factory.mktemp("plain")))


@pytest.fixture
def strict(plain: Tokenizer) -> Iterator[GrammarCompiler]:
    """A compiler of little patience and memory."""
    compiler = GrammarCompiler(plain, EOS, max_bytes=150_000, timeout_s=0.6, cache_size=4)
    yield compiler
    compiler.close()


def walk(matcher: Matcher, tokenizer: Tokenizer, seed: int, num_tokens: int = 60) -> tuple[str, bool]:
    """Random allowed tokens: the text, and whether it is complete."""
    generator = random.Random(seed)
    ids: list[int] = []
    for _ in range(num_tokens):
        allowed = allowed_tokens(matcher, tokenizer.vocab_size).nonzero()[0].tolist()
        assert allowed, matcher.error
        token_id = generator.choice(allowed)
        assert matcher.accept(token_id)
        if token_id in EOS:
            return tokenizer.decode(ids), True
        ids.append(token_id)
        if matcher.is_stopped:
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


def accept_text(matcher: Matcher, tokenizer: Tokenizer, text: str) -> bool:
    """Go on by the single-byte tokens of `text`."""
    single = {tokenizer.token_bytes(i): i for i in range(4, tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    return all(matcher.accept(single[bytes([byte])]) for byte in text.encode())


# ---------------------------------------------------------------------------------------------------- what is followed


def test_json_schema_gives_compact_json_of_that_schema(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiled(compiler, schema(SCHEMA))
    complete = 0
    for seed in range(30):
        text, done = walk(grammar.matcher(), tokenizer, seed)
        if not done:
            continue
        complete += 1
        value = json.loads(text)
        assert list(value) == ["name", "size", "tags"]
        assert 1 <= value["size"] <= 99
        assert set(value["tags"]) <= {"a", "é🙂"}
        assert re.fullmatch(r'\{"name":"(\\.|[^"\\])*","size":\d+,"tags":\[[^ ]*\]\}', text)
    assert complete >= 10


def test_white_space_between_json_tokens_is_refused(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = Grammar(kind="json_object", source="")
    assert accept_text(compiled(compiler, grammar).matcher(), tokenizer, '{"a":[1,2,{"b":null}],"c d":"e f"}')
    for text in ('{ "a":1}', '{"a": 1}', '{"a":1 ,"b":2}', "[1]", " {}", '"a"'):
        assert not accept_text(compiled(compiler, grammar).matcher(), tokenizer, text)


def test_a_schema_cannot_loosen_the_compiler(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    loose = {"type": "object", "x-guidance": {"whitespace_flexible": True, "lenient": True, "item_separator": " , "}}
    assert not accept_text(compiled(compiler, schema(loose)).matcher(), tokenizer, '{ "a":1}')


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar(kind="regex", source=r"[0-9]{3}-(a|b)+"), r"[0-9]{3}-(a|b)+"),
        (Grammar(kind="choice", source=json.dumps(["yes", 'no "x"\n\\', "é🙂"])), 'yes|no "x"\n\\\\|é🙂'),
        (Grammar(kind="lark", source='start: "a" /[bc]+/ "d"'), "a[bc]+d"),
    ],
    ids=["regex", "choice", "lark"],
)
def test_the_other_kinds(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, pattern: str) -> None:
    texts = {walk(compiled(compiler, grammar).matcher(), tokenizer, seed) for seed in range(20)}
    assert len(texts) > 2
    for text, done in texts:
        assert not done or re.fullmatch(pattern, text)


def test_eos_is_allowed_only_where_the_text_is_complete(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiled(compiler, Grammar(kind="regex", source="ab+")).matcher()
    assert accept_text(matcher, tokenizer, "a")
    assert not allowed_tokens(matcher, tokenizer.vocab_size)[list(EOS)].any()
    assert accept_text(matcher, tokenizer, "b")
    assert allowed_tokens(matcher, tokenizer.vocab_size)[list(EOS)].all()
    assert not matcher.is_stopped
    closed = compiled(compiler, Grammar(kind="regex", source="ab")).matcher()
    assert accept_text(closed, tokenizer, "ab")
    assert closed.is_stopped
    assert set(allowed_tokens(closed, tokenizer.vocab_size).nonzero()[0]) == set(EOS)


def test_special_tokens_are_no_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiled(compiler, Grammar(kind="regex", source="(?s:.)*")).matcher()
    assert not allowed_tokens(matcher, tokenizer.vocab_size)[[0, 1]].any()


# ----------------------------------------------------------------------------------------------------------- the state


def test_matchers_of_one_grammar_go_their_own_ways(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiled(compiler, schema(SCHEMA))
    matcher, other = grammar.matcher(), grammar.matcher()
    first = allowed_tokens(matcher, tokenizer.vocab_size)
    assert accept_text(matcher, tokenizer, '{"name":"')
    assert not np.array_equal(allowed_tokens(matcher, tokenizer.vocab_size), first)
    for fresh in (other, matcher.restarted()):
        assert np.array_equal(allowed_tokens(fresh, tokenizer.vocab_size), first)
        assert accept_text(fresh, tokenizer, '{"name":"yz","size":42,"tags":[]}')
        assert fresh.is_stopped
    assert not matcher.is_stopped
    assert accept_text(matcher, tokenizer, 'x","size":1')


def test_a_refused_token_is_an_error_that_stays(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiled(compiler, Grammar(kind="regex", source="ab")).matcher()
    assert matcher.error == ""
    assert not accept_text(matcher, tokenizer, "x")
    assert matcher.error
    assert not matcher.is_stopped
    assert not allowed_tokens(matcher, tokenizer.vocab_size).any()


@pytest.mark.parametrize("num_tokens", [100, 4096])
def test_a_models_larger_or_smaller_vocabulary_is_masked(
    compiler: GrammarCompiler, tokenizer: Tokenizer, num_tokens: int
) -> None:
    matcher = compiled(compiler, Grammar(kind="regex", source="(?s:.)*")).matcher()
    bits = allowed_tokens(matcher, num_tokens)
    shared = min(num_tokens, tokenizer.vocab_size)
    assert np.array_equal(bits[:shared], allowed_tokens(matcher, tokenizer.vocab_size)[:shared])
    assert not bits[tokenizer.vocab_size :].any()


def test_the_sampler_draws_json_from_noise(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    vocab_size = tokenizer.vocab_size + 40
    sampler = Sampler(vocab_size, torch.device("cpu"), EOS)
    requests = [make_request(str(i), seed=i, temperature=[0.0, 1.0, 2.0][i % 3]) for i in range(6)]
    grammar = compiled(compiler, schema(SCHEMA))
    for request in requests[1:]:
        request.matcher = grammar.matcher()
    generator = torch.Generator().manual_seed(0)
    done: dict[str, str] = {}
    for _ in range(200):
        running = [request for request in requests if request.request_id not in done]
        logits = torch.randn(len(running), vocab_size, generator=generator) * 3
        for request, row in zip(running, sampler.sample(logits, running), strict=True):
            assert failure(request, row) is None
            request.tokens.append(row.token_id)
            if request.matcher is not None:
                assert request.matcher.accept(row.token_id)
                if request.matcher.is_stopped:
                    done[request.request_id] = tokenizer.decode(request.output_ids)
    assert set(done) == {"1", "2", "3", "4", "5"}
    for text in done.values():
        assert list(json.loads(text)) == ["name", "size", "tags"]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (schema("nope"), "Expecting value"),
        (schema([1]), "is an object"),
        (schema({"type": "object", "propertyNames": {"pattern": "a"}}), "propertyNames"),
        (schema({"$ref": "https://example.com/schema.json"}), "cannot be used"),
        (schema({"type": "integer", "minimum": 5, "maximum": 4}), "cannot be used"),
        (schema('{"a":' * 20_000 + "1" + "}" * 20_000), "levels deep"),
        (schema("{" * 100_000), "levels deep"),
        (schema("[" * 100_000), "levels deep"),
        (schema({"enum": ["x" * 200_000]}), "bytes"),
        (schema({"allOf": [{"anyOf": [{"multipleOf": i}, {"minimum": i}]} for i in range(2, 30)]}), "cannot be used"),
        (Grammar(kind="regex", source="("), "unclosed"),
        (Grammar(kind="regex", source="(" * 60_000), "cannot be used"),
        (Grammar(kind="regex", source="((a{1000}){1000}){1000}"), "cannot be used"),
        (Grammar(kind="regex", source="[xy]((a{1000}){1000}){1000}"), "cannot be used"),
        (Grammar(kind="regex", source="\ud800"), "cannot be used"),
        (Grammar(kind="choice", source="[]"), "at least one"),
        (Grammar(kind="choice", source="[1]"), "list of at least one string"),
        (Grammar(kind="choice", source="{"), "Expecting"),
        (Grammar(kind="lark", source="start: missing"), "missing"),
        (Grammar(kind="lark", source="start: " + "(" * 50_000), "cannot be used"),
        # recursion inside the library: without the checker process this one is the end of the worker
        (
            Grammar(
                kind="lark",
                source="start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(5000)) + '\nr5000: "x"',
            ),
            "nests too deeply",
        ),
        (schema(EXPLODES), "more than 0.6 s"),
        (Grammar(kind="lark", source=f"start: <[1]> value\nvalue: %json {json.dumps(EXPLODES)}"), "more than 0.6 s"),
        (Grammar(kind="lark", source='root ::= "a"'), "cannot be used"),
    ],
)
def test_what_cannot_be_compiled_is_a_clear_error(
    strict: GrammarCompiler, plain: Tokenizer, grammar: Grammar, message: str
) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        compiled(strict, grammar)
    assert caught.value.param == ("response_format" if grammar.kind == "json_schema" else "grammar")
    assert len(caught.value.message) < 700
    fine = compiled(strict, Grammar(kind="regex", source="fine"))
    assert allowed_tokens(fine.matcher(), plain.vocab_size).any()


def test_a_refusal_is_remembered(strict: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GrammarError):
        compiled(strict, schema(EXPLODES))
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing more can be started
    started = time.monotonic()
    with pytest.raises(GrammarError):
        compiled(strict, schema(EXPLODES))
    assert time.monotonic() - started < 0.2


def test_slow_grammars_do_not_hold_up_the_others(strict: GrammarCompiler, plain: Tokenizer) -> None:
    slow = [strict.submit(schema(EXPLODES | {"multipleOf": 99_999_989 + 2 * i})) for i in range(3)]
    assert allowed_tokens(compiled(strict, schema(SCHEMA)).matcher(), plain.vocab_size).any()
    assert any(not future.done() for future in slow)
    outcomes = {type(future.exception(60)) for future in slow}
    assert outcomes <= {GrammarError, OverloadedError}
    assert GrammarError in outcomes


def test_too_many_waiting_grammars_are_refused_for_now(
    strict: GrammarCompiler, plain: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def wait(_self: object, _grammar: str, _limit_s: float) -> str | None:
        assert gate.wait(30)
        return None

    monkeypatch.setattr(guided._Checker, "check", wait)
    grammars = [Grammar(kind="regex", source=f"a{i}") for i in range(guided.MAX_QUICK + 1)]
    futures = [strict.submit(grammar) for grammar in grammars]
    assert isinstance(futures[-1].exception(5), OverloadedError)
    gate.set()
    assert all(future.exception(30) is None for future in futures[:-1])
    assert allowed_tokens(compiled(strict, grammars[-1]).matcher(), plain.vocab_size).any()  # another time it may do


def test_equal_grammars_are_compiled_once(strict: GrammarCompiler) -> None:
    grammars = [schema(SCHEMA) for _ in range(8)]
    results = {id(future.result(60)) for future in [strict.submit(grammar) for grammar in grammars]}
    assert len(results) == 1
    first = strict.submit(grammars[0])
    assert not first.cancel()  # it is everybody's
    for i in range(5):  # the cache holds four
        compiled(strict, Grammar(kind="regex", source=f"b{i}"))
    assert compiled(strict, grammars[0]) is not first.result()


def test_a_tokenizer_without_pieces_is_a_clear_error(tmp_path: Path) -> None:
    compiler = GrammarCompiler(Tokenizer(build("wordpiece", tmp_path)), EOS)
    try:
        with pytest.raises(UnsupportedFieldError, match="structured output"):
            compiled(compiler, schema(SCHEMA))
    finally:
        compiler.close()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that a test starts."""
    found: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        found.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def test_close_ends_the_processes_and_whoever_waits(plain: Tokenizer, started: list[subprocess.Popen[bytes]]) -> None:
    compiler = GrammarCompiler(plain, EOS, timeout_s=30)
    compiled(compiler, schema(SCHEMA))
    waiting = [compiler.submit(schema(EXPLODES | {"multipleOf": 99_999_989 + 2 * i})) for i in range(4)]
    compiler.close()
    assert all(future.exception(30) is not None for future in waiting)
    assert started
    for process in started:
        process.wait(30)
    with pytest.raises(DrainingError):
        compiled(compiler, Grammar(kind="regex", source="late"))


def test_a_checker_that_was_killed_is_started_again(
    strict: GrammarCompiler, started: list[subprocess.Popen[bytes]]
) -> None:
    for i in range(3):
        compiled(strict, Grammar(kind="regex", source=f"c{i}"))
        for process in started:
            process.kill()
            process.wait()
    assert len(started) == 3
