"""What a worker tells a gateway beside tokens: its numbers, now and then, and how long a sequence waited."""

from __future__ import annotations

import asyncio
import tempfile
from bisect import bisect_left
from pathlib import Path

import grpc.aio
import pytest

from cluster.protocol import STEP_TOKEN_BOUNDS, Beat, EngineState, Grammar, Hello, RequestOutput, StepOutput
from tests.support.worker_process import DEADLINE_S, RunningWorker, Stream, connect, submit, tiny_checkpoint
from workers.request import Request
from workers.step import counted
from workers.streams import process_age_s


def test_a_sequence_says_with_its_first_output_how_long_it_waited() -> None:
    request = Request.from_submit(submit("a"), vocab_size=500, max_model_len=64)
    assert request.times() == {}
    request.scheduled = request.arrival + 0.25
    found = request.times()
    assert found["queue_s"] == pytest.approx(0.25)
    assert found["prefill_s"] >= -0.25


def test_the_prompts_tokens_ahead_are_those_not_computed() -> None:
    request = Request.from_submit(submit("a"), vocab_size=500, max_model_len=64)
    assert request.num_prompt_ahead == 4
    request.num_computed = 3
    assert request.num_prompt_ahead == 1
    request.num_computed = 9
    assert request.num_prompt_ahead == 0


def test_steps_are_counted_by_their_tokens() -> None:
    counts: tuple[int, ...] = ()
    sizes = (1, 1, 2, 3, STEP_TOKEN_BOUNDS[-1], STEP_TOKEN_BOUNDS[-1] + 1)
    for num_tokens in sizes:
        counts = counted(counts, num_tokens)
    assert len(counts) == len(STEP_TOKEN_BOUNDS) + 1
    for place in range(len(counts)):
        assert counts[place] == sum(bisect_left(STEP_TOKEN_BOUNDS, size) == place for size in sizes)


@pytest.mark.needs("linux")
def test_a_process_knows_how_old_it_is() -> None:
    assert 0 < process_age_s() <= process_age_s()


async def told(stream: Stream, num_before: int = 0) -> tuple[list[RequestOutput], list[EngineState]]:
    """All that is said until the numbers are told as they are behind the last token; `num_before` were there before."""
    outputs: list[RequestOutput] = []
    states: list[EngineState] = []

    def is_done() -> bool:
        num_tokens = num_before + sum(len(output.token_ids) for output in outputs)
        has_ended = any(output.finish for output in outputs)
        return has_ended and bool(states) and states[-1].num_running == 0 and states[-1].generated_tokens == num_tokens

    async with asyncio.timeout(DEADLINE_S):
        while not is_done():
            message = await stream.read()
            assert isinstance(message, StepOutput | Beat)
            outputs += message.outputs if isinstance(message, StepOutput) else []
            states += [message.state] if message.state is not None else []
    return outputs, states


def test_a_stream_has_numbers_and_times() -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            await stream.send(submit("a", 300))
            outputs, states = await told(stream)
            assert outputs[0].queue_s is not None
            assert outputs[0].prefill_s is not None
            assert outputs[0].queue_s >= 0
            assert outputs[0].prefill_s > 0
            assert all(output.queue_s is output.prefill_s is None for output in outputs[1:])
            last = states[-1]
            assert len({state.worker_id for state in states}) == 1
            assert last == await stream.state()
            assert sum(last.step_token_counts) == last.steps >= 300
            assert (last.prompt_tokens_ahead, last.num_compiling, last.num_waiting) == (0, 0, 0)
            steps = [state.steps for state in states]
            assert steps == sorted(set(steps))  # what has not changed is not told again

            await stream.send(submit("b", 4, grammar=Grammar(kind="regex", source="[a-z]{1,4}")))
            outputs, _ = await told(stream, last.generated_tokens)
            assert outputs[0].queue_s is not None
            assert outputs[0].queue_s > 0  # its grammar was compiled meanwhile

        async with grpc.aio.insecure_channel(worker.address) as channel:
            hello = await Stream(channel).read()
            assert isinstance(hello, Hello)
            assert (hello.token_budget, hello.max_num_seqs, hello.prefix_cache) == (96, 5, False)
            assert hello.startup_s >= 0

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = tiny_checkpoint(folder / "model")
        with RunningWorker(checkpoint, folder, token_budget=96, max_num_seqs=5, prefix_cache=False) as worker:
            asyncio.run(run())
