"""A reply that thinks before it answers: how long it may, and that only its answer follows a grammar.

The place in it is found again from the tokens alone, so a fork, a rewind and another worker go on exactly.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from cluster.protocol import Thinking
from workers.models.tokenizer import Tokenizer
from workers.sampling.guided import Matcher


class _Place(Enum):
    BEFORE = "before"  # nothing was written that tells whether it will think
    INSIDE = "inside"
    BEHIND = "behind"


class ThinkingMatcher:
    """One sequence's place in its thoughts and, behind them, in its grammar. Used as a `Matcher` is.

    Once `budget` tokens were thought the tokens of the thoughts' end are the only ones allowed, one after the other.
    Beside a grammar EOS is refused while it thinks, and thoughts that the prompt has not opened can be opened by one
    token only: of several it could not be told from the answer.
    """

    def __init__(
        self, thinking: Thinking, answer: Matcher | None, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._thinking = thinking
        self._answer = answer
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._start_ids = tokenizer.encode(thinking.start)
        self._end_ids = tokenizer.encode(thinking.end)
        self._place = _Place.INSIDE if thinking.is_open else _Place.BEFORE
        self._text = b""  # the latest bytes: enough to see the start or the end complete
        self._num_thought = 0
        self._num_forced = 0  # of the end's tokens

    @property
    def is_active(self) -> bool:
        """Whether the next token is constrained at all."""
        return self._answer is not None or self._forced is not None

    @property
    def _forced(self) -> int | None:
        """The one token that may come next; None: any."""
        budget = self._thinking.budget
        if self._place is not _Place.INSIDE or budget is None or self._num_thought < budget:
            return None
        return self._end_ids[self._num_forced]

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the next token's mask into `row` [words] int32, as `Matcher.fill_mask` does."""
        forced = self._forced
        if forced is not None:
            row[:] = 0
            _set(row, forced, True)
        elif self._place is _Place.INSIDE or self._answer is None:
            row[:] = -1
            for token_id in self._eos_token_ids if self._answer is not None else ():
                _set(row, token_id, False)
        else:
            self._answer.fill_mask(row)
            if self._place is _Place.BEFORE and len(self._start_ids) == 1:
                _set(row, self._start_ids[0], True)

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False where the grammar refuses it."""
        if self._place is _Place.INSIDE:
            self._think(token_id)
            return True
        if self._place is _Place.BEFORE:
            self._place = self._begun(token_id)
            if self._place != _Place.BEHIND:
                return True
        return self._answer is None or self._answer.accept(token_id)

    def restarted(self) -> ThinkingMatcher:
        """A new one of the same reply, before its first token."""
        answer = None if self._answer is None else self._answer.restarted()
        return ThinkingMatcher(self._thinking, answer, self._tokenizer, self._eos_token_ids)

    @property
    def is_stopped(self) -> bool:
        """Whether the answer is complete and nothing but EOS can follow."""
        return self._place is not _Place.INSIDE and self._answer is not None and self._answer.is_stopped

    @property
    def error(self) -> str:
        """What went wrong, empty where nothing did."""
        return "" if self._answer is None else self._answer.error

    def _begun(self, token_id: int) -> _Place:
        """Where one of the first tokens leads."""
        if self._answer is not None:
            return _Place.INSIDE if self._start_ids == [token_id] else _Place.BEHIND
        self._text = (self._text + self._tokenizer.token_bytes(token_id)).lstrip()
        start = self._thinking.start.encode()
        if self._text.startswith(start):
            self._text = b""
            return _Place.INSIDE
        return _Place.BEFORE if start.startswith(self._text) else _Place.BEHIND

    def _think(self, token_id: int) -> None:
        if self._forced is not None:
            self._num_forced += 1
        else:
            self._num_thought += 1
        end, added = self._thinking.end.encode(), self._tokenizer.token_bytes(token_id)
        self._text += added
        if end in self._text or self._num_forced == len(self._end_ids):
            self._place = _Place.BEHIND
        self._text = self._text[-len(end) :]


def _set(row: NDArray[np.int32], token_id: int, allowed: bool) -> None:
    """Allow or refuse one token in a mask; without effect where the mask has not got it."""
    word, bit = token_id // 32, np.uint32(1 << token_id % 32)
    if word < len(row):
        bits = row.view(np.uint32)
        bits[word] = bits[word] | bit if allowed else bits[word] & ~bit
