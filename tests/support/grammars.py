"""What tests ask of grammars: one compiled now, and a mask as booleans."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.protocol import Grammar
from workers.sampling.guided import CompiledGrammar, GrammarCompiler, Matcher

TIMEOUT_S = 60.0


def compiled(compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
    """Compile and wait. Raises what the future holds."""
    return compiler.submit(grammar).result(TIMEOUT_S)


def allowed_tokens(matcher: Matcher, vocab_size: int) -> NDArray[np.bool_]:
    """The next token's mask [vocab_size]."""
    words = np.full((vocab_size + 31) // 32, -1, dtype=np.int32)
    matcher.fill_mask(words)
    return np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").astype(np.bool_)
