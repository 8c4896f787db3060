"""Token counts of one reply."""

from __future__ import annotations

from typing import Any

from cluster.gateway.submit import Job
from cluster.protocol import RequestOutput


class Usage:
    """Counts outputs as they pass. A prompt counts once, however many samples are drawn from it."""

    def __init__(self, job: Job) -> None:
        self._n = job.request.n
        self.prompt_tokens = job.num_prompt_tokens
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}  # by prompt: what its first sample found

    def add(self, choice: int, output: RequestOutput) -> None:
        self.completion_tokens += len(output.token_ids)
        if output.cached_tokens and choice % self._n == 0:
            self._cached.setdefault(choice // self._n, output.cached_tokens)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached.values())

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
