"""Which worker takes a request: a pure function of what each has to do and of the prompt's first page.

Prompts that begin alike go to the worker that their beginning hashes to, whose prefix cache then holds it: rendezvous
hashing (Thaler and Ravishankar 1998), so every gateway chooses alike, and a worker that comes or goes moves only its
own share. It is bounded, as in consistent hashing with bounded loads (Mirrokni et al. 2018): where that worker has too
much more to do than the others, the one with the least takes the request.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.protocol import Submit

MAX_IMBALANCE = 1.25  # of the mean load
SLACK_TOKENS = 1024  # over that: with little to do, a found prefix is worth more than an even load
EXPECTED_TOKENS = 256  # a sequence is reckoned to generate at most this many: most stop long before their limit


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker has to do for this gateway."""

    name: str
    num_requests: int
    num_tokens: int  # prompt tokens to compute and tokens that are likely to be generated


def generated_load(submit: Submit) -> int:
    """How many tokens a sequence is reckoned to generate from here on."""
    return max(0, min(submit.stopping.max_tokens - len(submit.output_ids), EXPECTED_TOKENS))


def group_of(submit: Submit) -> str:
    """What sequences have in common that go to one worker together."""
    return submit.group or submit.request_id


def prefix_key(submit: Submit, page_size: int) -> bytes | None:
    """What prompts with the same first KV page have in common; None where a prompt has no whole page to share."""
    if len(submit.prompt_ids) <= page_size:  # its last token is always computed
        return None
    page = array("Q", submit.prompt_ids[:page_size]).tobytes()
    return hashlib.blake2b(page + submit.cache_salt.encode(), digest_size=16).digest()


def choose(workers: Sequence[WorkerLoad], prefix: bytes | None) -> str | None:
    """The name of the one of `workers` to take a request whose prompt begins with `prefix`; None: there is none."""
    if not workers:
        return None
    if prefix is not None:
        bound = MAX_IMBALANCE * sum(worker.num_tokens for worker in workers) / len(workers) + SLACK_TOKENS
        preferred = min(workers, key=lambda worker: _score(prefix, worker.name))
        if preferred.num_tokens <= bound:
            return preferred.name
    return min(workers, key=lambda worker: (worker.num_tokens, worker.num_requests, worker.name)).name


def _score(prefix: bytes, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8, key=prefix).digest()
