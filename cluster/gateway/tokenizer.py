"""Text to token ids and back, by the checkpoint's own `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from cluster.errors import CheckpointError
from cluster.gateway.length import length_bound


class TextTokenizer:
    """A `tokenizers.Tokenizer` without truncation or padding. Thread-safe; a long text takes a while (no asyncio)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._bound = length_bound(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}  # special ones among them
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def from_checkpoint(cls, model_path: Path) -> TextTokenizer:
        """Raises `CheckpointError` where `tokenizer.json` is missing or cannot be read."""
        path = model_path / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: convert the tokenizer with transformers' save_pretrained")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """The ids of `text`; `special_tokens` lets the post-processor add its own (BOS …)."""
        # the library holds Python's lock for all of `encode`, which would stop the event loop
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)
        return encoding.ids

    def min_tokens(self, text: str) -> int:
        """`text` has at least so many tokens; takes no time."""
        return self._bound.min_tokens(text)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The entry of the vocabulary; None: there is none of that id."""
        return self._tokenizer.id_to_token(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def word_sequences(self, word: str) -> list[tuple[int, ...]]:
        """The token sequences that `word` can begin with in running text: as it is, and after a space."""
        forms = (self.encode(text, special_tokens=False) for text in (word, " " + word.lstrip()))
        return list(dict.fromkeys(tuple(ids) for ids in forms if ids))
