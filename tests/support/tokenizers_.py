"""Tiny tokenizers of each kind, trained on a few lines: `build(kind, folder)` writes a `tokenizer.json`.

`library(folder)` is that file as the `tokenizers` library reads it: what encodes a test's text.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "Der Käfer läuft über die Straße; déjà vu, naïve café.",
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 2))\n",
    '{"name": "value", "items": [1, 2, 3], "nested": {"deep": null, "ok": true}}',
    "日本語のテキストと中文文本。 Привет, мир! 🙂🙃",
    'one two three four five six seven eight nine ten yes no maybe true false null "a":"b","c":[',
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
KINDS = ("byte_level", "sentencepiece", "sentencepiece_keep_space", "metaspace", "wordpiece", "no_decoder")


def build(kind: str, folder: Path) -> Path:
    """Train the tokenizer `kind` of `KINDS` and write it to `folder`; ids 0..3 are `SPECIAL`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_level() if kind == "byte_level" else _wordpiece() if kind == "wordpiece" else _sentencepiece()
    if kind == "sentencepiece":
        tokenizer.decoder = decoders.Sequence([*_fallback(), decoders.Strip(" ", 1, 0)])
    elif kind == "sentencepiece_keep_space":
        tokenizer.decoder = decoders.Sequence(_fallback())
    elif kind == "metaspace":
        tokenizer.decoder = decoders.Metaspace()
    elif kind == "no_decoder":
        tokenizer.decoder = None
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def library(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _fallback() -> list[decoders.Decoder]:
    return [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As Llama 2's conversion lays it out: special tokens, then the 256 byte tokens (ordinary entries), then pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=\u2581)"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXT if "日本" not in text], trainer)
    tokenizer.pre_tokenizer = None
    state = json.loads(tokenizer.to_str())
    pieces = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    ordered = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + pieces[len(SPECIAL) :]
    state["model"] |= {"vocab": {piece: i for i, piece in enumerate(ordered)}, "byte_fallback": True}
    return Tokenizer.from_str(json.dumps(state))


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer
