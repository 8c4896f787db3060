"""What a request may ask its answer to match, as the worker is told it and as llguidance reads it."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from tokenizers import AddedToken, Tokenizer

from cluster.gateway.chat import ChatTemplate
from cluster.gateway.fields import validate
from cluster.gateway.openai import ChatCompletionRequest
from cluster.gateway.openai_formats import StructuralTag
from cluster.gateway.parsing.lark import literal, structural_tag
from cluster.gateway.parsing.reply_format import ReplyFormat
from cluster.gateway.tokenizer import TextTokenizer
from cluster.protocol import Finish, Grammar, RequestOutput
from tests.support.chat_templates import MISTRAL_LIKE, MISTRAL_NAMED, QWEN_LIKE
from tests.support.scripted_worker import END_ID, ScriptedWorker, byte_tokenizer
from tests.unit.gateway.conftest import Served

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ASKED: list[tuple[dict[str, Any], Grammar]] = [
    ({"structured_outputs": {"json": SCHEMA}}, Grammar(kind="json_schema", source=json.dumps(SCHEMA))),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar(kind="json_schema", source=json.dumps(SCHEMA))),
    ({"structured_outputs": {"json_object": True}}, Grammar(kind="json_object", source="")),
    ({"structured_outputs": {"regex": "a+"}}, Grammar(kind="regex", source="a+")),
    ({"structured_outputs": {"choice": ["a", "ö"]}}, Grammar(kind="choice", source='["a","ö"]')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar(kind="lark", source='start: "a"')),
    ({"guided_json": SCHEMA}, Grammar(kind="json_schema", source=json.dumps(SCHEMA))),
    ({"guided_regex": "a+"}, Grammar(kind="regex", source="a+")),
    ({"guided_choice": ["a"]}, Grammar(kind="choice", source='["a"]')),
    ({"guided_grammar": 'start: "a"'}, Grammar(kind="lark", source='start: "a"')),
    ({"response_format": {"type": "json_object"}}, Grammar(kind="json_object", source="")),
]


@pytest.mark.anyio
async def test_each_name_reaches_the_worker(served: Served, worker: ScriptedWorker) -> None:
    for fields, grammar in ASKED:
        for ask in (served.complete, served.chat):
            assert (await ask(**fields)).status_code == 200, fields
            told = worker.submits[-1].sampling.grammar
            assert told is not None
            assert told.kind == grammar.kind
            source = told.source if told.kind != "json_schema" else json.dumps(json.loads(told.source))
            assert source == grammar.source


@pytest.mark.anyio
async def test_a_refusal_names_the_field_that_asked(served: Served, worker: ScriptedWorker) -> None:
    finish = Finish(reason="error", error_code="invalid_grammar", error_message="no")
    worker.raw = lambda submit: [RequestOutput(request_id=submit.request_id, index=0, finish=finish)]
    for fields in ({"structured_outputs": {"grammar": "root ::= a"}}, {"guided_regex": "("}, {"response_format": TAG}):
        response = await served.complete(**fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "invalid_grammar", next(iter(fields)))


TAG = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=one>", "schema": SCHEMA, "end": "</f>"},
        {"begin": "<f=two>", "schema": {"type": "array"}, "end": "</f>"},
        {"begin": "<call>\n", "schema": {"type": "integer"}, "end": "\n</call>"},
    ],
    "triggers": ["<f=", "<call>"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Every byte is a token, and so are some marks."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<call>", "<tool_call>", "</tool_call>")])
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in ("[TOOL_CALLS]", "[ARGS]")])
    return tokenizer


def follows(tokenizer: Tokenizer, lark: str, text: str) -> tuple[bool, bool]:
    """Whether a grammar takes all of a text, and whether it may end there."""
    vocabulary = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=[END_ID])
    matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids), matcher.is_accepting()


def test_structural_tags(tokenizer: Tokenizer) -> None:
    tag = validate(StructuralTag, TAG)
    lark = structural_tag(tag.structures, tag.triggers, {"<call>": tokenizer.token_to_id("<call>")})
    for text in (
        "just text with < and <f",
        'So <f=one>{"a":1}</f> and <f=two>[1,"b"]</f>.',
        "<call>\n12\n</call> then <call>\n3\n</call>",
        "",
    ):
        assert follows(tokenizer, lark, text) == (True, True), text
    for text in ("<f=three>", "<f=one>{}", "<f=two>{", "<call>12"):
        assert not follows(tokenizer, lark, text)[0], text
    assert follows(tokenizer, lark, '<f=one>{"a":1}') == (True, False)


def test_a_literal_asks_for_marks_by_their_ids() -> None:
    assert literal('a"<b>\n', {"<b>": 7, "</b>": 8}) == '"a\\"" <[7]> "\\n"'
    assert literal("a", {}) == '"a"'
    assert literal("", {"<b>": 7}) == ""


WEATHER = {"name": "weather", "parameters": {"properties": {"place": {"type": "string"}}, "required": ["place"]}}
CLOCK = {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}}
ULM = '{"place": "Ulm"}'
NAMED = {"type": "function", "function": {"name": "clock"}}
FORMS = {  # a template: a call of weather, one of clock, and how two of them are written
    "hermes": (
        QWEN_LIKE,
        f'<tool_call>\n{{"name": "weather", "arguments": {ULM}}}\n</tool_call>',
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        "%s\n%s",
    ),
    "mistral-array": (
        MISTRAL_LIKE,
        f'{{"name": "weather", "arguments": {ULM}}}',
        '{"name": "clock", "arguments": {}}',
        "[TOOL_CALLS] [%s, %s]",
    ),
    "mistral-named": (MISTRAL_NAMED, f"[TOOL_CALLS]weather[ARGS]{ULM}", "[TOOL_CALLS]clock[ARGS]{}", "%s%s"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("marked", [True, False], ids=["marks are tokens", "marks are text"])
def test_the_grammar_of_calls(tokenizer: Tokenizer, form: str, marked: bool) -> None:
    template, weather, clock, two = FORMS[form]
    one = two.replace(", %s", "").replace("\n%s", "").replace("%s%s", "%s")
    tokens = tokenizer if marked else byte_tokenizer()
    reply_format = ReplyFormat.find(
        ChatTemplate(template, {}), TextTokenizer(tokens), tool_parser="auto", reasoning_parser="none"
    )

    def grammar(**fields: Any) -> str:
        tools = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools} | fields
        shape = reply_format.of(validate(ChatCompletionRequest, body), "Hi")
        assert shape.grammar is not None
        special = [tokens.token_to_id(mark) for mark in ("[TOOL_CALLS]", "[ARGS]")]
        if form.startswith("mistral") and marked:
            assert list(shape.shown_special_ids) == special, "the parser sees them"
        else:
            assert shape.shown_special_ids == ()
        return shape.grammar.source

    required = grammar(tool_choice="required")
    assert follows(tokens, required, one % weather) == (True, True)
    assert follows(tokens, required, two % (weather, clock)) == (True, True)
    for text in ("Well", " ", one % weather.replace("weather", "other"), one % weather.replace("place", "where")):
        assert not follows(tokens, required, text)[0], text
    single = grammar(tool_choice="required", parallel_tool_calls=False)
    assert follows(tokens, single, one % clock) == (True, True)
    assert not follows(tokens, single, two % (weather, clock))[0]
    named = grammar(tool_choice=NAMED)
    assert follows(tokens, named, one % clock) == (True, True)
    assert not follows(tokens, named, one % weather)[0]
    assert not follows(tokens, named, one % clock.replace("{}", '{"a": 1}'))[0]
    either = grammar(response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}})
    assert follows(tokens, either, one % weather) == (True, True)
    assert follows(tokens, either, '{"a":1}') == (True, True)
    assert not follows(tokens, either, "Well")[0]


def test_a_tools_schema_cannot_set_the_compilers_options(tokenizer: Tokenizer) -> None:
    loose = WEATHER | {"parameters": {"x-guidance": {"whitespace_flexible": True}}}
    reply_format = ReplyFormat.find(
        ChatTemplate(QWEN_LIKE, {}), TextTokenizer(byte_tokenizer()), tool_parser="auto", reasoning_parser="none"
    )
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": loose}],
        "tool_choice": "required",
    }
    shape = reply_format.of(validate(ChatCompletionRequest, body), "Hi")
    assert shape.grammar is not None
    text = '<tool_call>\n{"name": "weather", "arguments": {%s}}\n</tool_call>'
    assert follows(byte_tokenizer(), shape.grammar.source, text % "") == (True, True)
    assert not follows(byte_tokenizer(), shape.grammar.source, text % "   ")[0]


TOKENS = {"hermes": {"<tool_call>"}, "mistral": {"[TOOL_CALLS]"}}


@pytest.mark.parametrize("family", TOKENS)
def test_a_template_that_is_silent_leaves_it_to_the_tokens(family: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in TOKENS[family]])
    found = ReplyFormat.find(
        ChatTemplate("{{ tools }}", {}), TextTokenizer(tokenizer), tool_parser="auto", reasoning_parser="auto"
    )
    assert type(found.tools).__name__.lower() == f"{family}format"
    assert not found.thinks


@pytest.mark.anyio
async def test_prompts_are_truncated(served: Served, worker: ScriptedWorker) -> None:
    long = "abc" * 400
    cases: list[tuple[dict[str, Any], str]] = [
        ({"truncate_prompt_tokens": 5}, "bcabc"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, "abcab"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 10}, long[-502:]),
        ({"truncate_prompt_tokens": 2**31 - 1, "prompt": "abc"}, "abc"),
    ]
    for fields, kept in cases:
        body = {"prompt": long, "max_tokens": 1, "add_special_tokens": False, "echo": True} | fields
        response = await served.complete(**body)
        assert response.status_code == 200, response.text
        assert bytes(worker.submits[-1].prompt_ids).decode() == kept
        assert response.json()["choices"][0]["text"].startswith(kept)
    await served.chat(truncate_prompt_tokens=-1, messages=[{"role": "user", "content": long}], max_tokens=100)
    assert len(worker.submits[-1].prompt_ids) == 412
    refused = await served.complete(prompt=long, truncate_prompt_tokens=600)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
