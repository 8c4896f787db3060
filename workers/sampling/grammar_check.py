"""A program, not a module: compiles grammars where doing so may take too long, too much memory, or the whole process.

    python -P grammar_check.py MAX_MEMORY_BYTES

Reads one request a line on standard input, {"grammar": llguidance's JSON form, "limits": of its parser, "cpu_s": time},
and answers one line: {"error": text or null}. It ends with its input. It runs at low priority under bounds on its
memory and its stack; a grammar that takes more than `cpu_s` seconds of processor time ends it by SIGPROF. A library's
recursion, or a doubling that no limit stops, then costs a caller an error and not a worker.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
import threading
from typing import Any

import llguidance

STACK_BYTES = 2 * 2**20  # less than any thread that will hold the grammar later
NUM_WALKS = 3
WALK_TOKENS = 48
MAX_MESSAGE = 2000  # characters; an answer fits into a pipe
NUM_BYTES = 256
STAND_IN = 257  # a special token of the byte tokenizer, for each token that a grammar asks for by its id
_TOKEN_IDS = re.compile(r"<\[[\d,\s-]*\]>")


def limit_memory(max_bytes: int) -> None:
    """Let the address space grow by `max_bytes`, where the system can tell and bound it."""
    try:
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + max_bytes, used + max_bytes))
    except (OSError, ValueError):
        return


def check(tokenizer: llguidance.LLTokenizer, grammar: str, limits: dict[str, Any]) -> str | None:
    """Compile `grammar` and follow it along a few random walks; what is wrong with it, or None."""
    grammar = _TOKEN_IDS.sub(f"<[{STAND_IN}]>", grammar)
    matcher = llguidance.LLMatcher(
        tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(verbose_errors=False, **limits)
    )
    generator = random.Random(0)
    for _ in range(NUM_WALKS):
        walk = matcher.deep_copy()
        for _ in range(WALK_TOKENS):
            if walk.is_error() or walk.is_stopped():
                break
            mask = int.from_bytes(walk.compute_bitmask(), "little")
            allowed = [token for token in (*range(NUM_BYTES), STAND_IN) if mask >> token & 1]
            if not allowed:
                break
            walk.consume_token(generator.choice(allowed))
        if walk.is_error():
            return walk.get_error()
    return None


def main() -> None:
    os.nice(5)
    tokenizer = llguidance.LLTokenizer("byte")  # whether a grammar explodes hardly depends on the tokenizer
    limit_memory(int(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])  # its default action ends the process, even inside Rust
        try:
            error = check(tokenizer, request["grammar"], request["limits"])
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"error": error and error[:MAX_MESSAGE]}), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=main)
    worker.start()
    worker.join()
