"""Chat templates: a checkpoint's Jinja source, rendered by the rules of transformers' `apply_chat_template`.

The environment is Jinja's immutable sandbox (trim_blocks, lstrip_blocks, loop controls, `tojson` without HTML
escapes, `raise_exception`, `strftime_now`, the `generation` tag). A rendering is bounded in time and size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import CheckpointError, ForetokenError, InvalidValueError, RequestError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # the trailing space shows whether the template trims its messages


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own class attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a deadline at each call that a template makes (a long loop needs `range` or a macro)."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (as jinja2 does)
        deadline = __context.get("_deadline")
        if deadline is not None and time.monotonic() > deadline:
            raise _OutOfBoundsError
        return super().call(__context, __obj, *args, **kwargs)


class _OutOfBoundsError(Exception):
    pass


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template. Thread-safe, not for the event loop: a rendering may take `timeout_s`."""

    source: str
    special_tokens: dict[str, str]
    timeout_s: float = 5.0
    max_chars: int = 8 * 2**20
    tools_source: str | None = None  # a template of its own for chats with tools
    _template: jinja2.Template = field(init=False, repr=False, compare=False)
    _tools_template: jinja2.Template = field(init=False, repr=False, compare=False)
    _variables: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        environment = _environment()
        sources = [self.source] if self.tools_source is None else [self.source, self.tools_source]
        try:
            templates = [environment.from_string(source) for source in sources]
            variables = [jinja2.meta.find_undeclared_variables(environment.parse(source)) for source in sources]
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template cannot be compiled: {error}") from error
        object.__setattr__(self, "_template", templates[0])
        object.__setattr__(self, "_tools_template", templates[-1])
        object.__setattr__(self, "_variables", frozenset().union(*variables))

    def knows(self, variable: str) -> bool:
        """Whether a variable can have any effect."""
        return variable in self._variables

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt's text. `variables` are the caller's `chat_template_kwargs`, `tools` as transformers has them.

        Raises `InvalidValueError` where the template refuses the messages, or is too slow or too long with them.
        """
        variables = variables or {}
        reserved = sorted(RESERVED & variables.keys())
        if reserved:
            raise InvalidValueError(f"chat_template_kwargs may not set {reserved[0]}", param="chat_template_kwargs")
        if continue_final_message:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _CONTINUE_TAG}]
        source = self.source if tools is None or self.tools_source is None else self.tools_source
        if "developer" not in source:  # templates older than the role know it as the system's
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        text = self._run(
            self._template if tools is None else self._tools_template,
            {
                **self.special_tokens,
                **variables,
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                "_deadline": time.monotonic() + self.timeout_s,
            },
        )
        return _cut_at_tag(text) if continue_final_message else text

    def _run(self, template: jinja2.Template, context: dict[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in template.generate(context):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > self.max_chars or time.monotonic() > context["_deadline"]:
                    raise _OutOfBoundsError
        except _OutOfBoundsError:
            raise InvalidValueError(
                f"the chat template needs more than {self.timeout_s:g} s or {self.max_chars} characters for these "
                "messages: send fewer or shorter ones",
                param="messages",
            ) from None
        except ForetokenError:
            raise
        except jinja2.TemplateError as error:
            raise InvalidValueError(f"the chat template refuses these messages: {error}", param="messages") from None
        except Exception as error:  # a template can raise anything that Python's operators can
            raise InvalidValueError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
            ) from None
        return "".join(pieces)


def _cut_at_tag(text: str) -> str:
    at = text.rfind(_CONTINUE_TAG.strip())
    if at < 0:
        raise InvalidValueError(
            "the chat template drops the final message, so it cannot be continued", param="continue_final_message"
        )
    kept = text[:at]
    return kept if text[at : at + len(_CONTINUE_TAG)] == _CONTINUE_TAG else kept.rstrip()


def load_template(model_path: Path, *, timeout_s: float, max_chars: int) -> ChatTemplate | RequestError:
    """The checkpoint's default template, or the reason why there is none, for whoever asks for a chat.

    Read from `chat_template.jinja`, else from `chat_template` in `tokenizer_config.json`: a string, or a list of named
    ones, where "tool_use" is for chats with tools, as in transformers. Raises `CheckpointError` where that file is no
    JSON object.
    """
    config = _read_object(model_path / "tokenizer_config.json")
    special = _special_tokens({**_read_object(model_path / "special_tokens_map.json"), **config})
    source, tools_source = config.get("chat_template"), None
    jinja_file = model_path / "chat_template.jinja"
    if jinja_file.is_file():
        source = jinja_file.read_text(encoding="utf-8")
    if isinstance(source, list):
        named = {item["name"]: item["template"] for item in source if isinstance(item, dict) and "name" in item}
        source = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        tools_source = named.get("tool_use")
    if not isinstance(source, str):
        return RequestError("this model's tokenizer has no chat template, so it takes no chats; use /v1/completions")
    try:
        return ChatTemplate(
            source,
            special,
            timeout_s=timeout_s,
            max_chars=max_chars,
            tools_source=tools_source if isinstance(tools_source, str) else None,
        )
    except CheckpointError as error:
        return RequestError(f"{error.message}; use /v1/completions")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    values = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
