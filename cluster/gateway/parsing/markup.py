"""What the parsers share: marks in a text, what could still become one, and names for calls."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable

from cluster.gateway.parsing.json_text import WHITE_SPACE

ALPHANUMERIC = string.ascii_letters + string.digits

NewCallId = Callable[[], str]


def openai_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def mistral_call_id() -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))


def held_length(text: str, mark: str) -> int:
    """How many characters at the end of `text` could still become `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def before_mark(text: str, mark: str) -> tuple[int, int]:
    """Where `text` can be handed on up to, and where `mark` begins (-1: nowhere).

    White space before a mark belongs to it, and what could still become one is held back.
    """
    at = text.find(mark)
    end = len(text) - held_length(text, mark) if at < 0 else at
    return len(text[:end].rstrip(WHITE_SPACE)), at
