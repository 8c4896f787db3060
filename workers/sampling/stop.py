"""When a sequence ends, and which of its text may be shown before that is known.

A stop string is looked for as if the text came one character at a time, so the result does not depend on how the text
is cut into tokens: of several stop strings the one that is complete first wins, and of those complete at the same
character the longest. Text that could still become a stop string is held back.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.protocol import Finish, Stopping
from workers.models.tokenizer import Detokenizer


class _Pattern:
    """One stop string and its failure table (Knuth, Morris, Pratt 1977): each character costs O(1) amortised."""

    __slots__ = ("failure", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.failure = [0] * (len(text) + 1)  # length of the longest proper prefix that ends text[:i]
        matched = 0
        for i in range(1, len(text)):
            while matched and text[i] != text[matched]:
                matched = self.failure[matched]
            matched += text[i] == text[matched]
            self.failure[i + 1] = matched

    def step(self, matched: int, character: str) -> int:
        """The matched length after `character`."""
        if matched == len(self.text):
            matched = self.failure[matched]
        while matched and character != self.text[matched]:
            matched = self.failure[matched]
        return matched + (character == self.text[matched])


class StopChecker:
    """Follows one sequence's generated tokens, in their order.

    Ends at an EOS token (its text is not shown), a stop token id (its text is shown only with `include_stop`), a stop
    string (cut off, or kept with `include_stop`), or `max_tokens`. None of the first three counts before `min_tokens`.
    `num_tokens` is the number of generated tokens taken in; tokens behind the one that ended the sequence are not.
    """

    def __init__(self, detokenizer: Detokenizer, stopping: Stopping, eos_token_ids: tuple[int, ...]) -> None:
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._stopping = stopping
        self._eos_ids = frozenset[int]() if stopping.ignore_eos else frozenset(eos_token_ids)
        self._stop_ids = frozenset(stopping.stop_token_ids)
        self._patterns = [_Pattern(text) for text in dict.fromkeys(stopping.stop)]
        self._firsts = frozenset(pattern.text[0] for pattern in self._patterns)
        self._matched = [0] * len(self._patterns)
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> tuple[str, Finish | None]:
        """Take in the next tokens: the text that they release, and the end where one of them is it."""
        released = ""
        for token_id in token_ids:
            text, finish = self._push(token_id)
            released += text
            if finish is not None:
                return released, finish
        return released, None

    def flush(self) -> str:
        """The held text, for an end from outside (a completed grammar)."""
        return self._scan(self._detokenizer.flush(), may_stop=True)[0] + self._release()

    def restore(self, token_ids: Iterable[int]) -> Finish | None:
        """Take in tokens that were already emitted, so that only new text is released from here on.

        Returns the end that they had already reached, if any.
        """
        return self.push(token_ids)[1]

    def _push(self, token_id: int) -> tuple[str, Finish | None]:
        self.num_tokens += 1
        may_stop = self.num_tokens >= self._stopping.min_tokens
        finish: Finish | None = None
        text = ""
        if may_stop and (token_id in self._eos_ids or token_id in self._stop_ids):
            is_eos = token_id in self._eos_ids
            finish = Finish(reason="stop", stop_reason=None if is_eos else token_id)
            if self._stopping.include_stop and not is_eos:
                text = self._detokenizer.push(token_id)
        else:
            text = self._detokenizer.push(token_id)
            if self.num_tokens >= self._stopping.max_tokens:
                finish = Finish(reason="length")
        if finish is not None:
            text += self._detokenizer.flush()
        released, stop = self._scan(text, may_stop=may_stop)
        if stop is not None:
            return released, Finish(reason="stop", stop_reason=stop)
        return (released + self._release(), finish) if finish is not None else (released, None)

    def _scan(self, text: str, *, may_stop: bool) -> tuple[str, str | None]:
        """Run new text through the stop strings: what is released, and the stop string that is complete."""
        if not self._patterns or (not self._held and self._firsts.isdisjoint(text)):
            return text, None
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete: list[str] = []
            for i, pattern in enumerate(self._patterns):
                self._matched[i] = matched = pattern.step(self._matched[i], character)
                if matched == len(pattern.text):
                    complete.append(pattern.text)
            if complete and may_stop:
                stop = max(complete, key=len)
                self._release()
                return pending[: end if self._stopping.include_stop else end - len(stop)], stop
        # a string that was complete too early may still be the beginning of another match
        open_lengths = [
            pattern.failure[matched] if matched == len(pattern.text) else matched
            for pattern, matched in zip(self._patterns, self._matched, strict=True)
        ]
        cut = len(pending) - max(open_lengths)
        self._held = pending[cut:]
        return pending[:cut], None

    def _release(self) -> str:
        held, self._held = self._held, ""
        self._matched = [0] * len(self._patterns)
        return held
