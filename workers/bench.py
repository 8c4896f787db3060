"""An engine by itself, without server or gateway: `python -m workers.bench`, requests and answers as JSON lines.

The first line is a `Launch` (its address is not used); the answer says what was built. Each further line is a batch,
`{"prompts": [[token ids] …], "num_tokens": n}`, submitted at once and run to its end, greedily; the answer holds its
times (`Times`). The environment is the caller's to set, as for a worker: `MKL_CBWR` must stand before torch starts.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec
from msgspec import structs

from cluster.errors import ForetokenError
from cluster.protocol import Launch, Sampling, Stopping, Submit
from workers.build import BuiltEngine, build_engine
from workers.engine import Engine


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompts: list[list[int]]
    num_tokens: int  # each generates as many


class Times(msgspec.Struct, frozen=True):
    """Seconds and counts of one batch. A step that computes prompt tokens counts as prefill, whatever else it does."""

    prefill_s: float
    decode_s: float
    num_decode_steps: int
    step_s: float  # inside `Engine.step`, of which
    forward_s: float  # inside the model
    num_sequence_steps: int  # sequences of all steps
    output_tokens: int


def run_batch(engine: Engine, batch: Batch) -> Times:
    """Run a batch through an idle engine. Raises `ForetokenError` where a request is refused or fails."""
    before = engine.snapshot()
    for index, prompt in enumerate(batch.prompts):
        submit = Submit(
            request_id=f"bench-{index}",
            prompt_ids=tuple(prompt),
            sampling=Sampling(seed=0, temperature=0.0),
            stopping=Stopping(max_tokens=batch.num_tokens, ignore_eos=True),
        )
        engine.submit(engine.request_from(submit))
    prefill_s = decode_s = 0.0
    num_decode_steps = output_tokens = 0
    prompt_tokens = before.prompt_tokens
    while engine.has_work:
        started = time.perf_counter()
        output = engine.step()
        elapsed_s = time.perf_counter() - started
        computed = engine.snapshot().prompt_tokens
        if computed > prompt_tokens:
            prefill_s += elapsed_s
        else:
            decode_s += elapsed_s
            num_decode_steps += 1
        prompt_tokens = computed
        for item in output.outputs:
            output_tokens += len(item.token_ids)
            if item.finish is not None and item.finish.reason != "length":
                raise ForetokenError(f"a request ended by {item.finish.reason}: {item.finish.error_message}")
    after = engine.snapshot()
    return Times(
        prefill_s=prefill_s,
        decode_s=decode_s,
        num_decode_steps=num_decode_steps,
        step_s=after.step_s - before.step_s,
        forward_s=after.forward_s - before.forward_s,
        num_sequence_steps=after.sequence_steps - before.sequence_steps,
        output_tokens=output_tokens,
    )


def describe(built: BuiltEngine) -> dict[str, Any]:
    return {"numerics": built.engine.decoder.numerics.name, "num_parameters": built.num_parameters}


def main() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)

    def answer(value: object) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
        sys.stdout.buffer.flush()

    lines = iter(sys.stdin.buffer.readline, b"")
    try:
        built = build_engine(msgspec.json.decode(next(lines, b""), type=Launch))
        answer(describe(built))
        for line in lines:
            answer(structs.asdict(run_batch(built.engine, msgspec.json.decode(line, type=Batch))))
    except (ForetokenError, msgspec.DecodeError) as error:
        answer({"error": str(error)})
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
