"""How the served model marks calls and thoughts, and what that makes of one request: its grammar and its parser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from cluster.errors import RequestError, UnsupportedFieldError
from cluster.gateway.chat import ChatTemplate
from cluster.gateway.deltas import Arguments, Delta, DeltaParser, MakeParser, PlainText, Reasoning, ToolCall
from cluster.gateway.openai import ChatCompletionRequest, GenerationRequest
from cluster.gateway.openai_formats import StructuralTag
from cluster.gateway.openai_tools import FunctionDefinition, NamedTool
from cluster.gateway.parsing import think
from cluster.gateway.parsing.hermes import OPEN, HermesFormat
from cluster.gateway.parsing.lark import COMPACT, schema_rule, structural_tag
from cluster.gateway.parsing.mistral import ARGS, CALLS, MistralFormat
from cluster.gateway.settings import ReasoningParser, ToolParser
from cluster.gateway.tokenizer import TextTokenizer
from cluster.protocol import Grammar, Thinking

_OTHER_CALLS = "<function="  # inside <tool_call> too, yet no JSON (Qwen3-Coder)


class ToolFormat(Protocol):
    """One way to write calls."""

    @property
    def marks(self) -> tuple[str, ...]: ...

    def parser(self) -> DeltaParser: ...

    def rules(self, functions: Sequence[FunctionDefinition], tokens: Mapping[str, int], *, many: bool) -> list[str]: ...


@dataclass(frozen=True)
class ReplyFormat:
    """Of a served model. `tools` None: calls are not told from text; `thinks`: thoughts are."""

    tools: ToolFormat | None = None
    thinks: bool = False
    tokens: Mapping[str, int] = field(default_factory=dict)  # that the tokenizer adds to its vocabulary
    special_ids: frozenset[int] = frozenset()

    @classmethod
    def find(
        cls,
        template: ChatTemplate | RequestError,
        tokenizer: TextTokenizer,
        *,
        tool_parser: ToolParser,
        reasoning_parser: ReasoningParser,
    ) -> ReplyFormat:
        """By the operator's word; with "auto" by what the template says, or else has as a token."""
        tokens = tokenizer.added_tokens
        source = template.source + (template.tools_source or "") if isinstance(template, ChatTemplate) else ""
        if tool_parser == "auto":
            tool_parser = _tool_parser(source, tokens)
        if reasoning_parser == "auto":
            reasoning_parser = "think" if think.CLOSE in source or think.CLOSE in tokens else "none"
        tools: ToolFormat | None = None
        if tool_parser == "hermes":
            tools = HermesFormat()
        elif tool_parser == "mistral":
            tools = MistralFormat(is_named=ARGS in source or (ARGS in tokens and CALLS not in source))
        special = frozenset(token_id for token_id in tokens.values() if tokenizer.is_special(token_id))
        return cls(tools, reasoning_parser == "think", tokens, special)

    def check(self, request: GenerationRequest, template: ChatTemplate | RequestError) -> None:
        """Raise `UnsupportedFieldError` for what this model's chats do not have."""
        if not isinstance(request, ChatCompletionRequest) or not isinstance(template, ChatTemplate):
            return
        if request.offered_tools and not template.knows("tools"):
            raise UnsupportedFieldError(
                "tools: this model's chat template knows no tools; serve a checkpoint whose template does, or leave "
                "tools out",
                param="tools",
            )
        if request.offered_tools and self.tools is None:
            raise UnsupportedFieldError(
                "tools: this server does not know how its model writes calls; whoever runs it can set tool_parser to "
                "hermes or mistral",
                param="tools",
            )
        if request.thinking_token_budget is not None and not self.thinks:
            raise UnsupportedFieldError(
                "thinking_token_budget: this model does not think as far as the server knows; whoever runs it can set "
                "reasoning_parser to think",
                param="thinking_token_budget",
            )
        if request.reasoning_effort is not None and not (
            self.thinks or template.knows("reasoning_effort") or template.knows("enable_thinking")
        ):
            raise UnsupportedFieldError(
                "reasoning_effort: this model's chat template has nothing to do with it; leave it out",
                param="reasoning_effort",
            )

    def of(self, request: GenerationRequest, chat_text: str | None) -> ReplyShape:
        """What one request's replies must be like; `chat_text` is a chat's rendered prompt."""
        answer = request.answer_format
        field_name, grammar = "response_format", None
        if answer is not None:
            field_name, found = answer
            if isinstance(found, StructuralTag):
                source = structural_tag(found.structures, found.triggers, self.tokens)
                grammar = Grammar(kind="lark", source=source)
            else:
                grammar = found
        if not isinstance(request, ChatCompletionRequest) or chat_text is None:
            return ReplyShape(grammar, grammar_field=field_name)
        tools = self.tools if request.offered_tools else None
        if tools is not None and (request.must_call or grammar is not None):
            grammar = self._calls(tools, request, grammar)
            field_name = "tools" if request.must_call else field_name
        thinks, is_open = self._thoughts(request, chat_text)
        thinking = None
        if thinks and (grammar is not None or request.thinking_token_budget is not None):
            thinking = Thinking(
                start=think.OPEN, end=think.CLOSE, is_open=is_open, budget=request.thinking_token_budget
            )
        marks = [*(tools.marks if tools is not None else ()), *((think.OPEN, think.CLOSE) if thinks else ())]
        ids = (self.tokens.get(mark) for mark in marks)
        return ReplyShape(
            grammar,
            thinking,
            tuple(token_id for token_id in ids if token_id is not None and token_id in self.special_ids),
            field_name,
            _make_parser(request, tools.parser if tools is not None else PlainText, thinks=thinks, is_open=is_open),
        )

    def _thoughts(self, request: ChatCompletionRequest, chat_text: str) -> tuple[bool, bool]:
        """Whether a reply may have thoughts, and whether its prompt has opened them."""
        if not self.thinks:
            return False, False
        if request.continue_final_message:
            final = request.messages[-1].content or ""
            opened, closed = final.rfind(think.OPEN), final.rfind(think.CLOSE)
            return closed < 0, opened > closed
        end = chat_text.rstrip()
        return not end.endswith(think.CLOSE), end.endswith(think.OPEN)

    def _calls(self, tools: ToolFormat, request: ChatCompletionRequest, answer: Grammar | None) -> Grammar:
        """Calls; where none must be made, an answer of its form instead."""
        functions = [tool.function for tool in request.offered_tools]
        if isinstance(request.tool_choice, NamedTool):
            functions = [function for function in functions if function.name == request.tool_choice.name]
        many = request.parallel_tool_calls and not isinstance(request.tool_choice, NamedTool)
        rules = ["%llguidance {}", "start: calls", *tools.rules(functions, self.tokens, many=many)]
        if answer is not None:
            schema = {"type": "object"} if answer.kind == "json_object" else orjson.loads(answer.source)
            rules[1] = "start: calls | answer"
            rules.append(f"answer: {schema_rule(schema, COMPACT)}")
        return Grammar(kind="lark", source="\n".join(rules) + "\n")


