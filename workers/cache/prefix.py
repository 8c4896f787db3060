"""Names for prefixes: a chain of hashes over full pages of token ids.

The chain's root holds everything beside the tokens that the content of a page depends on, so that two requests share
a page only where its K and V would be the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def chain_root(*facts: object) -> bytes:
    """The first link: model, KV dtype, numerics class, rope, accelerations that change KV …, and the tenant's salt."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def next_link(parent: bytes, page_tokens: Sequence[int]) -> bytes:
    """The name of a full page of tokens that follows the prefix `parent`."""
    return hashlib.blake2b(parent + array("q", page_tokens).tobytes(), digest_size=16).digest()


def extend_chain(root: bytes, chain: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Append to `chain` the names of the full pages of `tokens` that it does not name yet."""
    while (len(chain) + 1) * page_size <= len(tokens):
        at = len(chain) * page_size
        chain.append(next_link(chain[-1] if chain else root, tokens[at : at + page_size]))
