"""What a load consists of: prompts, lengths and arrival times. Pure and seeded: the same seed is the same load."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import CheckpointError, InvalidValueError

WORD_STARTS = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write a leading space


class LoadRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request. `prompt` is text, token ids or, for the chat endpoint, messages; `body` is sent as it is besides."""

    prompt: str | list[int | dict[str, Any]]
    max_tokens: int
    body: dict[str, Any] = {}


class Poisson(msgspec.Struct, frozen=True, tag="poisson", tag_field="kind", forbid_unknown_fields=True):
    """Independent arrivals, `rate` a second."""

    rate: float

    def times_s(self, seed: int) -> Iterator[float]:
        rng = random.Random(seed)
        return itertools.accumulate((rng.expovariate(self.rate) for _ in itertools.count()), initial=0.0)


class Constant(msgspec.Struct, frozen=True, tag="constant", tag_field="kind", forbid_unknown_fields=True):
    """One every 1 / `rate` seconds."""

    rate: float

    def times_s(self, seed: int) -> Iterator[float]:
        return (index / self.rate for index in itertools.count())


class Burst(msgspec.Struct, frozen=True, tag="burst", tag_field="kind", forbid_unknown_fields=True):
    """`size` at once every `interval_s` seconds; None: all at once."""

    size: int | None = None
    interval_s: float = 1.0

    def times_s(self, seed: int) -> Iterator[float]:
        if self.size is None:
            return itertools.repeat(0.0)
        size = self.size
        return (index // size * self.interval_s for index in itertools.count())


class Listed(msgspec.Struct, frozen=True, tag="listed", tag_field="kind", forbid_unknown_fields=True):
    """At these times, in seconds from the start, ascending."""

    at_s: list[float]

    def times_s(self, seed: int) -> Iterator[float]:
        return iter(self.at_s)


Arrivals = Poisson | Constant | Burst | Listed


def check_arrivals(arrivals: Arrivals, num_requests: int) -> None:
    """Raise `InvalidValueError` naming the field for arrivals that cannot be."""
    match arrivals:
        case Poisson(rate=rate) | Constant(rate=rate) if not 0 < rate < float("inf"):
            raise InvalidValueError(f"arrivals.rate must be a positive number a second, got {rate}", param="rate")
        case Burst(size=size) if size is not None and size < 1:
            raise InvalidValueError(f"arrivals.size must be at least 1, got {size}", param="size")
        case Burst(interval_s=interval) if not 0 <= interval < float("inf"):
            raise InvalidValueError(f"arrivals.interval_s must not be negative, got {interval}", param="interval_s")
        case Listed(at_s=at_s) if len(at_s) < num_requests:
            raise InvalidValueError(f"arrivals.at_s has {len(at_s)} times for {num_requests} requests", param="at_s")
        case Listed(at_s=at_s) if not all(0 <= a <= b < float("inf") for a, b in itertools.pairwise([0.0, *at_s])):
            raise InvalidValueError("arrivals.at_s must ascend from 0 seconds on", param="at_s")


def arrivals_of(requests: Iterable[LoadRequest], arrivals: Arrivals, seed: int) -> Iterator[tuple[float, LoadRequest]]:
    """(seconds from the start, request) in order: the form in which every source of load comes."""
    return zip(arrivals.times_s(seed), requests, strict=False)


def word_ids(model: Path) -> list[int]:
    """Token ids that stand for a word of letters behind a space, from a model folder's `tokenizer.json`.

    Raises `CheckpointError` where there is no such file, or fewer than a hundred of those.
    """
    try:
        vocabulary = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t, i) for i, (t, _) in enumerate(vocabulary))
        ids = sorted(i for text, i in pairs if text[:1] in WORD_STARTS and text[1:].isascii() and text[1:].isalpha())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"no vocabulary can be read from {model / 'tokenizer.json'}: {error}") from None
    if len(ids) < 100:
        raise CheckpointError(f"{model / 'tokenizer.json'} has only {len(ids)} words to make prompts of")
    return ids


def random_prompts(ids: Sequence[int], lengths: Iterable[int], seed: int) -> list[list[int]]:
    """Prompts of these lengths, in tokens, drawn from `ids`; two seeds share no prefix worth a cache page."""
    rng = random.Random(seed)
    return [rng.choices(ids, k=length) for length in lengths]


def mixed_lengths(num: int, low: int, high: int, seed: int) -> list[int]:
    """`num` lengths in [low, high], even on a logarithmic scale: many short, few long, as requests are."""
    rng = random.Random(seed)
    return [round(low * (high / low) ** rng.random()) for _ in range(num)]


def static_steps(lengths: Sequence[int], num_slots: int) -> int:
    """Steps to generate `lengths` tokens in batches of `num_slots`, each as long as its longest."""
    return sum(max(lengths[start : start + num_slots]) for start in range(0, len(lengths), num_slots))


def continuous_steps(lengths: Sequence[int], num_slots: int) -> int:
    """Steps to generate `lengths` tokens where a freed slot takes the next request at once."""
    ends = [0] * num_slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)
