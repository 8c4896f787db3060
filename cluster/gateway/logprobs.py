"""Log probabilities in the shapes of OpenAI's two endpoints and of vLLM's `prompt_logprobs`."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from cluster.gateway.openai import CompletionRequest
from cluster.gateway.submit import Prompt
from cluster.gateway.tokenizer import TextTokenizer
from cluster.protocol import RequestOutput, TokenLogprobs, TopLogprob

LOWEST = -9999.0  # stands for minus infinity, which JSON has not


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST  # a NaN too becomes LOWEST


def _legacy_name(token: bytes) -> str:
    """A token as completions name it: its text, or its bytes where they are no whole characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def chat_logprobs(tokens: Sequence[TokenLogprobs], num_top: int) -> dict[str, Any]:
    """A chat choice's `logprobs`."""
    content = [
        {**_chat_token(item), "top_logprobs": [_chat_token(top) for top in item.top[:num_top]]} for item in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(item: TokenLogprobs | TopLogprob) -> dict[str, Any]:
    return {
        "token": item.token.decode("utf-8", "replace"),
        "logprob": _finite(item.logprob),
        "bytes": list(item.token),
    }


def prompt_logprobs(tokens: Sequence[TokenLogprobs | None], num_top: int) -> list[dict[str, Any] | None]:
    """A choice's `prompt_logprobs`: for each prompt token its own and the likeliest ones by token id, with ranks."""
    return [None if item is None else _by_id(item, num_top) for item in tokens]


def _by_id(item: TokenLogprobs, num_top: int) -> dict[str, Any]:
    ranked: list[tuple[TokenLogprobs | TopLogprob, int]] = [(item, item.rank)]
    ranked += [(top, rank) for rank, top in enumerate(item.top[:num_top], 1)]
    return {
        str(token.token_id): {
            "logprob": _finite(token.logprob),
            "rank": rank,
            "decoded_token": token.token.decode("utf-8", "replace"),
        }
        for token, rank in ranked
    }


class CompletionLogprobs:
    """One completion choice's `logprobs`, made piece by piece; `text_offset` counts the characters of its text."""

    def __init__(self, request: CompletionRequest, tokenizer: TextTokenizer) -> None:
        self._num_top = request.logprobs or 0
        self._skip_special = request.skip_special_tokens
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def piece(self, output: RequestOutput, echoed: Prompt | None) -> dict[str, list[Any]]:
        """The part of one output, behind that of the prompt where it is echoed with it."""
        piece: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if echoed is not None:
            for token_id, item in zip(echoed.ids, output.prompt_logprobs or (), strict=False):
                name = self._tokenizer.decode([token_id], skip_special_tokens=False).encode()
                self._add(piece, token_id, name if item is None else item.token, item)
            self._offset = len(echoed.text)
            self._decoder.reset()
        for item in output.logprobs:
            self._add(piece, item.token_id, item.token, item)
        return piece

    def _add(self, piece: dict[str, list[Any]], token_id: int, token: bytes, item: TokenLogprobs | None) -> None:
        name = _legacy_name(token)
        piece["tokens"].append(name)
        piece["text_offset"].append(self._offset)
        if not (self._skip_special and self._tokenizer.is_special(token_id)):
            self._offset += len(self._decoder.decode(token))
        if item is None:
            piece["token_logprobs"].append(None)
            piece["top_logprobs"].append(None)
            return
        piece["token_logprobs"].append(_finite(item.logprob))
        best = {_legacy_name(top.token): _finite(top.logprob) for top in item.top[: self._num_top]}
        piece["top_logprobs"].append({**best, name: _finite(item.logprob)})