@dataclass(frozen=True)
class ReplyShape:
    """What one request's replies must be like, and how they are read."""

    grammar: Grammar | None = None
    thinking: Thinking | None = None
    shown_special_ids: tuple[int, ...] = ()
    grammar_field: str = "response_format"  # of the request: where the grammar comes from
    make_parser: MakeParser = PlainText


def _tool_parser(source: str, tokens: Mapping[str, int]) -> ToolParser:
    for places in (source, tokens):
        if CALLS in places:
            return "mistral"
        if OPEN in places:
            return "none" if _OTHER_CALLS in source else "hermes"
    return "none"


def _make_parser(
    request: ChatCompletionRequest, answer: Callable[[], DeltaParser], *, thinks: bool, is_open: bool
) -> MakeParser:
    def make() -> DeltaParser:
        parser = answer()
        if not request.parallel_tool_calls:
            parser = _FirstCall(parser)
        if thinks:
            parser = think.ThinkParser(parser, is_open=is_open)
        return parser if request.include_reasoning else _WithoutReasoning(parser)

    return make


class _FirstCall:
    """Leaves out every call but the first."""

    def __init__(self, parser: DeltaParser) -> None:
        self._parser = parser

    def feed(self, text: str) -> list[Delta]:
        return self._kept(self._parser.feed(text))

    def finish(self) -> list[Delta]:
        return self._kept(self._parser.finish())

    def _kept(self, deltas: list[Delta]) -> list[Delta]:
        return [delta for delta in deltas if not isinstance(delta, ToolCall | Arguments) or delta.index == 0]


class _WithoutReasoning:
    """Leaves the thoughts out."""

    def __init__(self, parser: DeltaParser) -> None:
        self._parser = parser

    def feed(self, text: str) -> list[Delta]:
        return self._kept(self._parser.feed(text))

    def finish(self) -> list[Delta]:
        return self._kept(self._parser.finish())

    def _kept(self, deltas: list[Delta]) -> list[Delta]:
        return [delta for delta in deltas if not isinstance(delta, Reasoning)]
