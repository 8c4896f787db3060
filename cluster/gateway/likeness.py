"""Which workers are alike: who may go on with what another one began, and which model a pool of them has.

A request that has begun goes on at a worker that would have computed the same tokens. That takes the same model and, in
the class `invariant`, the same arithmetic on the same pages; the class `fast` promises a valid sample and not its bits,
on one worker as on two, so the same model and class are enough there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from cluster.protocol import Hello

MODEL = ("checkpoint", "dtype")
NUMERICS = ("numerics",)
BITS = ("arithmetic", "page_size")


def model_difference(ours: Hello, theirs: Hello) -> str | None:
    """How the model that `theirs` serves differs, in words; None: not at all."""
    return _difference(MODEL, ours, theirs)


def token_difference(began: Hello, other: Hello) -> str | None:
    """Why `other` might compute other tokens than the worker that began; None: it would not."""
    fields = MODEL + NUMERICS + (BITS if began.numerics == "invariant" else ())
    return _difference(fields, began, other)


def all_unlike(began: Hello, others: Mapping[str, Hello]) -> str | None:
    """Why none of `others`, by name, may go on, in words; None where one may, and where there are none."""
    differences = {name: token_difference(began, other) for name, other in others.items()}
    if not differences or None in differences.values():
        return None
    return "; ".join(f"{name} has {text}" for name, text in differences.items())


def _difference(fields: Iterable[str], ours: Hello, theirs: Hello) -> str | None:
    pairs = [(field, getattr(ours, field), getattr(theirs, field)) for field in fields]
    found = [f"{field.replace('_', ' ')} {b!r} instead of {a!r}" for field, a, b in pairs if a != b]
    return ", ".join(found) or None


class PoolModel:
    """The model of a pool: what most of its workers serve.

    Nobody tells a gateway which of two checkpoints is meant. So a worker of another one gets nothing, until those like
    it are the majority, as in an update. While workers are missing, those of the model before may be among them: it
    keeps its place for `reign_s` without any.
    """

    def __init__(self, reign_s: float) -> None:
        self.reign_s = reign_s
        self._hello: Hello | None = None  # of some worker that has it
        self._seen_s = 0.0  # when one was last there

    def difference(self, hello: Hello) -> str | None:
        """How a worker's model differs from the pool's, in words; None: not at all."""
        return None if self._hello is None else model_difference(self._hello, hello)

    def count(self, hellos: Iterable[Hello], num_missing: int, now: float) -> bool:
        """Take in who is there at `now`, in seconds of any clock, and how many are not.

        Returns whether the model is another one from now on.
        """
        votes: Counter[tuple[str, ...]] = Counter()
        voters: dict[tuple[str, ...], Hello] = {}
        for hello in hellos:
            key = _key(hello)
            votes[key] += 1
            voters[key] = hello
        mine = None if self._hello is None else _key(self._hello)
        if mine is not None and votes[mine]:
            self._seen_s = now
        elif mine is not None and num_missing and now - self._seen_s < self.reign_s:
            return False
        best = max(voters, key=lambda key: (votes[key], key == mine), default=None)
        if best is None or best == mine:
            return False
        self._hello, self._seen_s = voters[best], now
        return mine is not None


def _key(hello: Hello) -> tuple[str, ...]:
    return tuple(str(getattr(hello, field)) for field in MODEL)
