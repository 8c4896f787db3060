"""What a request asks its output to match, as llguidance's grammar; checked as far as that is cheap and safe."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import llguidance

from cluster.errors import GrammarError
from cluster.protocol import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_NESTING = 100
MAX_MESSAGE = 500  # characters of the library's own words in an error
JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
}

_BRACKETS = re.compile(r'"(?:\\.|[^"\\])*"|[][{}]', re.DOTALL)


def source_of(grammar: Grammar, max_bytes: int) -> str:
    """A request's grammar in llguidance's form. Raises `GrammarError`."""
    text = grammar.source
    if grammar.kind == "json_object":
        text = '{"type":"object"}'
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    if num_bytes > max_bytes:
        raise refused(grammar, f"it has {num_bytes} bytes, the limit is {max_bytes}")
    is_json = grammar.kind in ("json_schema", "choice")
    if is_json and _is_deep(text):
        raise refused(grammar, f"it nests more than {MAX_NESTING} levels deep")
    try:
        if grammar.kind in ("json_object", "json_schema"):
            schema = json.loads(text)
            if not isinstance(schema, dict | bool):
                raise refused(grammar, "a JSON schema is an object")
            if isinstance(schema, dict):
                schema.pop("x-guidance", None)  # compiler options are not the request's to set
            return str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS))
        if grammar.kind == "regex":
            return str(llguidance.LLMatcher.grammar_from_regex(text))
        if grammar.kind == "choice":
            return str(llguidance.LLMatcher.grammar_from_lark(_choices(grammar, json.loads(text))))
        return str(llguidance.LLMatcher.grammar_from_lark(text))
    except ValueError as error:  # json.JSONDecodeError is one
        raise refused(grammar, str(error)) from error


def _choices(grammar: Grammar, choices: object) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise refused(grammar, "choices are a list of at least one string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _is_deep(text: str) -> bool:
    """Whether a JSON text's brackets nest beyond `MAX_NESTING`; found without recursion, and without reading on."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        bracket = found.group()
        depth += (bracket in "[{") - (bracket in "]}")
        if depth > MAX_NESTING:
            return True
    return False


def refused(grammar: Grammar, reason: str) -> GrammarError:
    is_json = grammar.kind in ("json_object", "json_schema")
    return GrammarError(
        f"the {grammar.kind} grammar cannot be used: {shorten(reason)}",
        param="response_format" if is_json else "grammar",
    )


def shorten(text: str) -> str:
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"
