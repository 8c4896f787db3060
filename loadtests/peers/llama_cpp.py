"""llama.cpp as a peer: its `llama-server` on a GGUF file of the same weights, both named by the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.machine import free_port
from loadtests.processes import Child, Server, environment, wait_for_first_token

BODY: dict[str, Any] = {"cache_prompt": False}  # of each request: prompts are computed, as everywhere else


@dataclass(frozen=True)
class LlamaCpp:
    """Where the program and the weights are."""

    server: Path
    gguf: Path


@contextlib.contextmanager
def llama_server(
    peer: LlamaCpp,
    prompt_ids: Sequence[int],
    *,
    num_slots: int,
    context_each: int,
    num_threads: int,
    deadline_s: float,
) -> Iterator[Server]:
    """A running llama-server with `num_slots` sequences of `context_each` tokens, ended afterwards.

    Raises `BenchError` where it does not start, or gives no token in time.
    """
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    command = [str(peer.server), "--model", str(peer.gguf), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(num_threads), "--threads-batch", str(num_threads), "--parallel", str(num_slots)]
    command += ["--ctx-size", str(num_slots * context_each)]
    with Child("llama-server", command, environment()) as child:
        yield Server(base_url, wait_for_first_token(child, base_url, prompt_ids, deadline_s))
