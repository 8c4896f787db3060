"""What a worker tells a gateway beside tokens: its numbers, now and then, and how long a sequence waited."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import grpc.aio
import pytest

from cluster.protocol import STEP_TOKEN_BOUNDS, Beat, EngineState, Grammar, Hello, RequestOutput, StepOutput
from tests.support.worker_process import DEADLINE_S, RunningWorker, Stream, connect, submit, tiny_checkpoint
from workers.counters import with_step
from workers.request import Request
from workers.step import Scheduled, StepPlan
from workers.streams import process_age_s

TICK_S = 0.02  # the system tells when a process began to a hundredth of a second


def test_a_sequence_says_with_its_first_output_how_long_it_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request.from_submit(submit("a"), vocab_size=500, max_model_len=64)
    assert request.times() == {}
    request.arrival, request.scheduled = 10.0, 10.25
    monkeypatch.setattr("workers.request.time", SimpleNamespace(monotonic=lambda: 12.0))
    assert request.times() == {"queue_s": 0.25, "prefill_s": 1.75}


def test_the_prompts_tokens_ahead_are_those_not_computed() -> None:
    request = Request.from_submit(submit("a"), vocab_size=500, max_model_len=64)
    assert request.num_prompt_ahead == 4
    request.num_computed = 3
    assert request.num_prompt_ahead == 1
    request.num_computed = 9
    assert request.num_prompt_ahead == 0


def test_steps_are_counted_by_their_tokens() -> None:
    request = Request.from_submit(submit("a"), vocab_size=500, max_model_len=64)
    state = EngineState()
    for num_tokens in (1, 1, 2, 3, 4, 5, 8192, 8193):
        plan = StepPlan([Scheduled(request, 1), Scheduled(request, num_tokens - 1)][:num_tokens])
        state = with_step(state, plan, num_prompt=3, num_generated=2, forward_s=0.25, step_s=0.5)
    assert STEP_TOKEN_BOUNDS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    assert state.step_token_counts == (2, 1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1)
    assert (state.steps, state.step_tokens, state.sequence_steps) == (8, 16_401, 14)
    assert (state.prompt_tokens, state.generated_tokens, state.forward_s, state.step_s) == (24, 16, 2.0, 4.0)


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


def check_times(first: RequestOutput, *, since_s: float) -> None:
    """A sequence's first output has its times, which fit into those since it was sent (`time.monotonic()` seconds)."""
    assert first.queue_s is not None
    assert first.prefill_s is not None
    assert first.queue_s >= 0
    assert 0 < first.prefill_s <= time.monotonic() - since_s - first.queue_s


def test_a_stream_has_numbers_and_times() -> None:
    async def run() -> None:
        async with connect(worker) as stream:
            sent_s = time.monotonic()
            await stream.send(submit("a", 300))
            outputs, states = await told(stream)
            check_times(outputs[0], since_s=sent_s)
            assert all(output.queue_s is output.prefill_s is None for output in outputs[1:])
            last = states[-1]
            assert len({state.worker_id for state in states}) == 1
            assert last == await stream.state()
            assert sum(last.step_token_counts) == last.steps >= 300
            assert (last.prompt_tokens_ahead, last.num_compiling, last.num_waiting) == (0, 0, 0)
            steps = [state.steps for state in states]
            assert steps == sorted(set(steps))  # what has not changed is not told again

            sent_s = time.monotonic()
            await stream.send(submit("b", 4, grammar=Grammar(kind="regex", source="[a-z]{1,4}")))
            outputs, _ = await told(stream, last.generated_tokens)
            check_times(outputs[0], since_s=sent_s)  # its grammar was compiled meanwhile

        async with grpc.aio.insecure_channel(worker.address) as channel:
            hello = await Stream(channel).read()
            assert isinstance(hello, Hello)
            assert (hello.token_budget, hello.max_num_seqs, hello.prefix_cache) == (96, 5, False)
            assert (hello.startup_s > 0) == Path("/proc/self/stat").exists(), "0 where the system does not tell"
            assert hello.startup_s <= time.monotonic() - started_s + TICK_S

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = tiny_checkpoint(folder / "model")
        started_s = time.monotonic()
        with RunningWorker(checkpoint, folder, token_budget=96, max_num_seqs=5, prefix_cache=False) as worker:
            asyncio.run(run())
