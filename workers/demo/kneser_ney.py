"""An interpolated modified Kneser-Ney n-gram model over token ids, the demo model's baseline.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998): the highest order counts
occurrences, lower orders count distinct left neighbours, three discounts an order come from the counts of counts, and
the unigram is interpolated with the uniform distribution. An n-gram is one integer, so a table is a sorted array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class _Table:
    """One order. keys [n-grams] sorted, shares [n-grams] discounted and normalised; contexts [contexts] sorted, with
    the probability mass that each leaves to the next lower order."""

    keys: np.ndarray
    shares: np.ndarray
    contexts: np.ndarray
    left_over: np.ndarray


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D for counts 0, 1, 2, 3 and more; falls back to 0.75 where the counts of counts are degenerate (toy corpora)."""
    n1, n2, n3, n4 = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    fallback = np.array([0.0, 0.75, 0.75, 0.75])
    if min(n1, n2, n3, n4) == 0:
        return fallback
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return found if all(0 < found[value] < value for value in (1, 2, 3)) else fallback


def _table(keys: np.ndarray, counts: np.ndarray, bits: int) -> _Table:
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(keys >> np.uint64(bits), return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    left_over = np.add.reduceat(discount, first) / totals
    owner = np.repeat(np.arange(len(contexts)), np.diff(np.append(first, len(keys))))
    return _Table(keys, (counts - discount) / totals[owner], contexts, left_over)


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each wanted key (clipped) and whether it is there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted


class KneserNey:
    """The model. Fit on documents of token ids; each document's first tokens see `boundary` as their past."""

    def __init__(self, order: int, vocab_size: int, boundary: int) -> None:
        self.order, self.vocab_size, self.boundary = order, vocab_size, boundary
        self.bits = max(1, (vocab_size - 1).bit_length())
        if self.bits * order > 63:
            raise ValueError(f"{order} tokens of {self.bits} bits do not fit in one 64-bit key")
        self.tables: list[_Table] = []  # unigrams first

    def keys(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The order-gram that ends at each token: tokens [total], starts [documents + 1] -> uint64 [total]."""
        past = self.order - 1
        shift = np.uint64(self.bits)
        sizes = np.diff(starts)
        offset = np.arange(len(tokens)) - np.repeat(starts[:-1], sizes)
        keys = np.zeros(len(tokens), dtype=np.uint64)
        for back in range(past, -1, -1):
            column = np.roll(tokens, back).astype(np.uint64)
            column[offset < back] = self.boundary
            keys = (keys << shift) | column
        return keys

    def fit(self, tokens: np.ndarray, starts: np.ndarray) -> KneserNey:
        """Count the documents. 9 M tokens take about ten seconds."""
        keys, counts = np.unique(self.keys(tokens, starts), return_counts=True)
        tables = [_table(keys, counts, self.bits)]
        for order in range(self.order - 1, 0, -1):
            suffixes = keys & np.uint64((1 << (self.bits * order)) - 1)
            keys, counts = np.unique(
                suffixes, return_counts=True
            )  # of distinct longer n-grams: distinct left neighbours
            tables.append(_table(keys, counts, self.bits))
        self.tables = tables[::-1]
        return self

    def probabilities(self, keys: np.ndarray) -> np.ndarray:
        """P(last token | the others) for order-grams as `keys` makes them -> float64, same shape. Never zero."""
        result = np.full(keys.shape, 1.0 / self.vocab_size)
        for order, table in enumerate(self.tables, start=1):
            wanted = keys & np.uint64((1 << (self.bits * order)) - 1)
            context, context_known = _find(table.contexts, wanted >> np.uint64(self.bits))
            at, known = _find(table.keys, wanted)
            mixed = np.where(known, table.shares[at], 0.0) + table.left_over[context] * result
            result = np.where(context_known, mixed, result)
        return result

    def bits_per_token(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """-log2 P of every token of the documents [total]."""
        return -np.log2(self.probabilities(self.keys(tokens, starts)))
