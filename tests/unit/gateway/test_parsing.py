"""The parsers of replies: however a text is cut into pieces, the same comes of it, and nothing of it is lost."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.deltas import Arguments, Content, DeltaParser, FullToolCall, PlainText, Reasoning, Reply, ToolCall
from cluster.gateway.deltas import gather as gather_whole
from cluster.gateway.parsing.hermes import HermesParser
from cluster.gateway.parsing.json_text import JSONScanner, is_object
from cluster.gateway.parsing.markup import mistral_call_id, openai_call_id
from cluster.gateway.parsing.mistral import MistralParser
from cluster.gateway.parsing.think import ThinkParser

MakeParser = Callable[[], DeltaParser]


def hermes() -> DeltaParser:
    return HermesParser(lambda: "id")


def mistral() -> DeltaParser:
    return MistralParser(lambda: "id")


def thinking(is_open: bool) -> MakeParser:
    return lambda: ThinkParser(hermes(), is_open=is_open)


PARSERS = {
    "hermes": hermes,
    "mistral": mistral,
    "think": thinking(False),
    "think-open": thinking(True),
}
# what a model may write, with what the marks begin with and what JSON is made of
FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[TOOL", "[ARGS]", "[CALL_ID]",
    "<think>", "</think>", "</th",
    '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {}}', '{"arguments": {"x": "}"}, "name": "g"}',
    '{"name": "h"}', '{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": 1, "arguments": {}}', '{"name": "f"',
    ', "arguments": ', '{"a": [1, {"b": "</tool_call>"}]}', "f", "name", "{", "}", "[", "]", ",", '"', "\\", "1",
    " ", "\n", "Hello wörld 🦀", "x < y",
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


def fed(parser: DeltaParser, pieces: list[str]) -> Reply:
    reply = Reply()
    for delta in [found for piece in pieces for found in parser.feed(piece)] + parser.finish():
        assert delta.name if isinstance(delta, ToolCall) else delta.text, "no empty pieces"
        reply.add(delta)
    return reply


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=250, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(0, 200), max_size=20))
def test_any_split_gives_the_same(name: str, text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    whole = fed(PARSERS[name](), [text])
    assert fed(PARSERS[name](), pieces) == whole
    assert fed(PARSERS[name](), list(text)) == whole


MARKS = re.compile(r"</?tool_call>|\[TOOL_CALLS\]|\[ARGS\]|</?think>")


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=250, deadline=None)
@given(text=texts)
def test_nothing_is_lost(name: str, text: str) -> None:
    """Each letter and digit of it comes out, or was the markup of a call that did."""
    reply = fed(PARSERS[name](), [text])
    kept = reply.reasoning + reply.content + "".join(call.name + call.arguments for call in reply.calls)
    markup = "namearguments" * len(reply.calls)
    for character in "Hfghwörldxy1🦀b<":
        lost = text.count(character) - (kept + markup).count(character)
        unmarked = MARKS.sub("", text).count(character)
        assert lost <= text.count(character) - unmarked + text.count("</th") + text.count("<tool") + text.count(
            "name"
        ) + text.count("[CALL_ID]"), (character, reply)
    if not reply.calls and name in ("hermes", "mistral"):
        assert reply.content == text


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_a_text_without_marks_is_content(name: str, text: str) -> None:
    reply = fed(PARSERS[name](), list(text))
    if name == "think-open":
        assert (reply.reasoning, reply.content) == (text.strip(" \t\n\r"), "")
    else:
        assert reply == Reply(content=text)


CALL = FullToolCall("id", "f", '{"a": 1}')
CASES: list[tuple[MakeParser, str, Reply]] = [
    (hermes, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', Reply(calls=[CALL])),
    (hermes, 'So:\n<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>\n', Reply(content="So:", calls=[CALL])),
    (hermes, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', Reply(calls=[CALL])),
    (hermes, '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', Reply(calls=[CALL])),
    (hermes, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', Reply(calls=[CALL])),
    (hermes, '<tool_call>{"name": "f"}</tool_call>', Reply(calls=[FullToolCall("id", "f", "{}")])),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> y', Reply(content="y", calls=[CALL])),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}}', Reply(calls=[CALL])),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a"', Reply(calls=[FullToolCall("id", "f", '{"a"')])),
    (hermes, "Write <tool_call> and <b>", Reply(content="Write <tool_call> and <b>")),
    (hermes, '<tool_call>{"name": 1}</tool_call>', Reply(content='<tool_call>{"name": 1}</tool_call>')),
    (hermes, '<tool_call>{"name": "f", "argum', Reply(content='<tool_call>{"name": "f", "argum')),
    (mistral, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', Reply(calls=[CALL])),
    (mistral, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', Reply(calls=[CALL])),
    (
        mistral,
        '[TOOL_CALLS] [{"name":"f","arguments":{"a": 1}},{"name":"f","arguments":{"a": 1}}]',
        Reply(calls=[CALL] * 2),
    ),
    (mistral, 'So: [TOOL_CALLS]f[ARGS]{"a": 1}', Reply(content="So:", calls=[CALL])),
    (mistral, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": 1}', Reply(calls=[CALL] * 2)),
    (mistral, '[TOOL_CALLS]f{"a": 1} y', Reply(content="y", calls=[CALL])),
    (mistral, "[TOOL_CALLS] no", Reply(content="[TOOL_CALLS] no")),
    (mistral, "[TOOL_CALLS] []", Reply(content="[TOOL_CALLS] []")),
    (thinking(False), "<think>\nHm.\n</think>\n\nYes.", Reply(reasoning="Hm.", content="Yes.")),
    (thinking(True), "Hm </thin\n</think>Yes.", Reply(reasoning="Hm </thin", content="Yes.")),
    (thinking(True), "Hm.", Reply(reasoning="Hm.")),
    (thinking(False), " Yes </think>.", Reply(content=" Yes </think>.")),
    (thinking(False), "<think></think>Yes.", Reply(content="Yes.")),
    (
        thinking(True),
        'Hm.</think><tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
        Reply(reasoning="Hm.", calls=[CALL]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("parser", "text", "reply"), CASES)
def test_what_comes_of_a_text(parser: MakeParser, text: str, reply: Reply) -> None:
    assert gather_whole(parser(), text) == reply


def test_only_what_could_be_markup_is_held_back() -> None:
    parser = hermes()
    assert parser.feed("Hello") == [Content("Hello")]
    assert parser.feed(" <") == []
    assert parser.feed("b> a") == [Content(" <b> a")]
    assert parser.feed("\n<tool_call>") == []
    assert parser.feed('\n{"name": "f", "argum') == []
    assert parser.feed('ents": {') == [ToolCall(0, "id", "f"), Arguments(0, "{")]
    assert parser.feed('"a": "</tool') == [Arguments(0, '"a": "</tool')]
    assert parser.feed('_call>"}') == [Arguments(0, '_call>"}')]
    assert parser.feed("}\n</tool_call>") == []
    assert parser.finish() == []

    split = ThinkParser(PlainText(), is_open=True)
    assert split.feed("Hm") == [Reasoning("Hm")]
    assert split.feed(" </") == []
    assert split.feed("b") == [Reasoning(" </b")]
    assert split.feed("</think>") == []
    assert split.feed("\n\nYes") == [Content("Yes")]
    assert split.feed("\n") == [Content("\n")]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=st.dictionaries(st.text(), json_values, max_size=5), indent=st.sampled_from([None, 1]))
def test_json_is_followed_to_its_end(value: dict[str, object], indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    scanner = JSONScanner()
    for place, character in enumerate(text):
        assert not scanner.is_done
        assert scanner.push(character), text[: place + 1]
    assert scanner.is_done
    assert not scanner.push(" ")
    assert is_object(f" {text}\n")
    assert not is_object(text[:-1])
    reply = gather_whole(hermes(), f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>')
    assert reply == Reply(calls=[FullToolCall("id", "f", text)])


def test_what_is_no_json_is_noticed_where_it_goes_wrong() -> None:
    for text in ('{"a" 1', '{"a": 1 2', "{1", '{"a": 1,}', "{,", '{"a": ]', "[1 2", "[1}", "[,", '{"a": }'):
        scanner = JSONScanner()
        assert all(map(scanner.push, text[:-1])), text
        assert not scanner.push(text[-1]), text


def test_depth_costs_no_recursion() -> None:
    deep = '{"a": ' * 50_000
    reply = gather_whole(hermes(), f'<tool_call>{{"name": "f", "arguments": {deep}')
    assert reply.calls == [FullToolCall("id", "f", deep)]


def test_ids_are_unique_and_of_their_forms() -> None:
    ids = {openai_call_id() for _ in range(100)} | {mistral_call_id() for _ in range(100)}
    assert len(ids) == 200
    assert all(re.fullmatch(r"call_[0-9a-f]{24}|[A-Za-z0-9]{9}", call_id) for call_id in ids)
