"""`POST /tokenize` and `/detokenize`, as vLLM has them, also under `/v1`, where SGLang has them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from cluster.errors import InvalidValueError
from cluster.gateway.fields import HONOURED, RequestModel, invalid, unsupported, validate
from cluster.gateway.limits import parse_object
from cluster.gateway.openai import MAX_MESSAGES, ChatCompletionRequest, ChatMessage, TokenId
from cluster.gateway.openai_tools import Tools
from cluster.gateway.replies import JSONBytes
from cluster.gateway.service import Gateway, Work, gateway_of

MAX_CHARS = 2**20  # of a text: what is told of it holds some hundred times as many bytes

router = APIRouter()


class TokenizeRequest(RequestModel):
    """`POST /tokenize`: of a text, or of a chat."""

    model: Annotated[str | None, HONOURED] = None
    prompt: Annotated[str | None, HONOURED] = None
    messages: Annotated[list[ChatMessage] | None, HONOURED, Field(min_length=1, max_length=MAX_MESSAGES)] = None
    add_special_tokens: Annotated[bool | None, HONOURED] = None  # None: to a prompt; a chat's template has them
    return_token_strs: Annotated[bool, HONOURED] = False
    add_generation_prompt: Annotated[bool | None, HONOURED] = None  # None: unless the final message is continued
    continue_final_message: Annotated[bool, HONOURED] = False
    chat_template_kwargs: Annotated[dict[str, Any], HONOURED] = {}
    tools: Annotated[Tools, HONOURED] = []
    chat_template: Annotated[Any, unsupported(note="the checkpoint's template is used")] = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("is required, or messages: one of the two", field="prompt")
        if self.prompt is not None:
            of_chats = {"add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"}
            if given := of_chats & self.model_fields_set:
                raise invalid("belongs to messages", field=min(given))
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid("cannot be with add_generation_prompt: true", field="continue_final_message")
        return self

    def chat(self) -> ChatCompletionRequest | None:
        """The chat that is asked about; None: a text is."""
        if self.messages is None:
            return None
        return ChatCompletionRequest(
            messages=self.messages,
            tools=self.tools,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model: Annotated[str | None, HONOURED] = None
    tokens: Annotated[list[TokenId], HONOURED]  # as many as a body has room for


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a chat's prompt."""
    gateway = gateway_of(request)

    async def tell_tokens(work: Work[TokenizeRequest]) -> Response:
        return JSONBytes(await _tokenize(gateway, work.asked))

    return await gateway.answer(request, lambda body: validate(TokenizeRequest, parse_object(body)), tell_tokens)


async def _tokenize(gateway: Gateway, asked: TokenizeRequest) -> dict[str, Any]:
    gateway.check_model(asked.model)
    chat = asked.chat()
    if chat is not None:
        gateway.reply_format.check(chat, gateway.template)
    text = asked.prompt or "" if chat is None else await gateway.render(chat)
    special = (chat is None) if asked.add_special_tokens is None else asked.add_special_tokens
    if len(text) > MAX_CHARS:
        field = "prompt" if chat is None else "messages"
        raise InvalidValueError(f"{field}: at most {MAX_CHARS} characters, these are {len(text)}", param=field)
    tokenizer, hello = gateway.tokenizer, gateway.pool.hello

    def told() -> dict[str, Any]:
        ids = tokenizer.encode(text, special_tokens=special)
        return {
            "count": len(ids),
            "max_model_len": None if hello is None else hello.max_model_len,
            "tokens": ids,
            "token_strs": [tokenizer.token(token_id) for token_id in ids] if asked.return_token_strs else None,
        }

    return await gateway.with_text(len(text), told)


@router.post("/detokenize")
@router.post("/v1/detokenize")
async def detokenize(request: Request) -> Response:
    """The text that tokens stand for, special ones among them."""
    gateway = gateway_of(request)

    async def tell_text(work: Work[DetokenizeRequest]) -> Response:
        gateway.check_model(work.asked.model)
        ids, tokenizer = work.asked.tokens, gateway.tokenizer

        def text() -> str:
            unknown = next((token_id for token_id in ids if tokenizer.token(token_id) is None), None)
            if unknown is not None:
                raise InvalidValueError(f"tokens: {unknown} is no token of this model", param="tokens")
            return tokenizer.decode(ids, skip_special_tokens=False)

        return JSONBytes({"prompt": await gateway.with_text(len(ids), text)})

    return await gateway.answer(request, lambda body: validate(DetokenizeRequest, parse_object(body)), tell_text)
